"""What callers are shown: the members of the contract, times as RFC 3339, progress as a share.

The lists of members are written out from the contract.
"""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batch import completion
from schemas.events import LogEvent
from schemas.views import BatchCounts, BatchView, UploadView, progress_of, rfc3339
from tests.examples import (
    BATCH,
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_UPLOAD,
    RESULT,
    UPLOAD,
    State,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_sealed,
    a_finished_batch,
    an_id,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
    fold,
    log_of,
)

BATCH_MEMBERS = [
    "id",
    "name",
    "user_id",
    "status",
    "sealed",
    "expected_uploads",
    "total_uploads",
    "processed_uploads",
    "successful_uploads",
    "failed_uploads",
    "cancelled_uploads",
    "progress",
    "error_message",
    "metadata",
    "created_at",
    "updated_at",
    "started_at",
    "completed_at",
    "position",
]
UPLOAD_MEMBERS = [
    "id",
    "batch_id",
    "filename",
    "content_type",
    "size_bytes",
    "sha256",
    "status",
    "attempts",
    "error",
    "result",
    "created_at",
    "updated_at",
    "started_at",
    "completed_at",
    "position",
]
THIRD_UPLOAD, FOURTH_UPLOAD = an_id("upload", 3), an_id("upload", 4)


def after(*events: LogEvent) -> State:
    state = fold(log_of(*OPENING, *events))
    assert state.ignored == []
    return state


def test_a_batch_is_shown_with_the_members_of_the_contract() -> None:
    batch = after(*a_finished_batch()).batches[BATCH]

    view = BatchView.of_log(batch, log_id=LOG_ID).model_dump()

    assert set(view) == set(BATCH_MEMBERS)
    assert view["id"] == BATCH
    assert (view["status"], view["sealed"], view["progress"]) == ("completed", True, 1)
    assert view["created_at"] == "2026-01-01T12:00:02.000Z"
    assert view["started_at"] == "2026-01-01T12:00:05.000Z"
    assert view["completed_at"] == view["updated_at"] == "2026-01-01T12:00:07.000Z"
    assert view["position"] == "1f3a9c02.0-7"


def test_an_upload_is_shown_with_the_members_of_the_contract() -> None:
    upload = after(*a_finished_batch()).uploads[UPLOAD]

    view = UploadView.of_log(upload, log_id=LOG_ID, partition=0).model_dump()

    assert set(view) == set(UPLOAD_MEMBERS)
    assert (view["status"], view["attempts"], view["error"], view["result"]) == ("completed", 1, None, RESULT)
    assert (view["created_at"], view["position"]) == ("2026-01-01T12:00:03.000Z", "1f3a9c02.0-6")


def test_a_new_thing_has_no_times_it_did_not_have() -> None:
    state = after(a_batch_created(name=None), an_upload_queued())

    batch = BatchView.of_log(state.batches[BATCH], log_id=LOG_ID)
    upload = UploadView.of_log(state.uploads[UPLOAD], log_id=LOG_ID, partition=0)

    assert (batch.name, batch.started_at, batch.completed_at, batch.error_message) == (None,) * 4
    assert (upload.started_at, upload.completed_at, upload.error, upload.result) == (None,) * 4


def test_the_error_of_an_upload_has_a_code_and_a_message() -> None:
    upload = after(a_batch_created(), an_upload_queued(), an_upload_started(), an_upload_failed()).uploads[UPLOAD]

    error = UploadView.of_log(upload, log_id=LOG_ID, partition=0).error

    assert error is not None
    assert error.model_dump() == {"code": "corrupt_media", "message": "The file is not a picture."}


def test_the_counts_of_a_batch_of_every_kind_of_upload() -> None:
    facts: list[LogEvent] = [a_batch_created()]
    facts += [an_upload_queued(upload_id) for upload_id in (UPLOAD, OTHER_UPLOAD, THIRD_UPLOAD, FOURTH_UPLOAD)]
    facts += [
        an_upload_started(),
        an_upload_succeeded(),
        an_upload_started(OTHER_UPLOAD),
        an_upload_failed(OTHER_UPLOAD),
    ]
    facts += [an_upload_started(THIRD_UPLOAD)]

    working, cancelled = after(*facts).batches[BATCH], after(*facts, a_batch_cancelled()).batches[BATCH]

    assert BatchCounts.of(working).model_dump() == {
        "id": BATCH,
        "status": "processing",
        "sealed": False,
        "total_uploads": 4,
        "processed_uploads": 2,
        "successful_uploads": 1,
        "failed_uploads": 1,
        "cancelled_uploads": 0,
        "progress": 0.5,
    }
    assert BatchCounts.of(cancelled).progress == 1
    assert (BatchCounts.of(cancelled).processed_uploads, BatchCounts.of(cancelled).cancelled_uploads) == (2, 2)


def test_an_attempt_that_failed_is_no_progress() -> None:
    state = after(a_batch_created(), an_upload_queued(), an_upload_started(), an_upload_attempt_failed())

    assert progress_of(state.batches[BATCH]) == 0


def test_an_empty_batch_is_at_nothing_until_it_ended() -> None:
    sealed: list[LogEvent] = [a_batch_created(), a_batch_sealed()]
    ended = a_batch_completed(total_uploads=0, successful_uploads=0)

    assert progress_of(after(*sealed).batches[BATCH]) == 0
    assert completion(after(*sealed).batches[BATCH], epoch=EPOCH) == ended
    assert progress_of(after(*sealed, ended).batches[BATCH]) == 1
    assert progress_of(after(a_batch_created(), a_batch_cancelled()).batches[BATCH]) == 1


def test_a_position_is_of_the_batchs_own_lane() -> None:
    batch_id = an_id("batch", 1, partition=7)

    state = fold(log_of(*OPENING, a_batch_created(batch_id), partition=7))

    assert BatchView.of_log(state.batches[batch_id], log_id=LOG_ID).position == "1f3a9c02.7-2"


@pytest.mark.parametrize(
    ("time_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_767_268_800_007, "2026-01-01T12:00:00.007Z"),
        (951_782_399_999, "2000-02-28T23:59:59.999Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_times_are_rfc_3339_in_utc_with_milliseconds(time_ms: int, text: str) -> None:
    assert rfc3339(time_ms) == text


@given(st.integers(0, 253_402_300_799_999))
def test_a_time_that_was_written_is_read_as_the_same_millisecond(time_ms: int) -> None:
    since = datetime.fromisoformat(rfc3339(time_ms)) - datetime(1970, 1, 1, tzinfo=UTC)

    assert (since.days * 86_400 + since.seconds) * 1_000 + since.microseconds // 1_000 == time_ms
