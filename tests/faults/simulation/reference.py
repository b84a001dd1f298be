"""The log folded once more, by `evolve` alone: what everything else in the simulation is held to.

No rows, no cache, no polls and no tail: each record in order, and what was effective kept as copies.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, evolve, step
from schemas.events import Fact, LaneClaimed, LogCreated, decode
from schemas.records import StoredRecord
from services.folding import Held


@dataclass(frozen=True, slots=True)
class Effective:
    """An effective fact, and the batch and upload as copies after it."""

    fact: Fact
    batch: Batch | None
    upload: Upload | None


@dataclass
class Folding:
    """A log, folded from its first record; `effective` is in order within each partition."""

    log_id: str = ""
    lanes: dict[int, Lane] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    effective: list[Effective] = field(default_factory=list)
    ignored: list[tuple[Fact, Ignored]] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    epochs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """The effective ones, by partition."""

    def of(self, *kinds: type[Any]) -> Iterator[tuple[Any, Effective]]:
        """The effective facts of some kinds, with what they say."""
        for each in self.effective:
            if isinstance(each.fact.event, kinds):
                yield each.fact.event, each

    def lane(self, partition: int) -> Lane:
        return self.lanes.setdefault(partition, Lane(partition))

    def batches(self) -> Iterator[tuple[Batch, dict[str, Upload]]]:
        for held in self.held.values():
            if held.batch is not None:
                yield held.batch, held.uploads


def fold(records: Sequence[StoredRecord]) -> Folding:
    """Fold a log, its records in order within each partition."""
    folding = Folding()
    for record in records:
        fold_one(folding, record)
    return folding


def fold_one(folding: Folding, record: StoredRecord) -> None:
    """Fold the next record."""
    fact, lane = decode(record), folding.lane(record.partition)
    step(lane, fact.offset, fact.timestamp_ms)
    if not isinstance(fact, Fact):
        folding.unreadable.append(fact.offset)
        return
    if isinstance(fact.event, LogCreated | LaneClaimed) or fact.batch_id is None:
        outcome = evolve(lane, None, None, fact)
        if isinstance(fact.event, LaneClaimed) and isinstance(outcome, Changed):
            folding.epochs[fact.partition].append(fact.offset)
    else:
        held = folding.held.setdefault(fact.batch_id, Held(fact.batch_id, None, {}, folded_to=0))
        outcome = held.fold(fact, log_id=lane.log_id, epoch=lane.epoch, time_ms=lane.time_ms)
    folding.log_id = lane.log_id
    if isinstance(outcome, Ignored):
        folding.ignored.append((fact, outcome))
        return
    batch, upload = outcome.batch, outcome.upload
    folding.effective.append(
        Effective(fact, replace(batch) if batch else None, replace(upload) if upload is not None else None)
    )
