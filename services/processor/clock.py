"""What time it is by the log's clock, which is Kafka's: the only one that said when a fact was told.

This machine's own clock may be wrong or be set while the process runs, and what is done too early because of that (an
open batch sealed, say) stays done. So it is never asked: the newest record's time is, and how long ago that was read.
Never ahead of the log's clock, and hardly behind it, since a lane begins with a record of its own.
"""

import time


class LogClock:
    """The clock of one lane; ask it more often than the answer may be behind."""

    def __init__(self) -> None:
        self._newest_ms = 0
        self._seen_s = time.monotonic()

    def now_ms(self, newest_ms: int) -> int:
        """The time now, where `newest_ms` is the newest record's; milliseconds since 1970 UTC."""
        if newest_ms != self._newest_ms:
            self._newest_ms, self._seen_s = newest_ms, time.monotonic()
        return newest_ms + int((time.monotonic() - self._seen_s) * 1000)
