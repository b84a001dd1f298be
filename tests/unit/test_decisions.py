"""The lane's decisions against a plain model of the contract's fair order, and what the end of an attempt means."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batch import Batch, Upload
from schemas.errors import WorkCode
from schemas.events import UploadAttemptFailed, UploadFailed
from services.processor.decisions import Queue, completes, crashed, failed, landed_late, never_begun, start
from tests.examples import (
    BATCH,
    OTHER_UPLOAD,
    UPLOAD,
    a_batch_created,
    a_lane_claimed,
    a_log_created,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_started,
    fold,
    log_of,
)
from tests.examples import an_upload_succeeded as a_success

EPOCH = 1


@dataclass
class PlainQueue:
    """The contract's sentence, word by word and slowly."""

    waiting: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    last_start: dict[str, int] = field(default_factory=dict)

    def next(self) -> str | None:
        if not self.waiting:
            return None
        user = min({user for user, _, _ in self.waiting.values()}, key=self._turn)
        mine = {upload: (batch, place) for upload, (by, batch, place) in self.waiting.items() if by == user}
        oldest = min((batch for batch, _ in mine.values()), key=lambda batch: self.created[batch])
        return min((upload for upload, (batch, _) in mine.items() if batch == oldest), key=lambda u: mine[u][1])

    def _turn(self, user: str) -> tuple[int, int]:
        if user in self.last_start:
            return (self.last_start[user], 0)
        return (-1, min(place for by, _, place in self.waiting.values() if by == user))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 3), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("remove"), st.integers(0, 3), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("remove batch"), st.integers(0, 3), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("start"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=80,
)


@given(STEPS)
def test_the_queue_agrees_with_the_contracts_sentence(steps: list[tuple[str, int, int, int]]) -> None:
    queue, plain = Queue(), PlainQueue()
    for offset, (what, user_number, batch_number, upload_number) in enumerate(steps):
        user, batch = f"user{user_number}", f"user{user_number}/{batch_number}"
        upload = f"{batch}/{upload_number}"
        match what:
            case "put":
                created = plain.created.setdefault(batch, offset)
                queue.put(user_id=user, batch_id=batch, batch_created=created, upload_id=upload, place=offset)
                plain.waiting[upload] = (user, batch, offset)
            case "remove":
                queue.remove(upload)
                plain.waiting.pop(upload, None)
            case "remove batch":
                queue.remove_batch(batch, user)
                plain.waiting = {u: entry for u, entry in plain.waiting.items() if entry[1] != batch}
            case _:
                chosen = queue.next()
                assert chosen == plain.next()
                if chosen is not None:
                    by = plain.waiting.pop(chosen)[0]
                    plain.last_start[by] = offset
                    queue.remove(chosen)
                    queue.started(by, offset)
        assert queue.next() == plain.next()
        assert len(queue) == len(plain.waiting)


def a_processing_upload(*, attempts: int = 1, attempts_before: int = 0) -> Upload:
    state = fold(log_of(a_batch_created(), an_upload_queued()))
    upload = state.uploads[UPLOAD]
    upload.status, upload.attempts, upload.attempts_before = "processing", attempts, attempts_before
    return upload


@pytest.mark.parametrize(
    ("attempts", "attempts_before", "final", "said"),
    [
        (1, 0, False, UploadAttemptFailed),
        (2, 0, False, UploadFailed),
        (1, 0, True, UploadFailed),
        (3, 2, False, UploadAttemptFailed),
        (4, 2, False, UploadFailed),
    ],
)
def test_a_failed_attempt_is_followed_by_one_more_of_its_queueing_unless_it_is_final(
    attempts: int, attempts_before: int, *, final: bool, said: type
) -> None:
    upload = a_processing_upload(attempts=attempts, attempts_before=attempts_before)

    event = failed(upload, attempt=attempts, epoch=EPOCH, code=WorkCode.WORK_TIMEOUT, message="too long", final=final)

    assert type(event) is said
    assert (event.attempt, event.error.code) == (attempts, "work_timeout")


