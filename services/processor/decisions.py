"""What the lane does next, decided from values alone: whose turn it is, and what an attempt's end means.

The contract's fair order: the user whose last start is longest ago (never started: longest; ties: the oldest queued
upload); of that user the oldest batch; in it the upload whose newest queueing fact is oldest. `Queue` keeps just what
this needs: heads are found through heaps whose outdated entries are dropped when they surface.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from schemas.batch import ATTEMPTS_PER_QUEUEING, Batch, Upload
from schemas.errors import WorkCode
from schemas.events import (
    BatchEvent,
    Fact,
    Failure,
    LaneClaimed,
    UploadAttemptFailed,
    UploadFailed,
    UploadInterrupted,
    UploadStarted,
)

NEVER_STARTED = -1
LATE_COPY = "a late copy of an earlier start"


_Turn = tuple[int, int, str]
"""Offset of the user's last start, place of their oldest upload where they never started, and the user."""


@dataclass(slots=True)
class _QueuedBatch:
    created_offset: int
    places: dict[str, int] = field(default_factory=dict)
    heap: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True)
class _User:
    last_start: int = NEVER_STARTED
    batches: dict[str, _QueuedBatch] = field(default_factory=dict)
    by_age: list[tuple[int, str]] = field(default_factory=list)
    by_place: list[tuple[int, str, str]] = field(default_factory=list)
    turn: "_Turn | None" = None


class Queue:
    """The queued uploads of one lane, in the order they are to be worked."""

    def __init__(self) -> None:
        self._users: dict[str, _User] = {}
        self._where: dict[str, tuple[str, str]] = {}
        self._turns: list[_Turn] = []

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, upload_id: str) -> bool:
        return upload_id in self._where

    def put(self, *, user_id: str, batch_id: str, batch_created: int, upload_id: str, place: int) -> None:
        """An upload waits, at `place` (the offset of its newest queueing fact); putting it again moves it there."""
        user = self._users.setdefault(user_id, _User())
        batch = user.batches.get(batch_id)
        if batch is None:
            batch = user.batches[batch_id] = _QueuedBatch(batch_created)
            heapq.heappush(user.by_age, (batch_created, batch_id))
        self._where[upload_id] = (user_id, batch_id)
        if batch.places.get(upload_id) != place:
            batch.places[upload_id] = place
            heapq.heappush(batch.heap, (place, upload_id))
            if user.last_start == NEVER_STARTED:
                heapq.heappush(user.by_place, (place, batch_id, upload_id))
        self._take_turn(user_id, user)

    def remove(self, upload_id: str) -> None:
        """An upload waits no longer; nothing happens to one that did not."""
        where = self._where.pop(upload_id, None)
        if where is None:
            return
        user_id, batch_id = where
        user = self._users[user_id]
        batch = user.batches[batch_id]
        del batch.places[upload_id]
        if not batch.places:
            del user.batches[batch_id]
        self._take_turn(user_id, user)

    def remove_batch(self, batch_id: str, user_id: str) -> None:
        """No upload of this batch waits any longer."""
        user = self._users.get(user_id)
        if user is not None and batch_id in user.batches:
            for upload_id in list(user.batches[batch_id].places):
                self.remove(upload_id)

    def started(self, user_id: str, offset: int) -> None:
        """The user's newest start stands at this offset."""
        user = self._users.setdefault(user_id, _User())
        if offset > user.last_start:
            user.last_start = offset
            user.by_place.clear()
            self._take_turn(user_id, user)

    def next(self) -> str | None:
        """The id of the upload whose turn it is; None where nothing waits."""
        while self._turns:
            turn = self._turns[0]
            user = self._users[turn[2]]
            if user.turn == turn:
                return _head(_oldest_batch(user))
            heapq.heappop(self._turns)
        return None

    def _take_turn(self, user_id: str, user: _User) -> None:
        turn = None
        if user.batches:
            turn = (user.last_start, _oldest_place(user) if user.last_start == NEVER_STARTED else 0, user_id)
        if turn is not None and turn != user.turn:
            heapq.heappush(self._turns, turn)
        user.turn = turn


