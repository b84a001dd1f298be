"""What a wish becomes, by values alone; and that the fold takes what the decisions say, once."""

import dataclasses

import pytest

from schemas.batch import CODE_OF, Batch, Changed, Ignored, Upload
from schemas.errors import MEANINGS, Code, RequestError
from schemas.events import BatchSealed, Request, UploadQueued, UploadRetried
from schemas.requests import CreateBatch
from services.api import decisions
from services.api.decisions import StoredFile
from tests.examples import (
    BATCH,
    LIMITS,
    OPENING,
    OTHER_UPLOAD,
    UPLOAD,
    USER,
    a_batch_cancelled,
    a_batch_created,
    a_batch_sealed,
    a_finished_batch,
    a_request,
    a_sha256,
    an_upload_failed,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    fold,
    log_of,
)


def a_stored_file(upload_id: str = UPLOAD, **changes: object) -> StoredFile:
    file = StoredFile(upload_id, "a.jpg", "image/jpeg", 1_000, a_sha256("a"), f"{upload_id}/fresh")
    return dataclasses.replace(file, **changes)


def an_open_batch() -> Batch:
    return fold(log_of(*OPENING, a_batch_created())).batches[BATCH]


def a_batch_with_a_failure(*, retried_by: Request | None = None) -> tuple[Batch, Upload]:
    """One upload that failed for good, and then failed again if a request retried it."""
    facts = [
        *OPENING,
        a_batch_created(),
        an_upload_queued(),
        a_batch_sealed(),
        an_upload_started(),
        an_upload_failed(),
    ]
    if retried_by is not None:
        facts += [an_upload_retried(request=retried_by), an_upload_started(attempt=2), an_upload_failed(attempt=2)]
    state = fold(log_of(*facts))
    return state.batches[BATCH], state.uploads[UPLOAD]


def code_of(refused: pytest.ExceptionInfo[RequestError]) -> Code:
    return refused.value.code


def test_a_wish_for_a_batch_becomes_one_fact_with_the_limits_in_force() -> None:
    wish = CreateBatch(name="n", expected_uploads=3, metadata={"a": 1})

    (created,) = decisions.create_batch(wish, batch_id=BATCH, user_id=USER, limits=LIMITS, request=a_request())

    assert created == a_batch_created(name="n", expected_uploads=3, metadata={"a": 1}, request=a_request())


def test_a_form_of_files_becomes_a_batch_that_the_fold_takes_whole_and_once() -> None:
    files = [a_stored_file(UPLOAD), a_stored_file(OTHER_UPLOAD)]
    events = decisions.fill_batch(
        None, CreateBatch(), files, batch_id=BATCH, user_id=USER, limits=LIMITS, request=a_request()
    )

    once = fold(log_of(*OPENING, *events))
    twice = fold(log_of(*OPENING, *events, *events))

    assert [type(outcome) for outcome in once.outcomes] == [Changed] * 6
    assert twice.ignored == [Ignored.REPETITION] * 4
    assert (once.batches[BATCH].sealed, once.batches[BATCH].total) == (True, 2)
    assert twice.batches == once.batches
    assert twice.uploads == once.uploads


def test_of_a_filled_batch_nothing_is_left_to_say() -> None:
    batch = fold(log_of(*OPENING, a_batch_created(request=a_request()), a_batch_sealed())).batches[BATCH]

    events = decisions.fill_batch(
        batch, CreateBatch(), [a_stored_file()], batch_id=BATCH, user_id=USER, limits=LIMITS, request=a_request()
    )

    assert events == []


def test_of_a_batch_whose_filling_broke_off_the_rest_is_said() -> None:
    batch = fold(log_of(*OPENING, a_batch_created(request=a_request()))).batches[BATCH]

    events = decisions.fill_batch(
        batch, CreateBatch(), [a_stored_file()], batch_id=BATCH, user_id=USER, limits=LIMITS, request=a_request()
    )

    assert [type(event) for event in events] == [UploadQueued, BatchSealed]


