"""One batch in memory: its state, and the facts of it that the read models do not include yet.

The tail folds every fact into such a batch as it is read; history folds the past into one of its own. What a fact
means stands in `schemas.batch`; here is only what becomes of a whole batch by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, cancel_swept, evolve
from schemas.events import Fact
from schemas.position import Position


@dataclass(frozen=True, slots=True)
class Folded:
    """One fact of a batch in use, after it was folded. `batch` and the states in `outcome` are live: copy what you
    keep. `position` is the whole vector, this fact included."""

    fact: Fact
    outcome: Changed | Ignored
    batch: Batch | None
    time_ms: int
    position: Position


@dataclass(slots=True)
class Kept:
    """A fact that the read models may not include yet, with the lane's epoch and time as of it. `folded`: whether it
    was, here; `ignored`: why it then had no effect."""

    fact: Fact
    epoch: int | None
    time_ms: int
    folded: bool = False
    ignored: Ignored | None = None


@dataclass(slots=True)
class Held:
    """A batch in memory, folded up to offset `folded_to`; `batch` is None for one nobody heard of."""

    id: str
    batch: Batch | None
    uploads: dict[str, Upload]
    folded_to: int
    users: int = field(default=0, compare=False)
    created_at_s: float = field(default=0.0, compare=False)

    def fold(self, fact: Fact, *, log_id: str, epoch: int | None, time_ms: int) -> Changed | Ignored:
        """Fold the next of its facts; `epoch` and `time_ms` are the lane's as of it."""
        assert fact.offset >= self.folded_to, f"{fact.partition}-{fact.offset} was folded before"
        self.folded_to = fact.offset + 1
        lane = Lane(fact.partition, log_id, self.folded_to, epoch, time_ms)
        outcome = evolve(lane, self.batch, self.uploads.get(fact.upload_id or ""), fact)
        if isinstance(outcome, Changed):
            self._apply(outcome, at_ms=time_ms, offset=fact.offset)
        return outcome

    def renew(
        self, batch: Batch | None, uploads: dict[str, Upload], *, folded_to: int, kept: Sequence[Kept], log_id: str
    ) -> None:
        """Become what these rows are, and the kept facts after them that were folded here before: others were put in
        the place of the rows this state came from. In place: who uses the batch and its uploads, for as long as a file
        comes in, sees what becomes of them. Nobody is told of those facts again."""
        fresh = Held(self.id, batch, uploads, folded_to)
        for each in kept:
            if folded_to <= each.fact.offset < self.folded_to:
                outcome = fresh.fold(each.fact, log_id=log_id, epoch=each.epoch, time_ms=each.time_ms)
                each.ignored = outcome if isinstance(outcome, Ignored) else None
        self.folded_to = max(self.folded_to, fresh.folded_to)
        if self.batch is None or fresh.batch is None:
            self.batch = fresh.batch
        else:
            for each_field in fields(Batch):
                setattr(self.batch, each_field.name, getattr(fresh.batch, each_field.name))
        self.uploads.clear()
        self.uploads.update(fresh.uploads)

    def _apply(self, changed: Changed, *, at_ms: int, offset: int) -> None:
        self.batch = changed.batch
        if changed.upload is not None:
            self.uploads[changed.upload.id] = changed.upload
        if changed.swept == "cancelled":
            for upload in self.uploads.values():
                cancel_swept(upload, at_ms=at_ms, offset=offset)
        elif changed.swept == "deleted":
            self.uploads.clear()
