"""Who works which lane, as the read models' database tells, and which lanes nobody works. Pure.

A processor that takes over, or comes back after a moment, is no reason to call the service degraded: a lane counts as
worked for LEFT_ALONE_S after a working processor was last heard. While the database gives no answer nothing is known,
and nobody is accused.
"""

from collections.abc import Sequence

from schemas.views import ProcessorView

LEFT_ALONE_S = 5.0
HEARD_MAX_S = 5.0
"""A processor that was not heard for longer is not shown: it says how it is each second."""


class Lanes:
    """Of all partitions; times are the caller's, in seconds."""

    def __init__(self, partitions: int, *, now_s: float) -> None:
        self.processors: Sequence[ProcessorView] = ()
        self._worked_at_s = dict.fromkeys(range(partitions), now_s)

    def see(self, found: Sequence[ProcessorView], *, now_s: float) -> None:
        """What the database tells now."""
        self.processors = [each for each in found if each.heard_s <= HEARD_MAX_S]
        for each in self.processors:
            if each.state == "working" and each.partition in self._worked_at_s:
                self._worked_at_s[each.partition] = now_s

    def see_nothing(self, *, now_s: float) -> None:
        """The database gave no answer: begin to count anew."""
        self.processors = ()
        self._worked_at_s = dict.fromkeys(self._worked_at_s, now_s)

    def degraded(self, *, now_s: float) -> list[str]:
        """Which lanes are not worked, and what processors go on without, in sentences."""
        found = [
            self._unworked(lane, now_s - worked_at_s)
            for lane, worked_at_s in self._worked_at_s.items()
            if now_s - worked_at_s > LEFT_ALONE_S
        ]
        for each in self.processors:
            if each.state != "standing by":
                found += [f"{each.worker_id}, which works lane {each.partition}: {why}" for why in each.problems]
            found += [f"{each.worker_id} goes on without a part: {why}" for why in each.degraded]
        return found

    def _unworked(self, lane: int, seconds: float) -> str:
        which = "" if len(self._worked_at_s) == 1 else f" lane {lane}"
        coming = [each for each in self.processors if each.partition == lane and each.state == "catching up"]
        if coming:
            return (
                f"no processor works{which} yet: {coming[0].worker_id} reads the log into the read models first, "
                f"since {coming[0].since}"
            )
        return (
            f"no processor works{which}: for {seconds:.0f} s none was heard; files are taken, and worked once it is "
            "back"
        )