def test_a_batch_made_by_another_request_is_not_filled() -> None:
    batch = fold(log_of(*OPENING, a_batch_created(request=a_request(body="other")))).batches[BATCH]

    with pytest.raises(RequestError) as refused:
        decisions.fill_batch(batch, CreateBatch(), [], batch_id=BATCH, user_id=USER, limits=LIMITS, request=a_request())

    assert code_of(refused) is Code.IDEMPOTENCY_KEY_REUSED


def test_a_batch_is_sealed_once() -> None:
    batch = an_open_batch()
    sealed = fold(log_of(*OPENING, a_batch_created(), a_batch_sealed())).batches[BATCH]
    cancelled = fold(log_of(*OPENING, a_batch_created(), a_batch_cancelled())).batches[BATCH]

    assert decisions.seal(batch, user_id=USER) == [a_batch_sealed()]
    assert decisions.seal(sealed, user_id=USER) == []
    with pytest.raises(RequestError) as refused:
        decisions.seal(cancelled, user_id=USER)
    assert code_of(refused) is Code.BATCH_ENDED


def test_a_batch_is_cancelled_once_and_not_after_its_end() -> None:
    cancelled = fold(log_of(*OPENING, a_batch_created(), a_batch_cancelled())).batches[BATCH]
    completed = fold(log_of(*OPENING, *a_finished_batch())).batches[BATCH]

    assert decisions.cancel(an_open_batch(), user_id=USER) == [a_batch_cancelled()]
    assert decisions.cancel(cancelled, user_id=USER) == []
    with pytest.raises(RequestError) as refused:
        decisions.cancel(completed, user_id=USER)
    assert code_of(refused) is Code.BATCH_ENDED


def test_a_failed_upload_is_retried_under_the_next_number() -> None:
    batch, upload = a_batch_with_a_failure()

    events = decisions.retry_upload(batch, upload, user_id=USER, request=None)

    assert events == [UploadRetried(batch_id=BATCH, upload_id=UPLOAD, user_id=USER, queueing=2)]


def test_a_request_retries_an_upload_once_even_if_it_fails_again() -> None:
    batch, upload = a_batch_with_a_failure(retried_by=a_request())

    assert decisions.retry_upload(batch, upload, user_id=USER, request=a_request()) == []
    assert decisions.retry_batch(batch, [upload], user_id=USER, request=a_request()) == []
    assert len(decisions.retry_batch(batch, [upload], user_id=USER, request=a_request("another key"))) == 1
    with pytest.raises(RequestError) as refused:
        decisions.retry_batch(batch, [upload], user_id=USER, request=a_request(body="other"))
    assert code_of(refused) is Code.IDEMPOTENCY_KEY_REUSED


def test_an_older_request_retries_nothing_after_another_one_did_and_failed() -> None:
    story = [a_batch_created(), an_upload_queued(), an_upload_started(), an_upload_failed()]
    story += [an_upload_retried(request=a_request("older")), an_upload_started(attempt=2), an_upload_failed(attempt=2)]
    story += [an_upload_retried(queueing=3, request=a_request("newer"))]
    state = fold(log_of(*OPENING, *story, an_upload_started(attempt=3), an_upload_failed(attempt=3)))
    batch, upload = state.batches[BATCH], state.uploads[UPLOAD]

    for key in ("older", "newer"):
        assert decisions.retry_upload(batch, upload, user_id=USER, request=a_request(key)) == []
        assert decisions.retry_batch(batch, [upload], user_id=USER, request=a_request(key)) == []
    assert len(decisions.retry_upload(batch, upload, user_id=USER, request=a_request("third"))) == 1


def test_a_repeated_request_retries_what_the_log_did_not_hear_of_it_the_first_time() -> None:
    story = [a_batch_created(), an_upload_queued(), an_upload_queued(OTHER_UPLOAD)]
    story += [an_upload_started(), an_upload_failed(), an_upload_started(OTHER_UPLOAD), an_upload_failed(OTHER_UPLOAD)]
    half = fold(log_of(*OPENING, *story, an_upload_retried(request=a_request())))
    batch, uploads = half.batches[BATCH], half.uploads.values()

    events = decisions.retry_batch(batch, uploads, user_id=USER, request=a_request())

    assert [event.upload_id for event in events if isinstance(event, UploadRetried)] == [OTHER_UPLOAD]


