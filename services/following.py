"""The users whose batches the tail must tell of completely, in memory or not.

A batch that has not ended stays in memory as long as its user is followed. One that is not there can only come to life
by a fact that names its user (workers' facts about an ended batch are ignored), so before such a fact is folded the
tail brings its batch into memory, as it was just before. Of a user with very many unfinished batches some sleep: only
their ids are known, and whatever fact names one wakes it in the same way. Where that cannot be done, the user is lost:
who follows is told, and the log is read on for all others.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from schemas.batch import Batch
from schemas.events import BatchCreated, ByUser, Fact, Undecodable
from services.observability import logger

_log = logger("tail")


class Named(NamedTuple):
    """That a fact is about a batch of a followed user; `is_first`: none can stand before it."""

    user_id: str
    batch_id: str
    is_first: bool


class FollowedUsers:
    """Who is followed, and what to call when one is lost."""

    def __init__(self) -> None:
        self._on_lost: dict[str, Callable[[str], None]] = {}
        self._asleep: dict[str, str] = {}
        """Batch → its user."""
        self._keeping: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._on_lost)

    @property
    def users(self) -> frozenset[str]:
        return frozenset(self._on_lost)

    def add(self, user_id: str, on_lost: Callable[[str], None]) -> None:
        assert user_id not in self._on_lost, f"{user_id} is followed already"
        self._on_lost[user_id] = on_lost

    def remove(self, user_id: str) -> None:
        if self._on_lost.pop(user_id, None) is not None:
            self._asleep = {batch_id: user for batch_id, user in self._asleep.items() if user != user_id}

    def let_sleep(self, user_id: str, batch_ids: Collection[str]) -> None:
        """These batches of a followed user need not be in memory until a fact names them."""
        if user_id in self._on_lost:
            self._asleep.update(dict.fromkeys(batch_ids, user_id))

    def lose(self, user_id: str, reason: str) -> None:
        """Follow this user no more, because it cannot be done."""
        if (on_lost := self._on_lost.get(user_id)) is not None:
            self.remove(user_id)
            _log.warning("user_followed_no_more", reason=reason)
            on_lost(reason)

    def named_in(self, facts: Sequence[Fact | Undecodable]) -> Iterator[Named]:
        """What followed users did, and what was done to batches that sleep, in order."""
        for fact in facts:
            if not isinstance(fact, Fact):
                continue
            if isinstance(event := fact.event, ByUser) and event.user_id in self._on_lost:
                yield Named(event.user_id, event.batch_id, is_first_of_its_batch(event))
            elif fact.batch_id is not None and (user_id := self._asleep.get(fact.batch_id)) is not None:
                yield Named(user_id, fact.batch_id, is_first=False)

    def needs(self, batch: Batch) -> bool:
        """Whether the batch must stay in memory."""
        if batch.user_id in self._keeping:
            return True
        unfinished = not (batch.ended or batch.deleted)
        return unfinished and batch.user_id in self._on_lost and batch.id not in self._asleep

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


def touched_by(user_id: str, facts: Iterable[Fact | Undecodable]) -> set[str]:
    """The batches with which this user did something, as these facts say."""
    events = (fact.event for fact in facts if isinstance(fact, Fact))
    return {event.batch_id for event in events if isinstance(event, ByUser) and event.user_id == user_id}


def is_first_of_its_batch(event: ByUser) -> bool:
    """Whether no other fact of this batch can stand before this one: it makes a batch under an id that was made for
    one request which nobody can repeat (version 7; derived ids are version 8)."""
    return isinstance(event, BatchCreated) and event.batch_id[14] == "7"
