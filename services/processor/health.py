"""How the lane is: what keeps it from going on, what it goes on without, and whether what should move does move.

`problems` is what /readyz says; `condition` is what presence tells everybody, once a second, and the look at what
moves. Parts say themselves that they are lost or back; that one hangs without a word shows by its standing still.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from schemas.errors import PartError
from services.observability import logger
from services.processor.presence import Condition, InWork
from services.standstill import Standstill

if TYPE_CHECKING:
    from services.processor.lane import LaneWorker
    from services.processor.lock import LaneLock
    from services.processor.projection import Projection

_log = logger("processor")

STILL_MAX_S = 15.0
WORK_GRACE_S = 30.0


class Health:
    """Of one processor; the lane's parts are put in as they come to be."""

    def __init__(self) -> None:
        self.degraded: Sequence[str] = ()
        self.parts: dict[str, str] = {}
        self.lane_lock: LaneLock | None = None
        self.projection: Projection | None = None
        self.hand: LaneWorker | None = None
        self.work_timeout_s = 0.0
        self.reads = 0
        self.on_change: Callable[[], None] = lambda: None
        self._state = "starting"
        self._still: list[str] = []
        self._reading, self._writing, self._working = Standstill(), Standstill(), Standstill()

    @property
    def state(self) -> str:
        """`starting`, `standing by`, `catching up` or `working`."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self.on_change()

    def problems(self) -> list[str]:
        """Why the lane does not go on; empty where it does."""
        starting = [f"the lane is {self.state}"] if self.state == "starting" else []
        return [*starting, *self._of_the_lock(), *self.parts.values(), *self._still]

    def _of_the_lock(self) -> list[str]:
        lock = self.lane_lock
        if lock is None or lock.held:
            return []
        if self.state == "standing by":  # that another holds it is what one stands by for
            return [f"the lane's lock cannot be asked for: {lock.problem}"] if lock.problem else []
        return [f"the lane's lock is lost: {lock.problem or 'another holds it'}"]

    @property
    def holds_lane(self) -> bool:
        """Whether this processor holds its lane's lock, as far as it knows."""
        return self.lane_lock is not None and self.lane_lock.held

    def lost(self, part: str, reason: PartError | str) -> None:
        if part not in self.parts:
            _log.warning("part_lost", part=part, reason=str(reason))
        self.parts[part] = reason.told if isinstance(reason, PartError) else reason

    def back(self, part: str) -> None:
        if self.parts.pop(part, None) is not None:
            _log.info("part_back", part=part)

    def condition(self) -> Condition:
        """How the processor is now; looks at what should move."""
        before, self._still = self._still, self._what_stands_still(time.monotonic())
        for sentence in self._still if not before else ():
            _log.warning("lane_stands_still", reason=sentence)
        work = self.hand.doing if self.hand is not None else None
        in_work = None
        if work is not None and work.started is not None:
            in_work = InWork(work.started.upload_id, work.started.attempt, time.monotonic() - work.since_s)
        return Condition(
            state=self.state,
            epoch=None if self.hand is None else self.hand.epoch,
            in_work=in_work,
            degraded=self.degraded,
            problems=self.problems(),
        )

    def _what_stands_still(self, now_s: float) -> list[str]:
        projection, hand = self.projection, self.hand
        if self.state != "working" or projection is None or hand is None:
            return []
        found = []
        if (still_s := self._reading.look(self.reads, waiting=True, now_s=now_s)) > STILL_MAX_S:
            found.append(f"nobody has asked the log for {still_s:.0f} s")
        if (still_s := self._writing.look(projection.committed, waiting=projection.dirty, now_s=now_s)) > STILL_MAX_S:
            found.append(f"the read models have not taken what was read for {still_s:.0f} s")
        still_s = self._working.look((hand.steps, hand.doing), waiting=hand.has_to_do, now_s=now_s)
        working = hand.doing is not None and hand.doing.started is not None
        if still_s > (self.work_timeout_s + WORK_GRACE_S if working else STILL_MAX_S):
            at = "one file" if working else "the log, which does not take its facts" if hand.doing else "nothing"
            found.append(f"the lane's hand has been at {at} for {still_s:.0f} s, and {hand.queued} files wait")
        return found
