"""Times as text: RFC 3339 in, milliseconds since 1970 UTC out. Pure; how times are written stands in views.py."""

import re
from datetime import UTC, datetime, timedelta

_RFC3339 = re.compile(r"(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}:\d{2})(?:\.(\d{1,12}))?([Zz]|[+\- ]\d{2}:\d{2})", re.ASCII)


def read_rfc3339(text: str) -> int | None:
    """The time's millisecond, finer digits cut off; None for what is no RFC 3339 date-time (section 5.6).

    A space counts for the `+` of an offset, since that is what a `+` in a query becomes where nobody escaped it. A leap
    second is the second after it.
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    day, time_of_day, fraction, offset = match.groups()
    leap = time_of_day.endswith(":60")
    try:
        local = datetime.fromisoformat(f"{day}T{time_of_day[:-2]}{'59' if leap else time_of_day[-2:]}+00:00")
        hours, minutes = (0, 0) if offset in "Zz" else (int(offset[1:3]), int(offset[4:6]))
    except ValueError:
        return None
    if hours > 23 or minutes > 59:  # noqa: PLR2004  # the clock's own numbers
        return None
    ahead = timedelta(hours=hours, minutes=minutes) * (-1 if offset[0] == "-" else 1)
    elapsed = local - datetime(1970, 1, 1, tzinfo=UTC) - ahead
    milliseconds = int((fraction or "").ljust(3, "0")[:3])
    return (elapsed.days * 86_400 + elapsed.seconds + leap) * 1_000 + (0 if leap else milliseconds)