def _oldest_place(user: _User) -> int:
    while True:
        place, batch_id, upload_id = user.by_place[0]
        batch = user.batches.get(batch_id)
        if batch is not None and batch.places.get(upload_id) == place:
            return place
        heapq.heappop(user.by_place)


def _oldest_batch(user: _User) -> _QueuedBatch:
    while True:
        batch = user.batches.get(user.by_age[0][1])
        if batch is not None:
            return batch
        heapq.heappop(user.by_age)


def _head(batch: _QueuedBatch) -> str:
    while True:
        place, upload_id = batch.heap[0]
        if batch.places.get(upload_id) == place:
            return upload_id
        heapq.heappop(batch.heap)


def start(upload: Upload, *, epoch: int) -> UploadStarted:
    """The next attempt of a queued upload."""
    return UploadStarted(batch_id=upload.batch_id, upload_id=upload.id, attempt=upload.attempts + 1, epoch=epoch)


def failed(
    upload: Upload, *, attempt: int, epoch: int, code: WorkCode | str, message: str, final: bool
) -> UploadAttemptFailed | UploadFailed:
    """What the end of a failed attempt means: another one follows unless it cannot help or there was one already."""
    error = Failure(code=str(code), message=message)
    last = final or attempt - upload.attempts_before >= ATTEMPTS_PER_QUEUEING
    said = UploadFailed if last else UploadAttemptFailed
    return said(batch_id=upload.batch_id, upload_id=upload.id, attempt=attempt, epoch=epoch, error=error)


def crashed(upload: Upload, *, epoch: int) -> UploadAttemptFailed | UploadFailed:
    """An attempt that an earlier worker started and never ended: it took that worker down with it."""
    return failed(
        upload,
        attempt=upload.attempts,
        epoch=epoch,
        code=WorkCode.WORKER_CRASHED,
        message="The worker died while it worked on this file.",
        final=False,
    )


def landed_late(facts: Sequence[Fact], in_work: Mapping[str, int], *, claim: int) -> frozenset[str]:
    """Which of the attempts in work (number by upload) were begun by a start that the log had had before.

    A copy of what was sent once may land long after it, when the file was given back and the attempt's number is free
    again: it counts, and nobody works at it. `facts`: of one partition, in order, from some way back to the effective
    claim at `claim`, with all claims, starts and interruptions among them.
    """
    after = {fact.offset: fact.event.after for fact in facts if isinstance(fact.event, LaneClaimed)}
    effective: set[int] = set()
    epoch: int | None = claim
    while epoch is not None and epoch in after:
        effective.add(epoch)
        epoch = after[epoch]
    seen: set[str] = set()
    late: dict[str, bool] = {}
    for fact in facts:
        event = fact.event
        if fact.offset in effective:
            epoch = fact.offset
        elif not isinstance(event, UploadStarted | UploadInterrupted) or event.epoch != epoch:
            continue
        elif in_work.get(event.upload_id) == event.attempt:
            if isinstance(event, UploadStarted):
                late.setdefault(event.upload_id, fact.id in seen)
                seen.add(fact.id)
            else:
                late.pop(event.upload_id, None)
    return frozenset(upload_id for upload_id, begun_late in late.items() if begun_late)


def never_begun(upload: Upload, *, epoch: int) -> UploadInterrupted:
    """An attempt that a late copy of a start began: nobody worked at it."""
    return UploadInterrupted(
        batch_id=upload.batch_id, upload_id=upload.id, attempt=upload.attempts, epoch=epoch, reason=LATE_COPY
    )


def given_back(started: UploadStarted, *, reason: str) -> UploadInterrupted:
    """The attempt is given back unharmed."""
    return UploadInterrupted(
        batch_id=started.batch_id,
        upload_id=started.upload_id,
        attempt=started.attempt,
        epoch=started.epoch,
        reason=reason,
    )


def completes(batch: Batch, outcome: BatchEvent) -> bool:
    """Whether this outcome, once folded, makes the batch's completion due (its last upload in work ends)."""
    return (
        outcome.type in ("sluice.UploadSucceeded.v1", "sluice.UploadFailed.v1")
        and batch.sealed
        and not batch.ended
        and not batch.deleted
        and (batch.queued, batch.processing) == (0, 1)
    )