def test_a_repeated_request_retries_nothing_that_failed_after_it() -> None:
    # The second file failed when the request was under way and is retried by its repetition, the first failed again.
    story = [a_batch_created(), an_upload_queued(), an_upload_queued(OTHER_UPLOAD)]
    story += [an_upload_started(), an_upload_failed(), an_upload_started(OTHER_UPLOAD), an_upload_failed(OTHER_UPLOAD)]
    story += [an_upload_retried(request=a_request()), an_upload_started(attempt=2), an_upload_failed(attempt=2)]
    state = fold(log_of(*OPENING, *story, an_upload_retried(OTHER_UPLOAD, request=a_request())))

    assert decisions.retry_batch(state.batches[BATCH], state.uploads.values(), user_id=USER, request=a_request()) == []


def test_a_repeated_request_is_known_in_rows_of_an_older_sluice_too() -> None:
    batch, upload = a_batch_with_a_failure(retried_by=a_request())
    batch.retries = {}

    assert decisions.retry_upload(batch, upload, user_id=USER, request=a_request()) == []
    assert decisions.retry_batch(batch, [upload], user_id=USER, request=a_request()) == []
    with pytest.raises(RequestError) as refused:
        decisions.retry_upload(batch, upload, user_id=USER, request=a_request(body="other"))
    assert code_of(refused) is Code.IDEMPOTENCY_KEY_REUSED


def test_a_repeated_retry_of_a_batch_that_was_cancelled_since_is_granted() -> None:
    batch, upload = a_batch_with_a_failure(retried_by=a_request())
    batch.status = "cancelled"

    assert decisions.retry_batch(batch, [upload], user_id=USER, request=a_request()) == []
    assert decisions.retry_upload(batch, upload, user_id=USER, request=a_request()) == []


def test_only_failed_uploads_are_retried() -> None:
    state = fold(log_of(*OPENING, a_batch_created(), an_upload_queued()))
    batch, upload = state.batches[BATCH], state.uploads[UPLOAD]

    assert decisions.retry_batch(batch, [upload], user_id=USER, request=None) == []
    with pytest.raises(RequestError) as refused:
        decisions.retry_upload(batch, upload, user_id=USER, request=None)
    assert code_of(refused) is Code.NOT_FAILED


def test_nothing_is_retried_in_a_cancelled_batch() -> None:
    state = fold(log_of(*OPENING, a_batch_created(), an_upload_queued(), a_batch_cancelled()))
    batch, upload = state.batches[BATCH], state.uploads[UPLOAD]

    for decide in (
        lambda: decisions.retry_batch(batch, [upload], user_id=USER, request=None),
        lambda: decisions.retry_upload(batch, upload, user_id=USER, request=None),
    ):
        with pytest.raises(RequestError) as refused:
            decide()
        assert code_of(refused) is Code.BATCH_ENDED


def test_the_id_of_a_named_file_follows_from_batch_and_name() -> None:
    first = decisions.named_upload_id(BATCH, "a.jpg")

    assert decisions.named_upload_id(BATCH, "a.jpg") == first
    assert decisions.named_upload_id(BATCH, "b.jpg") != first
    assert first[-2:] == BATCH[-2:]


@pytest.mark.parametrize("reason", list(CODE_OF))
def test_every_reason_to_ignore_a_wish_has_its_answer(reason: Ignored) -> None:
    error = decisions.refusal(reason, an_open_batch())

    assert error.code is CODE_OF[reason]
    assert error.detail
    assert error.code is not Code.INTERNAL_ERROR


@pytest.mark.parametrize(
    "code",
    [
        Code.EMPTY_FILE,
        Code.UNSUPPORTED_MEDIA_TYPE,
        Code.FILE_TOO_LARGE,
        Code.TOO_MANY_FILES,
        Code.BATCH_TOO_LARGE,
        Code.INVALID_REQUEST,
    ],
)
def test_every_refused_file_hears_why(code: Code) -> None:
    detail = decisions.refused_file(code, limits=LIMITS)

    assert not detail.startswith("it was not taken")
    assert MEANINGS[code].status < 500