def test_an_attempt_nobody_ended_crashed_with_its_own_number() -> None:
    event = crashed(a_processing_upload(attempts=2), epoch=7)

    assert (type(event), event.attempt, event.epoch, event.error.code) == (UploadFailed, 2, 7, "worker_crashed")


def test_a_start_takes_the_next_attempt() -> None:
    upload = fold(log_of(a_batch_created(), an_upload_queued())).uploads[UPLOAD]

    assert start(upload, epoch=EPOCH).attempt == 1


def a_batch(*, sealed: bool, queued: int, processing: int) -> Batch:
    batch = fold(log_of(a_batch_created())).batches[BATCH]
    batch.sealed, batch.queued, batch.processing, batch.status = sealed, queued, processing, "processing"
    return batch


@pytest.mark.parametrize(
    ("sealed", "queued", "processing", "expected"),
    [(True, 0, 1, True), (False, 0, 1, False), (True, 1, 1, False), (True, 0, 0, False)],
)
def test_only_the_last_outcome_of_a_sealed_batch_completes_it(
    *, sealed: bool, queued: int, processing: int, expected: bool
) -> None:
    batch = a_batch(sealed=sealed, queued=queued, processing=processing)

    assert completes(batch, a_success()) is expected
    assert not completes(batch, an_upload_started())


STARTED, INTERRUPTED = an_upload_started(), an_upload_interrupted()
CLAIMED = a_lane_claimed(after=EPOCH, worker_id="worker-2")
IGNORED = a_lane_claimed(after=77, worker_id="worker-3")
FIRST = 2
"""Where the first start stands in the logs below; `COPY` is another record of it."""
COPY = object()


@pytest.mark.parametrize(
    ("events", "late"),
    [
        ([STARTED], False),
        ([STARTED, COPY], False),
        ([STARTED, INTERRUPTED, STARTED], False),
        ([STARTED, INTERRUPTED, COPY], True),
        ([STARTED, IGNORED, INTERRUPTED, COPY], True),
        ([STARTED, INTERRUPTED, COPY, IGNORED, INTERRUPTED, STARTED], False),
        ([STARTED, INTERRUPTED, COPY, CLAIMED], True),
        ([STARTED, INTERRUPTED, STARTED, COPY], False),
        ([STARTED, INTERRUPTED, STARTED, INTERRUPTED, COPY], True),
        ([STARTED, INTERRUPTED, CLAIMED, COPY], False),
        ([STARTED, INTERRUPTED, CLAIMED, COPY, an_upload_started(epoch=4)], False),
        ([STARTED, INTERRUPTED, COPY, an_upload_interrupted(epoch=77)], True),
        ([STARTED, INTERRUPTED, COPY, an_upload_interrupted(OTHER_UPLOAD)], True),
        ([STARTED, INTERRUPTED, COPY, an_upload_interrupted(attempt=2)], True),
    ],
)
def test_an_attempt_is_a_late_copys_where_the_log_had_had_its_start_before(events: list[Any], *, late: bool) -> None:
    started = [STARTED if event is COPY else event for event in events]
    newest = FIRST + events.index(CLAIMED) if CLAIMED in events else EPOCH
    facts = log_of(a_log_created(), a_lane_claimed(), *started, a_lane_claimed(after=newest))
    for place, event in enumerate(events, start=FIRST):
        if event is COPY:
            facts[place] = replace(facts[place], id=facts[FIRST].id)

    claim = facts[-1].offset
    for looked_back in (facts, facts[FIRST:]):
        assert landed_late(looked_back, {UPLOAD: 1}, claim=claim) == ({UPLOAD} if late else set())
        assert landed_late(looked_back, {OTHER_UPLOAD: 1}, claim=claim) == set()


def test_an_attempt_that_was_never_begun_is_interrupted_under_the_new_epoch() -> None:
    upload = fold(log_of(a_log_created(), a_lane_claimed(), a_batch_created(), an_upload_queued(), STARTED)).uploads[
        UPLOAD
    ]

    event = never_begun(upload, epoch=7)

    assert (event.upload_id, event.batch_id, event.attempt, event.epoch) == (UPLOAD, BATCH, 1, 7)
