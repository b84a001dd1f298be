"""One partition as the tail sees it: how far it was read here, and how far the read models are.

The read models only ever go forward, unless their tables are lost or an older backup is put in their place: then the
processor makes them anew from the log, and until they include what they included before, they are not to be asked.
"""

from collections import deque
from dataclasses import dataclass, field

from schemas.batch import Lane


def first_waiting(order: deque[tuple[int, str]], projected: int) -> str | None:
    """The batch of the first kept fact that the read models do not include."""
    return next((batch_id for offset, batch_id in order if offset >= projected), None)


@dataclass(slots=True)
class Partition:
    """`projected`: the furthest that the read models were, as far as was heard; kept facts are complete from there.
    `includes`: where they are now."""

    lane: Lane
    projected: int
    includes: int
    kept_order: deque[tuple[int, str]] = field(default_factory=deque)
    queued_order: deque[tuple[int, str]] = field(default_factory=deque)

    @classmethod
    def at(cls, lane: Lane) -> "Partition":
        return cls(lane, lane.next_offset, lane.next_offset)

    def heard(self, next_offset: int) -> None:
        """The read models were committed up to here."""
        self.includes = max(self.includes, next_offset)
        self.projected = max(self.projected, self.includes)

    def found(self, next_offset: int, *, before: int) -> None:
        """The read models were asked, and are here; `before`: what they included when the question was sent."""
        if next_offset < before:
            self.includes = next_offset
        else:
            self.heard(next_offset)

    @property
    def complaint(self) -> str | None:
        """Why the read models are not to be asked; None where they are."""
        if self.includes >= self.projected:
            return None
        return (
            f"the read models are being made anew from the log: of partition {self.lane.partition} they include "
            f"{self.includes} records, and included {self.projected} before"
        )
