"""A record as a line of JSON, byte for byte, and the gap that stands for records which an archive leaves out.

Keys, values and header values are base64, or null where they are null in Kafka. A gap keeps how many offsets are left
out, so that what follows keeps its own, and the latest time among them: times of a partition are running maxima, so
nothing after a gap changes because of it.
"""

import binascii
import json
from dataclasses import dataclass

from schemas.records import StoredRecord


@dataclass(frozen=True, slots=True)
class Gap:
    """The records from offset `first` to `last` (included) are left out; `timestamp_ms` is the latest among theirs."""

    partition: int
    first: int
    last: int
    timestamp_ms: int


Item = StoredRecord | Gap
_encode = json.JSONEncoder(separators=(",", ":")).encode


class DamagedLineError(ValueError):
    """A line is not one that `written` wrote."""


def written(item: Item) -> bytes:
    """The line, without its end. The partition is not in it: a segment is of one."""
    line: dict[str, object]
    if isinstance(item, Gap):
        line = {"offset": item.first, "left_out_to": item.last, "timestamp_ms": item.timestamp_ms}
    else:
        line = {
            "offset": item.offset,
            "timestamp_ms": item.timestamp_ms,
            "key": _text(item.key),
            "value": _text(item.value),
            "headers": [[name, _text(value)] for name, value in item.headers],
        }
    return _encode(line).encode()


def read(line: bytes, partition: int) -> Item:
    """What `written` wrote. Raises DamagedLineError."""
    try:
        found = json.loads(line)
        if "left_out_to" in found:
            return Gap(partition, found["offset"], found["left_out_to"], found["timestamp_ms"])
        headers = tuple((name, _bytes(value)) for name, value in found["headers"])
        # In Kafka a header's value may be null; nobody here writes one, and who reads one takes it as it is.
        return StoredRecord(
            partition,
            found["offset"],
            found["timestamp_ms"],
            _bytes(found["key"]),
            _bytes(found["value"]),
            headers,  # type: ignore[arg-type]  # see above
        )
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise DamagedLineError(f"{line[:80]!r} is not a line of an archive: {error!r}") from error


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else binascii.b2a_base64(raw, newline=False).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else binascii.a2b_base64(text, strict_mode=True)
