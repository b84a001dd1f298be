"""Whether a log that is read on is still the log that was opened, from its first record on.

A reader sees by its offsets when its place is gone, and recognises the log when it connects anew. What it cannot see is
looked at here, every few seconds: that a topic was replaced by one that reaches as far, and that the beginning of the
log was cut off, of which readers at its end notice nothing until somebody needs the past.
"""

import time

from services.eventlog import LogReader, LogRefused, check_log_id
from services.observability import logger

_log = logger("recognising")

LOOK_INTERVAL_S = 5.0


class Recogniser:
    """Looks at the first partition of a reader. `complaint`: what is wrong though reading can go on, or None."""

    def __init__(self, reader: LogReader, *, topic: str, log_id: str) -> None:
        self.complaint: str | None = None
        self._reader = reader
        self._topic = topic
        self._log_id = log_id
        self._again_at_s = 0.0

    async def look(self) -> None:
        """Look, unless that was done a moment ago. Raises LogRefused where it is another log, LogUnavailable."""
        if time.monotonic() < self._again_at_s:
            return
        try:
            first = await self._reader.first(self._reader.partitions[0])
        except LogRefused as error:
            self._complain(str(error))
        else:
            if first is None:
                raise LogRefused(
                    f"{self._topic} is empty, and held the log {self._log_id}: the topic was replaced; make the read "
                    "models anew from the new log with `sluice replay`, or bring the old one back with "
                    "`sluice log import`"
                )
            check_log_id(first, topic=self._topic, log_id=self._log_id)
            self.complaint = None
        self._again_at_s = time.monotonic() + LOOK_INTERVAL_S

    def _complain(self, complaint: str) -> None:
        if self.complaint is None:
            _log.warning("log_cut", reason=complaint)
        self.complaint = complaint
