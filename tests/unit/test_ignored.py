"""Every reason to ignore a fact, for every event it can meet, and which reason is named where several hold.

Each case is a log that brings the reason about and the fact that is ignored. The tables are complete by construction:
a reason without a case and an event without one fail.
"""

import copy
import dataclasses
from typing import NamedTuple

import pytest

from schemas.batch import Batch, Ignored, Lane
from schemas.events import Erased, LogEvent, type_of
from tests.examples import (
    BATCH,
    EPOCH,
    LIMITS,
    OPENING,
    OTHER_BATCH,
    OTHER_UPLOAD,
    OTHER_USER,
    UPLOAD,
    State,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_finished_batch,
    a_lane_claimed,
    a_log_created,
    a_request,
    a_sha256,
    an_erased,
    an_id,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    fold,
    log_of,
)


class Case(NamedTuple):
    """A fact that is ignored for a reason, after a log (which `OPENING` precedes)."""

    reason: Ignored
    before: list[LogEvent]
    fact: LogEvent | Erased


OPEN: list[LogEvent] = [a_batch_created(), an_upload_queued()]
WORKED: list[LogEvent] = [*OPEN, an_upload_started()]
FAILED: list[LogEvent] = [*WORKED, an_upload_failed()]
CANCELLED: list[LogEvent] = [*WORKED, a_batch_cancelled()]
DELETED: list[LogEvent] = [*WORKED, a_batch_deleted()]
COMPLETED: list[LogEvent] = a_finished_batch()
ALL_FAILED: list[LogEvent] = [
    *FAILED,
    a_batch_sealed(),
    a_batch_completed(status="failed", successful_uploads=0, failed_uploads=1),
]
KEYED: list[LogEvent] = [a_batch_created(request=a_request()), an_upload_queued(request=a_request())]
STALE = 0
SMALL = LIMITS.model_copy(update={"files_max": 2, "file_bytes_max": 100, "batch_bytes_max": 150})


def small(size_bytes: int, number: int) -> LogEvent:
    return an_upload_queued(an_id("small", number), size_bytes=size_bytes)


def another_body() -> LogEvent:
    return an_upload_queued(sha256=a_sha256("other bytes"))


def of_the_lane(attempt: int = 1, epoch: int = EPOCH, upload_id: str = UPLOAD, batch_id: str = BATCH) -> list[LogEvent]:
    """One of each of the facts about an attempt."""
    makers = (
        an_upload_started,
        an_upload_interrupted,
        an_upload_attempt_failed,
        an_upload_succeeded,
        an_upload_failed,
    )
    return [make(upload_id, batch_id, attempt=attempt, epoch=epoch) for make in makers]


def by_another_user() -> list[LogEvent]:
    return [
        a_batch_created(user_id=OTHER_USER),
        an_upload_queued(user_id=OTHER_USER),
        a_batch_sealed(user_id=OTHER_USER),
        a_batch_cancelled(user_id=OTHER_USER),
        a_batch_deleted(user_id=OTHER_USER),
        an_upload_retried(user_id=OTHER_USER),
    ]


def about_uploads_and_batches() -> list[LogEvent]:
    """One of each api fact that needs a batch."""
    return [an_upload_queued(), a_batch_sealed(), a_batch_cancelled(), a_batch_deleted(), an_upload_retried()]


