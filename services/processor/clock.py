"""What time it is by the log's clock, which is Kafka's: the only one that said when a fact was told.

This machine's own clock may be wrong or be set while the process runs, and what is done too early because of that (an
open batch sealed, say) stays done. So it is never asked: the newest record's time is, and how long ago that was read.
Never ahead of the log's clock, and hardly behind it, since a lane begins with a record of its own.
"""

import time

from schemas.batch import Lane


class LogClock:
    """The clock of one lane; ask it more often than the answer may be behind."""

    def __init__(self) -> None:
        self._next_offset = 0
        self._seen_s = time.monotonic()

    def now_ms(self, lane: Lane) -> int:
        """The time now, where the lane has folded all that was read; milliseconds since 1970 UTC."""
        if lane.next_offset != self._next_offset:  # its time alone does not tell: Kafka's clock may have been set back
            self._next_offset, self._seen_s = lane.next_offset, time.monotonic()
        return lane.time_ms + int((time.monotonic() - self._seen_s) * 1000)
