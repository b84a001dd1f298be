"""The log folded once more, by the checker: each fact with what it meant, and each batch's counts after every one."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.batch import Changed
from schemas.events import Fact, decode
from schemas.records import StoredRecord
from schemas.views import BatchCounts
from tests.examples import State

Place = tuple[int, int]
"""Partition and offset."""


@dataclass(slots=True)
class Told:
    """An effective fact as a client should hear it: `counts` of its batch after it, None for a deletion."""

    offset: int
    event_id: str
    counts: dict[str, Any] | None


@dataclass(slots=True)
class FoldedLog:
    """`reasons`: of every fact why it is ignored, None for an effective one; undecodable records are in neither."""

    state: State = field(default_factory=State)
    facts: dict[Place, Fact] = field(default_factory=dict)
    reasons: dict[Place, str | None] = field(default_factory=dict)
    undecodable: list[Place] = field(default_factory=list)
    told: dict[str, list[Told]] = field(default_factory=lambda: defaultdict(list))

    def effective(self) -> Iterable[Fact]:
        return (fact for place, fact in self.facts.items() if self.reasons[place] is None)

    def called_effective(self, verdicts: Mapping[Place, str | None]) -> Iterator[Place]:
        """Where the facts stand that the services call effective, in log order; of claims the fold decides."""
        for place, fact in self.facts.items():
            claimed = self.reasons[place] if fact.batch_id is None else verdicts.get(place, "unknown")
            if claimed is None:
                yield place

    def named(self, place: Place) -> str:
        return f"the log: {self.facts[place].event.type.split('.')[1]} at {place[0]}-{place[1]}"

    def batches_of(self, user_id: str) -> list[str]:
        """All batches of a user, the deleted ones too."""
        return [batch.id for batch in self.state.batches.values() if batch.user_id == user_id]

    def counts_at(self, batch_id: str, offset: int) -> dict[str, Any] | None:
        """The batch's counts when everything up to `offset` was folded; None before it was made or once deleted."""
        before = [told for told in self.told[batch_id] if told.offset <= offset]
        return before[-1].counts if before else None


def fold_again(records: Iterable[StoredRecord]) -> FoldedLog:
    """Fold records that have no gap."""
    folded = FoldedLog()
    for record in records:
        fact = decode(record)
        outcome = folded.state.apply(fact)
        place = (fact.partition, fact.offset)
        if not isinstance(fact, Fact):
            folded.undecodable.append(place)
            continue
        folded.facts[place] = fact
        folded.reasons[place] = None if isinstance(outcome, Changed) else str(outcome)
        if isinstance(outcome, Changed) and outcome.batch is not None:
            batch = outcome.batch
            counts = None if batch.deleted else BatchCounts.of(batch).model_dump(mode="json")
            folded.told[batch.id].append(Told(fact.offset, fact.id, counts))
    return folded