CASES = [
    Case(Ignored.MISPLACED, [], a_log_created()),
    Case(Ignored.STALE_EPOCH, [], a_lane_claimed(after=None)),
    Case(Ignored.STALE_EPOCH, [], a_lane_claimed(after=0)),
    Case(Ignored.STALE_EPOCH, [], a_lane_claimed(after=2)),
    # repetition
    Case(Ignored.REPETITION, OPEN, a_batch_created()),
    Case(Ignored.REPETITION, KEYED, a_batch_created(request=a_request())),
    Case(Ignored.REPETITION, [*KEYED, a_batch_deleted()], a_batch_created(request=a_request())),
    Case(Ignored.REPETITION, OPEN, an_upload_queued()),
    Case(Ignored.REPETITION, OPEN, an_upload_queued(blob="another/copy")),
    Case(Ignored.REPETITION, FAILED, an_upload_queued()),
    Case(Ignored.REPETITION, CANCELLED, an_upload_queued()),
    Case(Ignored.REPETITION, COMPLETED, an_upload_queued()),
    Case(Ignored.REPETITION, [*KEYED, a_batch_sealed()], an_upload_queued(request=a_request())),
    Case(
        Ignored.REPETITION,
        [*KEYED, an_upload_started(), an_upload_failed(), an_upload_retried(request=a_request("retry"))],
        an_upload_queued(request=a_request()),
    ),
    Case(Ignored.REPETITION, [*OPEN, a_batch_sealed()], a_batch_sealed()),
    Case(Ignored.REPETITION, COMPLETED, a_batch_sealed()),
    Case(Ignored.REPETITION, [a_batch_created(expected_uploads=0)], a_batch_sealed()),
    Case(Ignored.REPETITION, CANCELLED, a_batch_cancelled()),
    Case(Ignored.REPETITION, DELETED, a_batch_deleted()),
    Case(Ignored.REPETITION, [*FAILED, an_upload_retried(request=a_request())], an_upload_retried(request=a_request())),
    Case(
        Ignored.REPETITION,
        [
            *FAILED,
            an_upload_retried(request=a_request()),
            an_upload_started(attempt=2),
            an_upload_failed(attempt=2),
        ],
        an_upload_retried(queueing=3, request=a_request()),
    ),
    # another request under the same key or name
    Case(Ignored.IDEMPOTENCY_KEY_REUSED, KEYED, a_batch_created(request=a_request(body="other"))),
    Case(Ignored.IDEMPOTENCY_KEY_REUSED, KEYED, an_upload_queued(request=a_request(body="other"))),
    Case(Ignored.IDEMPOTENCY_KEY_REUSED, KEYED, an_upload_queued(OTHER_UPLOAD, request=a_request(body="other"))),
    Case(Ignored.IDEMPOTENCY_KEY_REUSED, KEYED[:1], an_upload_queued(request=a_request(body="other"))),
    Case(
        Ignored.IDEMPOTENCY_KEY_REUSED,
        KEYED,
        an_upload_queued(sha256=a_sha256("other bytes"), request=a_request()),
    ),
    Case(Ignored.IDEMPOTENCY_KEY_REUSED, KEYED, a_batch_sealed(request=a_request(body="other"))),
    Case(
        Ignored.IDEMPOTENCY_KEY_REUSED,
        [*FAILED, an_upload_retried(request=a_request())],
        an_upload_retried(request=a_request(body="other")),
    ),
    Case(Ignored.FILENAME_TAKEN, OPEN, another_body()),
    Case(Ignored.FILENAME_TAKEN, CANCELLED, another_body()),
    # not there, not theirs
    *(Case(Ignored.ERASED, OPEN, an_erased(event=name)) for name in ("BatchCreated", "BatchSealed")),
    Case(Ignored.ERASED, OPEN, an_erased(upload_id=UPLOAD, event="UploadQueued")),
    *(Case(Ignored.UNKNOWN, [], fact) for fact in about_uploads_and_batches()),
    *(Case(Ignored.UNKNOWN, [], fact) for fact in [*of_the_lane(), a_batch_completed()]),
    *(Case(Ignored.UNKNOWN, OPEN, fact) for fact in of_the_lane(upload_id=OTHER_UPLOAD)),
    *(Case(Ignored.UNKNOWN, [*OPEN, a_batch_created(OTHER_BATCH)], fact) for fact in of_the_lane(batch_id=OTHER_BATCH)),
    Case(Ignored.UNKNOWN, OPEN, an_upload_retried(OTHER_UPLOAD)),
    Case(Ignored.UNKNOWN, [*FAILED, a_batch_created(OTHER_BATCH)], an_upload_retried(batch_id=OTHER_BATCH)),
    *(Case(Ignored.FOREIGN, FAILED, fact) for fact in by_another_user()),
    *(Case(Ignored.DELETED, DELETED, fact) for fact in about_uploads_and_batches() if "Deleted" not in fact.type),
    *(Case(Ignored.DELETED, DELETED, fact) for fact in [*of_the_lane(), a_batch_completed()]),
    # ended, sealed, limits
    Case(Ignored.BATCH_ENDED, CANCELLED, an_upload_queued(OTHER_UPLOAD)),
    Case(Ignored.BATCH_ENDED, COMPLETED, an_upload_queued(OTHER_UPLOAD)),
    Case(Ignored.BATCH_ENDED, CANCELLED, a_batch_sealed()),
    Case(Ignored.BATCH_ENDED, COMPLETED, a_batch_cancelled()),
    Case(Ignored.BATCH_ENDED, [*FAILED, a_batch_cancelled()], an_upload_retried()),
    Case(Ignored.BATCH_ENDED, COMPLETED, a_batch_completed()),
    Case(Ignored.BATCH_ENDED, CANCELLED, a_batch_completed()),
    *(Case(Ignored.BATCH_ENDED, CANCELLED, fact) for fact in of_the_lane()),
    *(Case(Ignored.BATCH_ENDED, COMPLETED, fact) for fact in of_the_lane()),
    *(Case(Ignored.UPLOAD_ENDED, FAILED, fact) for fact in of_the_lane()),
    *(Case(Ignored.UPLOAD_ENDED, [*WORKED, an_upload_succeeded()], fact) for fact in of_the_lane(attempt=2)),
    Case(Ignored.BATCH_SEALED, [*OPEN, a_batch_sealed()], an_upload_queued(OTHER_UPLOAD)),
    Case(Ignored.BATCH_SEALED, [a_batch_created(expected_uploads=0)], an_upload_queued()),
    Case(
        Ignored.BATCH_SEALED, [a_batch_created(expected_uploads=1), an_upload_queued()], an_upload_queued(OTHER_UPLOAD)
    ),
    Case(Ignored.FILE_TOO_LARGE, [a_batch_created(limits=SMALL)], small(101, 1)),
    Case(Ignored.TOO_MANY_FILES, [a_batch_created(limits=SMALL), small(1, 1), small(1, 2)], small(1, 3)),
    Case(Ignored.BATCH_TOO_LARGE, [a_batch_created(limits=SMALL), small(100, 1)], small(51, 2)),
    # work out of turn
    Case(Ignored.NOT_FAILED, OPEN, an_upload_retried()),
    Case(Ignored.NOT_FAILED, WORKED, an_upload_retried()),
    Case(Ignored.NOT_FAILED, COMPLETED, an_upload_retried()),
    Case(Ignored.NOT_FAILED, FAILED, an_upload_retried(queueing=3)),
    Case(Ignored.NOT_FAILED, [*FAILED, an_upload_retried()], an_upload_retried()),
    *(Case(Ignored.STALE_EPOCH, WORKED, fact) for fact in of_the_lane(epoch=STALE)),
    *(Case(Ignored.STALE_EPOCH, WORKED, fact) for fact in of_the_lane(epoch=EPOCH + 1)),
    *(
        Case(Ignored.STALE_EPOCH, [*WORKED, a_lane_claimed(after=EPOCH)], fact)
        for fact in [*of_the_lane(), a_batch_completed()]
    ),
    Case(Ignored.STALE_EPOCH, [*WORKED, an_upload_succeeded(), a_batch_sealed()], a_batch_completed(epoch=STALE)),
    Case(Ignored.UNEXPECTED_ATTEMPT, OPEN, an_upload_started(attempt=2)),
    Case(Ignored.UNEXPECTED_ATTEMPT, WORKED, an_upload_started(attempt=1)),
    Case(Ignored.UNEXPECTED_ATTEMPT, WORKED, an_upload_started(attempt=2)),
    *(Case(Ignored.UNEXPECTED_ATTEMPT, OPEN, fact) for fact in of_the_lane()[1:]),
    *(Case(Ignored.UNEXPECTED_ATTEMPT, WORKED, fact) for fact in of_the_lane(attempt=2)[1:]),
    Case(Ignored.UNEXPECTED_ATTEMPT, [*FAILED, an_upload_retried()], an_upload_started(attempt=1)),
    Case(Ignored.COUNTS_DISAGREE, [*WORKED, an_upload_succeeded()], a_batch_completed()),  # not sealed
    Case(Ignored.COUNTS_DISAGREE, [*WORKED, a_batch_sealed()], a_batch_completed()),
    Case(
        Ignored.COUNTS_DISAGREE, [*WORKED, an_upload_succeeded(), a_batch_sealed()], a_batch_completed(status="failed")
    ),
    Case(
        Ignored.COUNTS_DISAGREE, [*WORKED, an_upload_succeeded(), a_batch_sealed()], a_batch_completed(total_uploads=2)
    ),
    Case(
        Ignored.COUNTS_DISAGREE,
        [*WORKED, an_upload_succeeded(), a_batch_sealed()],
        a_batch_completed(successful_uploads=0, failed_uploads=1),
    ),
]

