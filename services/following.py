"""The users whose batches the tail must tell of completely, in memory or not.

A batch that has not ended stays in memory as long as its user is followed. One that is not there can only come to life
by a fact that names its user (workers' facts about an ended batch are ignored), so before such a fact is folded the
tail brings its batch into memory, as it was just before. Where that cannot be done, the user is lost: who follows is
told, and the log is read on for all others.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from schemas.batch import Batch
from schemas.events import BatchCreated, ByUser, Fact, Undecodable
from services.observability import logger

_log = logger("tail")


class FollowedUsers:
    """Who is followed, and what to call when one is lost."""

    def __init__(self) -> None:
        self._on_lost: dict[str, Callable[[str], None]] = {}
        self._keeping: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._on_lost)

    def add(self, user_id: str, on_lost: Callable[[str], None]) -> None:
        assert user_id not in self._on_lost, f"{user_id} is followed already"
        self._on_lost[user_id] = on_lost

    def remove(self, user_id: str) -> None:
        self._on_lost.pop(user_id, None)

    def lose(self, user_id: str, reason: str) -> None:
        """Follow this user no more, because it cannot be done."""
        if (on_lost := self._on_lost.pop(user_id, None)) is not None:
            _log.warning("user_followed_no_more", reason=reason)
            on_lost(reason)

    def named_in(self, facts: Sequence[Fact | Undecodable]) -> Iterator[ByUser]:
        """What followed users did, in order."""
        for fact in facts:
            event = fact.event if isinstance(fact, Fact) else None
            if isinstance(event, ByUser) and event.user_id in self._on_lost:
                yield event

    def needs(self, batch: Batch) -> bool:
        """Whether the batch must stay in memory."""
        unfinished = not (batch.ended or batch.deleted)
        return batch.user_id in self._keeping or (unfinished and batch.user_id in self._on_lost)

    @contextlib.contextmanager
    def keeping(self, user_id: str) -> Iterator[None]:
        """Let go of none of this user's batches while the block lasts."""
        self._keeping[user_id] += 1
        try:
            yield
        finally:
            self._keeping[user_id] -= 1
            if not self._keeping[user_id]:
                del self._keeping[user_id]


def is_first_of_its_batch(event: ByUser) -> bool:
    """Whether no other fact of this batch can stand before this one: it makes a batch under an id that was made for
    one request which nobody can repeat (version 7; derived ids are version 8)."""
    return isinstance(event, BatchCreated) and event.batch_id[14] == "7"
