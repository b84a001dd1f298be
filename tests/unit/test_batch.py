"""What the facts mean: the states of a batch and its uploads, told as stories of a log.

Why facts are ignored stands in test_ignored, what holds for any log at all in test_batch_properties.
"""

import copy

import pytest

from schemas.batch import Batch, Changed, Lane, Upload, cancel_swept, completion, evolve, step
from schemas.events import LogEvent
from tests.examples import (
    BATCH,
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_BATCH,
    OTHER_UPLOAD,
    RESULT,
    START_MS,
    STEP_MS,
    UPLOAD,
    State,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_finished_batch,
    a_lane_claimed,
    a_request,
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

OPEN: list[LogEvent] = [a_batch_created(), an_upload_queued()]
WORKED: list[LogEvent] = [*OPEN, an_upload_started()]
THIRD_UPLOAD = an_id("upload", 3)


def after(*events: LogEvent) -> State:
    """The state after `OPENING` and these events, all of which must be effective."""
    state = fold(log_of(*OPENING, *events))
    assert state.ignored == []
    return state


def time_of(number: int) -> int:
    """When the event with this number (the first after `OPENING` is 0) was appended."""
    return START_MS + (len(OPENING) + number) * STEP_MS


def offset_of(number: int) -> int:
    return len(OPENING) + number


def counts(batch: Batch) -> dict[str, int]:
    names = ("queued", "processing", "completed", "failed", "cancelled")
    return {name: getattr(batch, name) for name in names if getattr(batch, name)}


def test_a_lane_knows_its_log_and_the_newest_effective_claim() -> None:
    state = after(a_lane_claimed(after=EPOCH, worker_id="worker-2"))

    assert state.lane == Lane(0, log_id=LOG_ID, next_offset=3, epoch=2, time_ms=START_MS + 2 * STEP_MS)


def test_of_two_workers_that_supersede_the_same_claim_the_first_in_the_log_has_the_lane() -> None:
    state = fold(log_of(*OPENING, a_lane_claimed(after=EPOCH), a_lane_claimed(after=EPOCH)))

    assert state.lane.epoch == 2


def test_a_new_batch_is_pending_and_open() -> None:
    created = a_batch_created(metadata={"trip": "Iceland"}, expected_uploads=2, request=a_request())

    batch = after(created).batches[BATCH]

    assert (batch.status, batch.sealed, batch.total, batch.ended) == ("pending", False, 0, False)
    assert (batch.user_id, batch.name, batch.metadata) == ("ada", "holiday", {"trip": "Iceland"})
    assert (batch.files_max, batch.batch_bytes_max, batch.file_bytes_max) == (1_000, 10_000_000_000, 100_000_000)
    assert (batch.request_key_hash, batch.request_body_hash) == (a_request().key_hash, a_request().body_hash)
    assert (batch.created_ms, batch.updated_ms, batch.last_queued_ms) == (time_of(0),) * 3
    assert (batch.created_offset, batch.offset) == (offset_of(0),) * 2
    assert (batch.started_ms, batch.completed_ms, batch.error_message) == (None, None, None)


def test_a_queued_upload_keeps_what_was_said_of_it() -> None:
    queued = an_upload_queued(request=a_request())

    state = after(a_batch_created(), queued)

    upload, batch = state.uploads[UPLOAD], state.batches[BATCH]
    for name in ("filename", "content_type", "size_bytes", "sha256", "blob", "batch_id"):
        assert getattr(upload, name) == getattr(queued, name)
    assert (upload.status, upload.attempts, upload.queueing) == ("queued", 0, 1)
    assert (upload.place, upload.created_offset, upload.offset) == (offset_of(1),) * 3
    assert (upload.created_ms, upload.updated_ms) == (time_of(1),) * 2
    assert (batch.status, counts(batch), batch.size_bytes) == ("pending", {"queued": 1}, 1_000)
    assert (batch.offset, batch.updated_ms, batch.last_queued_ms) == (offset_of(1), time_of(1), time_of(1))
    assert batch.requests == {a_request().key_hash: a_request().body_hash}


def test_an_upload_that_succeeds_takes_its_batch_from_pending_to_completed() -> None:
    facts = [*WORKED, a_batch_sealed(), an_upload_succeeded(), a_batch_completed()]
    stories = [after(*facts[: length + 1]) for length in range(len(facts))]

    assert [story.batches[BATCH].status for story in stories] == [
        *("pending", "pending", "processing", "processing", "processing", "completed")
    ]
    assert [story.uploads[UPLOAD].status for story in stories[1:]] == [
        *("queued", "processing", "processing", "completed", "completed")
    ]
    batch, upload = stories[-1].batches[BATCH], stories[-1].uploads[UPLOAD]
    assert (batch.started_ms, batch.completed_ms, batch.updated_ms) == (time_of(2), time_of(5), time_of(5))
    assert (upload.started_ms, upload.completed_ms, upload.updated_ms) == (time_of(2), time_of(4), time_of(4))
    assert (upload.attempts, upload.result, upload.error_code) == (1, RESULT, None)
    assert (batch.offset, upload.offset) == (offset_of(5), offset_of(4))


def test_times_are_the_running_maximum_of_the_brokers() -> None:
    log = [
        *log_of(*OPENING, *OPEN),
        *log_of(an_upload_started(), first_offset=4, first_ms=START_MS - 60_000),
        *log_of(an_upload_succeeded(), first_offset=5, first_ms=START_MS + 60_000),
    ]

    state = fold(log)

    assert state.uploads[UPLOAD].started_ms == START_MS + 3 * STEP_MS
    assert state.uploads[UPLOAD].completed_ms == START_MS + 60_000
    assert state.lane.time_ms == START_MS + 60_000


def test_the_record_that_does_not_follow_is_not_folded() -> None:
    with pytest.raises(AssertionError, match="record 0-3 does not follow 1"):
        fold(log_of(*OPENING) + log_of(a_batch_created(), first_offset=3))


def test_an_attempt_that_fails_sends_the_upload_to_the_end_of_the_queue() -> None:
    state = after(
        *WORKED, an_upload_queued(OTHER_UPLOAD), an_upload_attempt_failed(code="work_timeout", message="Late.")
    )

    upload, batch = state.uploads[UPLOAD], state.batches[BATCH]
    assert (upload.status, upload.attempts, upload.attempts_of_queueing) == ("queued", 1, 1)
    assert (upload.error_code, upload.error_message) == ("work_timeout", "Late.")
    assert upload.place == offset_of(4) > state.uploads[OTHER_UPLOAD].place
    assert (batch.status, counts(batch)) == ("processing", {"queued": 2})


def test_an_interrupted_upload_keeps_its_place_and_its_attempts_number_is_used_again() -> None:
    interrupted = after(*WORKED, an_upload_queued(OTHER_UPLOAD), an_upload_interrupted())
    again = after(*WORKED, an_upload_queued(OTHER_UPLOAD), an_upload_interrupted(), an_upload_started(attempt=1))

    upload = interrupted.uploads[UPLOAD]
    assert (upload.status, upload.attempts, upload.place) == ("queued", 0, offset_of(1))
    assert interrupted.batches[BATCH].status == "processing"
    assert again.uploads[UPLOAD].attempts == 1
    assert again.batches[BATCH].started_ms == time_of(2)


def test_an_interruption_after_a_failed_attempt_keeps_the_place_that_attempt_gave() -> None:
    state = after(*WORKED, an_upload_attempt_failed(), an_upload_started(attempt=2), an_upload_interrupted(attempt=2))

    assert state.uploads[UPLOAD].attempts == 1
    assert state.uploads[UPLOAD].place == offset_of(3)


def test_a_success_at_the_second_attempt_leaves_no_error() -> None:
    state = after(*WORKED, an_upload_attempt_failed(), an_upload_started(attempt=2), an_upload_succeeded(attempt=2))

    upload = state.uploads[UPLOAD]
    assert (upload.status, upload.attempts, upload.error_code, upload.error_message) == ("completed", 2, None, None)


def test_an_upload_that_fails_for_good_says_why_and_its_batch_goes_on() -> None:
    state = after(*WORKED, an_upload_queued(OTHER_UPLOAD), an_upload_failed(), an_upload_started(OTHER_UPLOAD))

    upload, batch = state.uploads[UPLOAD], state.batches[BATCH]
    assert (upload.status, upload.error_code, upload.completed_ms) == ("failed", "corrupt_media", time_of(4))
    assert (batch.status, counts(batch)) == ("processing", {"processing": 1, "failed": 1})


def test_a_new_worker_may_judge_the_attempt_of_the_one_before() -> None:
    state = after(*WORKED, a_lane_claimed(after=EPOCH), an_upload_attempt_failed(epoch=offset_of(3)))

    assert state.uploads[UPLOAD].status == "queued"


def test_a_batch_of_which_nothing_succeeded_has_failed() -> None:
    facts = [*WORKED, an_upload_queued(OTHER_UPLOAD), a_batch_sealed(), an_upload_failed()]
    facts += [an_upload_started(OTHER_UPLOAD), an_upload_failed(OTHER_UPLOAD)]

    batch = after(*facts, completion(after(*facts).batches[BATCH], epoch=EPOCH)).batches[BATCH]

    assert (batch.status, batch.error_message) == ("failed", "None of its 2 uploads succeeded.")


def test_a_batch_whose_only_upload_failed_says_so() -> None:
    completed = a_batch_completed(status="failed", successful_uploads=0, failed_uploads=1)

    batch = after(*WORKED, a_batch_sealed(), an_upload_failed(), completed).batches[BATCH]

    assert batch.error_message == "Its only upload failed."


def test_a_batch_with_one_success_is_completed_and_has_no_error() -> None:
    facts = [*WORKED, an_upload_queued(OTHER_UPLOAD), a_batch_sealed(), an_upload_failed()]
    facts += [an_upload_started(OTHER_UPLOAD), an_upload_succeeded(OTHER_UPLOAD)]

    batch = after(*facts, a_batch_completed(total_uploads=2, failed_uploads=1)).batches[BATCH]

    assert (batch.status, batch.error_message, counts(batch)) == ("completed", None, {"completed": 1, "failed": 1})


def test_a_batch_of_no_uploads_is_sealed_at_once_and_completed() -> None:
    created = after(a_batch_created(expected_uploads=0))
    completed = after(a_batch_created(expected_uploads=0), a_batch_completed(total_uploads=0, successful_uploads=0))

    assert created.batches[BATCH].sealed
    assert created.batches[BATCH].completable
    assert completed.batches[BATCH].status == "completed"
    assert not completed.batches[BATCH].completable


def test_a_batch_is_sealed_when_the_expected_uploads_were_queued() -> None:
    queued: list[LogEvent] = [a_batch_created(expected_uploads=2), an_upload_queued()]

    assert not after(*queued).batches[BATCH].sealed
    assert after(*queued, an_upload_queued(OTHER_UPLOAD)).batches[BATCH].sealed


def test_an_upload_the_fold_ignored_does_not_count_as_expected() -> None:
    created, repeated = a_batch_created(expected_uploads=2), an_upload_queued()

    assert not fold(log_of(*OPENING, created, an_upload_queued(), repeated)).batches[BATCH].sealed


def test_a_retry_of_an_ended_batch_takes_it_back_to_processing_and_it_completes_again() -> None:
    failed = [*WORKED, a_batch_sealed(), an_upload_failed()]
    failed.append(a_batch_completed(status="failed", successful_uploads=0, failed_uploads=1))
    retried = [*failed, an_upload_retried(request=a_request())]
    done = [*retried, an_upload_started(attempt=2), an_upload_succeeded(attempt=2), a_batch_completed()]

    batch, upload = after(*retried).batches[BATCH], after(*retried).uploads[UPLOAD]
    assert (batch.status, batch.completed_ms, batch.error_message) == ("processing", None, None)
    assert (batch.sealed, batch.completable, counts(batch)) == (True, False, {"queued": 1})
    assert (upload.status, upload.queueing, upload.attempts, upload.attempts_of_queueing) == ("queued", 2, 1, 0)
    assert (upload.error_code, upload.completed_ms, upload.place) == (None, None, offset_of(6))
    assert (upload.key_hash, upload.body_hash) == (a_request().key_hash, a_request().body_hash)

    batch = after(*done).batches[BATCH]
    assert (batch.status, batch.started_ms, batch.completed_ms) == ("completed", time_of(2), time_of(9))


def test_a_retry_in_a_batch_that_goes_on_leaves_the_batch_as_it_is() -> None:
    state = after(*WORKED, an_upload_failed(), an_upload_retried())

    assert (state.batches[BATCH].status, state.batches[BATCH].sealed) == ("processing", False)
    assert state.uploads[UPLOAD].status == "queued"


def test_attempts_count_on_over_queueings() -> None:
    facts = [*WORKED, an_upload_attempt_failed(), an_upload_started(attempt=2), an_upload_failed(attempt=2)]
    facts += [an_upload_retried(), an_upload_started(attempt=3), an_upload_failed(attempt=3)]
    facts += [an_upload_retried(queueing=3), an_upload_started(attempt=4)]

    state = after(*facts)

    upload = state.uploads[UPLOAD]
    assert (upload.attempts, upload.attempts_of_queueing, upload.queueing) == (4, 1, 3)


def test_one_request_may_queue_several_failed_uploads_again_and_the_batch_keeps_where() -> None:
    request = a_request()
    failed = [*WORKED, an_upload_queued(OTHER_UPLOAD), an_upload_failed()]
    failed += [an_upload_started(OTHER_UPLOAD), an_upload_failed(OTHER_UPLOAD)]

    state = after(*failed, an_upload_retried(request=request), an_upload_retried(OTHER_UPLOAD, request=request))

    batch, first, last = state.batches[BATCH], state.uploads[UPLOAD].offset, state.uploads[OTHER_UPLOAD].offset
    assert (state.ignored, counts(batch), last) == ([], {"queued": 2}, first + 1)
    assert batch.retries == {request.key_hash: {"body_hash": request.body_hash, "first": first, "last": last}}


def test_what_the_batch_keeps_of_retries_changes_the_meaning_of_no_fact() -> None:
    # An older Sluice retried twice under one key where another retry came between: both counted, and still do.
    story = [*WORKED, an_upload_failed(), an_upload_retried(request=a_request("one"))]
    story += [an_upload_started(attempt=2), an_upload_failed(attempt=2), an_upload_retried(queueing=3)]
    story += [an_upload_started(attempt=3), an_upload_failed(attempt=3)]

    state = after(*story, an_upload_retried(queueing=4, request=a_request("one")))

    assert (state.ignored, state.uploads[UPLOAD].status) == ([], "queued")


def test_cancelling_ends_what_has_not_ended_and_keeps_the_rest() -> None:
    facts = [*WORKED, an_upload_queued(OTHER_UPLOAD), an_upload_succeeded()]
    facts += [an_upload_queued(THIRD_UPLOAD), an_upload_started(OTHER_UPLOAD), a_batch_cancelled(reason="a mistake")]

    state = after(*facts)

    batch = state.batches[BATCH]
    assert (batch.status, batch.ended, batch.completed_ms) == ("cancelled", True, time_of(7))
    assert counts(batch) == {"completed": 1, "cancelled": 2}
    assert state.uploads[UPLOAD].completed_ms == time_of(4)
    for swept in (state.uploads[OTHER_UPLOAD], state.uploads[THIRD_UPLOAD]):
        assert (swept.status, swept.completed_ms, swept.updated_ms) == ("cancelled", time_of(7), time_of(7))
        assert swept.offset == offset_of(7)


def test_a_sweep_leaves_other_batches_alone() -> None:
    others: list[LogEvent] = [a_batch_created(OTHER_BATCH), an_upload_queued(OTHER_UPLOAD, OTHER_BATCH)]

    cancelled, deleted = after(*WORKED, *others, a_batch_cancelled()), after(*WORKED, *others, a_batch_deleted())

    assert cancelled.uploads[OTHER_UPLOAD].status == "queued"
    assert list(deleted.uploads) == [OTHER_UPLOAD]


def test_a_sweep_says_what_it_does_without_touching_any_upload() -> None:
    assert after(*WORKED, a_batch_cancelled()).last == Changed(
        after(*WORKED, a_batch_cancelled()).batches[BATCH], None, "cancelled"
    )
    deleted = after(*WORKED, a_batch_deleted())
    assert deleted.last == Changed(deleted.batches[BATCH], None, "deleted")


def test_an_upload_that_ended_is_not_swept() -> None:
    upload = after(*WORKED, an_upload_failed()).uploads[UPLOAD]
    kept = copy.deepcopy(upload)

    assert not cancel_swept(upload, at_ms=1, offset=1)
    assert upload == kept


def test_a_deleted_batch_leaves_a_tombstone_that_knows_its_owner_and_request() -> None:
    state = after(a_batch_created(request=a_request()), an_upload_queued(request=a_request()), a_batch_deleted())

    tombstone = state.batches[BATCH]
    assert (tombstone.deleted, tombstone.user_id, tombstone.completable) == (True, "ada", False)
    assert (tombstone.request_key_hash, tombstone.request_body_hash) == (a_request().key_hash, a_request().body_hash)
    assert state.uploads == {}


def test_a_batch_that_ended_can_be_deleted() -> None:
    assert after(*a_finished_batch(), a_batch_deleted()).batches[BATCH].deleted
    assert after(*WORKED, a_batch_cancelled(), a_batch_deleted()).batches[BATCH].deleted


def test_a_put_file_and_a_posted_one_of_the_same_name_are_two() -> None:
    put, posted = an_upload_queued(filename="cat.jpg"), an_upload_queued(OTHER_UPLOAD, filename="cat.jpg")

    assert after(a_batch_created(), put, posted).batches[BATCH].queued == 2


def test_one_key_may_queue_several_uploads_and_two_keys_more() -> None:
    one, two = a_request("one"), a_request("two")
    queued: list[LogEvent] = [an_upload_queued(request=one), an_upload_queued(OTHER_UPLOAD, request=one)]

    batch = after(a_batch_created(), *queued, an_upload_queued(THIRD_UPLOAD, request=two)).batches[BATCH]

    assert batch.requests == {one.key_hash: one.body_hash, two.key_hash: two.body_hash}


def test_a_batch_may_be_filled_to_its_limits_exactly() -> None:
    limits = a_batch_created().limits.model_copy(update={"files_max": 2, "file_bytes_max": 100, "batch_bytes_max": 150})
    queued: list[LogEvent] = [an_upload_queued(size_bytes=100), an_upload_queued(OTHER_UPLOAD, size_bytes=50)]

    batch = after(a_batch_created(limits=limits), *queued).batches[BATCH]

    assert (batch.total, batch.size_bytes) == (2, 150)


def test_a_batch_of_another_lane_is_folded_in_that_lane() -> None:
    batch_id, upload_id = an_id("batch", 1, partition=3), an_id("upload", 1, partition=3)
    facts = [*OPENING, a_batch_created(batch_id), an_upload_queued(upload_id, batch_id)]

    state = fold(log_of(*OPENING, *OPEN) + log_of(*facts, partition=3))

    assert state.ignored == []
    assert state.batches[batch_id].partition == 3
    assert {lane.next_offset for lane in state.lanes.values()} == {4}


def test_the_batch_is_completable_exactly_when_its_completion_would_count() -> None:
    for facts in ([*WORKED], [*WORKED, an_upload_succeeded()], [*WORKED, a_batch_sealed()], a_finished_batch()):
        assert not after(*facts).batches[BATCH].completable
    ready = after(*WORKED, an_upload_succeeded(), a_batch_sealed())
    deleted = after(*WORKED, an_upload_succeeded(), a_batch_sealed(), a_batch_deleted())
    assert not deleted.batches[BATCH].completable
    assert ready.batches[BATCH].completable
    assert completion(ready.batches[BATCH], epoch=EPOCH) == a_batch_completed()


def test_evolve_changes_the_objects_it_was_given() -> None:
    lane, batch, upload = _loaded()
    fact = log_of(an_upload_started(), first_offset=lane.next_offset)[0]
    step(lane, fact.offset, fact.timestamp_ms)

    changed = evolve(lane, batch, upload, fact)

    assert isinstance(changed, Changed)
    assert changed.batch is batch
    assert changed.upload is upload
    assert batch.processing == 1


def _loaded() -> tuple[Lane, Batch, Upload]:
    state = after(*OPEN)
    return state.lane, state.batches[BATCH], state.uploads[UPLOAD]