SEVERAL = [
    # repetition before all else
    Case(Ignored.REPETITION, [*OPEN, a_batch_sealed()], an_upload_queued()),
    Case(Ignored.IDEMPOTENCY_KEY_REUSED, [*KEYED, a_batch_sealed()], an_upload_queued(request=a_request(body="other"))),
    Case(Ignored.FILENAME_TAKEN, [*OPEN, a_batch_sealed()], another_body()),
    Case(Ignored.REPETITION, [*KEYED, a_batch_cancelled()], an_upload_queued(request=a_request())),
    Case(
        Ignored.REPETITION,
        [*FAILED, an_upload_retried(request=a_request()), a_batch_cancelled()],
        an_upload_retried(request=a_request()),
    ),
    # another user's before deleted: nobody learns what others deleted
    *(Case(Ignored.FOREIGN, DELETED, fact) for fact in by_another_user()),
    # deleted before ended and sealed
    Case(Ignored.DELETED, [*CANCELLED, a_batch_deleted()], an_upload_queued(OTHER_UPLOAD)),
    Case(Ignored.DELETED, [*COMPLETED, a_batch_deleted()], a_batch_sealed()),
    Case(Ignored.DELETED, [*COMPLETED, a_batch_deleted()], an_upload_retried()),
    Case(Ignored.DELETED, [*CANCELLED, a_batch_deleted()], an_upload_started(epoch=STALE)),
    # unknown before ended
    Case(Ignored.UNKNOWN, CANCELLED, an_upload_retried(OTHER_UPLOAD)),
    Case(Ignored.UNKNOWN, CANCELLED, an_upload_started(OTHER_UPLOAD, epoch=STALE)),
    # ended before sealed, sealed before limits, file before batch
    Case(Ignored.BATCH_ENDED, [*OPEN, a_batch_sealed(), a_batch_cancelled()], an_upload_queued(OTHER_UPLOAD)),
    Case(Ignored.BATCH_SEALED, [a_batch_created(limits=SMALL), a_batch_sealed()], small(101, 1)),
    Case(Ignored.FILE_TOO_LARGE, [a_batch_created(limits=SMALL), small(1, 1), small(1, 2)], small(101, 3)),
    Case(Ignored.TOO_MANY_FILES, [a_batch_created(limits=SMALL), small(75, 1), small(75, 2)], small(1, 3)),
    # ended before stale, stale before unexpected, unexpected and stale before counts
    Case(Ignored.BATCH_ENDED, CANCELLED, an_upload_succeeded(epoch=STALE)),
    Case(Ignored.UPLOAD_ENDED, FAILED, an_upload_succeeded(epoch=STALE, attempt=9)),
    Case(Ignored.STALE_EPOCH, WORKED, an_upload_succeeded(epoch=STALE, attempt=9)),
    Case(Ignored.BATCH_ENDED, COMPLETED, a_batch_completed(epoch=STALE)),
    Case(Ignored.STALE_EPOCH, OPEN, a_batch_completed(epoch=STALE)),
]


def named(case: Case) -> str:
    return f"{case.fact.type.split('.')[1]}-{case.reason}"


def content(state: State) -> tuple[dict[int, Lane], dict[str, Batch], object]:
    """All of the state a fact may change, the place in the log aside (which every record moves)."""
    lanes = {partition: dataclasses.replace(lane, next_offset=0, time_ms=0) for partition, lane in state.lanes.items()}
    return lanes, state.batches, state.uploads


@pytest.mark.parametrize("case", CASES + SEVERAL, ids=named)
def test_an_ignored_fact_names_its_reason_and_changes_nothing(case: Case) -> None:
    log = log_of(*OPENING, *case.before, case.fact)
    before = fold(log[:-1])
    assert before.ignored == [], "the log that leads to the case must be effective throughout"
    kept = copy.deepcopy(before)

    outcome = before.apply(log[-1])

    assert outcome is case.reason
    assert content(before) == content(kept)


@pytest.mark.parametrize("reason", Ignored)
def test_every_reason_has_a_case(reason: Ignored) -> None:
    assert reason in {case.reason for case in CASES}


API = {Ignored.UNKNOWN, Ignored.FOREIGN, Ignored.DELETED, Ignored.ERASED}
WORK = {
    Ignored.UNKNOWN,
    Ignored.DELETED,
    Ignored.ERASED,
    Ignored.BATCH_ENDED,
    Ignored.UPLOAD_ENDED,
    Ignored.STALE_EPOCH,
    Ignored.UNEXPECTED_ATTEMPT,
}
REASONS: dict[str, set[Ignored]] = {
    "LogCreated": {Ignored.MISPLACED},
    "LaneClaimed": {Ignored.STALE_EPOCH},
    "BatchCreated": {Ignored.REPETITION, Ignored.FOREIGN, Ignored.IDEMPOTENCY_KEY_REUSED, Ignored.ERASED},
    "UploadQueued": API
    | {
        Ignored.REPETITION,
        Ignored.IDEMPOTENCY_KEY_REUSED,
        Ignored.FILENAME_TAKEN,
        Ignored.BATCH_ENDED,
        Ignored.BATCH_SEALED,
        Ignored.FILE_TOO_LARGE,
        Ignored.TOO_MANY_FILES,
        Ignored.BATCH_TOO_LARGE,
    },
    "BatchSealed": API | {Ignored.REPETITION, Ignored.IDEMPOTENCY_KEY_REUSED, Ignored.BATCH_ENDED},
    "BatchCancelled": API | {Ignored.REPETITION, Ignored.BATCH_ENDED},
    "BatchDeleted": API - {Ignored.DELETED} | {Ignored.REPETITION},
    "UploadRetried": API
    | {Ignored.REPETITION, Ignored.IDEMPOTENCY_KEY_REUSED, Ignored.BATCH_ENDED, Ignored.NOT_FAILED},
    "UploadStarted": WORK,
    "UploadInterrupted": WORK,
    "UploadAttemptFailed": WORK,
    "UploadSucceeded": WORK,
    "UploadFailed": WORK,
    "BatchCompleted": {
        Ignored.UNKNOWN,
        Ignored.DELETED,
        Ignored.ERASED,
        Ignored.BATCH_ENDED,
        Ignored.STALE_EPOCH,
        Ignored.COUNTS_DISAGREE,
    },
}
"""Why each event can be ignored."""
ERASED_ONES = [
    an_erased(upload_id=UPLOAD, event=name) for name, reasons in REASONS.items() if Ignored.ERASED in reasons
]


@pytest.mark.parametrize("erased", ERASED_ONES, ids=lambda erased: erased.type)
def test_an_erased_fact_of_any_type_is_ignored(erased: Erased) -> None:
    assert fold(log_of(*OPENING, *WORKED, erased)).last is Ignored.ERASED


@pytest.mark.parametrize("name", REASONS)
def test_every_event_has_a_case_of_each_of_its_reasons(name: str) -> None:
    tried = {case.reason for case in CASES if case.fact.type == f"sluice.{name}.v1"}

    assert tried | {Ignored.ERASED} == REASONS[name] | {Ignored.ERASED}


def test_the_table_of_reasons_names_every_event() -> None:
    assert {f"sluice.{name}.v1" for name in REASONS} == set(type_of)
