"""What a wish becomes: the facts to append, or the reason why not. Pure: no clock, no log, no store.

Ids, limits and states come in as values; events go out. What a decision allows may still be ignored by the fold, since
others write too; `refusal` then says why. Where nothing is to be appended (sealing twice), no event comes out.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from schemas.batch import CODE_OF, Batch, Ignored, Retry, Upload
from schemas.errors import Code, RequestError
from schemas.events import (
    BatchCancelled,
    BatchCreated,
    BatchDeleted,
    BatchSealed,
    Limits,
    LogEvent,
    Request,
    UploadQueued,
    UploadRetried,
)
from schemas.ids import derived_id, partition_of
from schemas.requests import CONTENT_TYPES, CreateBatch


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file whose bytes are in the blob store."""

    upload_id: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    blob: str


def create_batch(
    wish: CreateBatch, *, batch_id: str, user_id: str, limits: Limits, request: Request | None
) -> list[LogEvent]:
    """An open batch, which waits for files. Raises RequestError where it would wait for more than it may hold."""
    if wish.expected_uploads is not None and wish.expected_uploads > limits.files_max:
        raise RequestError(
            Code.INVALID_REQUEST,
            f"expected_uploads is {wish.expected_uploads}, a batch holds {limits.files_max} files at most",
        )
    created = BatchCreated(
        batch_id=batch_id,
        user_id=user_id,
        request=request,
        name=wish.name,
        expected_uploads=wish.expected_uploads,
        metadata=wish.metadata,
        limits=limits,
    )
    return [created]


def fill_batch(
    batch: Batch | None,
    wish: CreateBatch,
    files: Sequence[StoredFile],
    *,
    batch_id: str,
    user_id: str,
    limits: Limits,
    request: Request | None,
) -> list[LogEvent]:
    """A batch with all its files at once, sealed; of one that is there, what is still to be said (usually nothing).

    Raises RequestError where it was made by another request.
    """
    events: list[LogEvent] = []
    if batch is None:
        events = create_batch(wish, batch_id=batch_id, user_id=user_id, limits=limits, request=request)
    else:
        made_by(batch, request)
        if batch.sealed or batch.deleted:
            return []
    events += queue_files(files, batch_id=batch_id, user_id=user_id, request=request)
    return [*events, BatchSealed(batch_id=batch_id, user_id=user_id, request=request)]


def queue_files(files: Iterable[StoredFile], *, batch_id: str, user_id: str, request: Request | None) -> list[LogEvent]:
    return [
        UploadQueued(
            batch_id=batch_id,
            user_id=user_id,
            request=request,
            upload_id=file.upload_id,
            filename=file.filename,
            content_type=file.content_type,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            blob=file.blob,
        )
        for file in files
    ]


def seal(batch: Batch, *, user_id: str) -> list[LogEvent]:
    """Nothing for a sealed batch; raises RequestError for one that ended open."""
    if batch.sealed:
        return []
    if batch.ended:
        raise refusal(Ignored.BATCH_ENDED, batch)
    return [BatchSealed(batch_id=batch.id, user_id=user_id)]


def cancel(batch: Batch, *, user_id: str) -> list[LogEvent]:
    """Nothing for a cancelled batch; raises RequestError for one that came to its end."""
    if batch.status == "cancelled":
        return []
    if batch.ended:
        raise refusal(Ignored.BATCH_ENDED, batch)
    return [BatchCancelled(batch_id=batch.id, user_id=user_id)]


def delete(batch: Batch, *, user_id: str) -> list[LogEvent]:
    return [BatchDeleted(batch_id=batch.id, user_id=user_id)]


def retry_upload(batch: Batch, upload: Upload, *, user_id: str, request: Request | None) -> list[LogEvent]:
    """Nothing for a request that did this before; raises RequestError where there is nothing to retry."""
    if known_retry(batch, request) or _queued_by(batch, upload, request):
        return []
    if batch.status == "cancelled":
        raise refusal(Ignored.BATCH_ENDED, batch)
    if upload.status != "failed":
        raise refusal(Ignored.NOT_FAILED, batch, upload)
    return [_retried(upload, user_id=user_id, request=request)]


def retry_batch(batch: Batch, uploads: Collection[Upload], *, user_id: str, request: Request | None) -> list[LogEvent]:
    """Every failed upload again; of a request that did this before, only those of which the log did not hear then:
    they had failed before its first fact, and still are."""
    retry = known_retry(batch, request)
    if retry is None and any(_queued_by(batch, upload, request) for upload in uploads):
        return []
    if batch.status == "cancelled":
        if retry is None:
            raise refusal(Ignored.BATCH_ENDED, batch)
        return []
    failed = [upload for upload in uploads if upload.status == "failed"]
    meant = [upload for upload in failed if retry is None or upload.offset < retry["first"]]
    return [_retried(upload, user_id=user_id, request=request) for upload in meant]


def known_retry(batch: Batch, request: Request | None) -> Retry | None:
    """What is known of this request, where it queued uploads again before; raises RequestError where its key did so
    with another body."""
    retry = batch.retries.get(request.key_hash) if request else None
    if request and retry and retry["body_hash"] != request.body_hash:
        raise refusal(Ignored.IDEMPOTENCY_KEY_REUSED, batch)
    return retry


def named_upload_id(batch_id: str, filename: str) -> str:
    """The id of a file that is PUT under a name: the same whenever batch and name are."""
    return derived_id("named", batch_id, filename, partition=partition_of(batch_id))


def addable(batch: Batch) -> None:
    """Raises RequestError where the batch takes no files at all."""
    if batch.deleted:
        raise refusal(Ignored.DELETED, batch)
    if batch.ended:
        raise refusal(Ignored.BATCH_ENDED, batch)
    if batch.sealed:
        raise refusal(Ignored.BATCH_SEALED, batch)


def made_by(batch: Batch, request: Request | None) -> None:
    """Raises RequestError where a batch under an id derived from the request's key was made by another request."""
    fingerprint = (batch.request_key_hash, batch.request_body_hash)
    if request is not None and fingerprint != (request.key_hash, request.body_hash):
        raise refusal(Ignored.IDEMPOTENCY_KEY_REUSED, batch)


def same_request(batch: Batch, request: Request | None) -> None:
    """Raises RequestError where the batch knows the request's key with another body."""
    if request is not None and batch.requests.get(request.key_hash, request.body_hash) != request.body_hash:
        raise refusal(Ignored.IDEMPOTENCY_KEY_REUSED, batch)


def refusal(reason: Ignored, batch: Batch | None, upload: Upload | None = None) -> RequestError:
    """The answer to a wish that was not granted, or whose fact the fold ignored."""
    code = CODE_OF.get(reason, Code.INTERNAL_ERROR)
    if code is Code.NOT_FOUND or batch is None:
        return not_found("batch")
    return RequestError(code, _details(reason, batch, upload))


def not_found(kind: str) -> RequestError:
    """There is no such thing, or it is somebody else's; both look the same."""
    return RequestError(Code.NOT_FOUND, f"there is no such {kind}, or it is not yours")


def refused_file(code: Code, *, limits: Limits) -> str:
    """Why a file is not taken, for the person who sent it."""
    match code:
        case Code.EMPTY_FILE:
            return "it holds no bytes"
        case Code.UNSUPPORTED_MEDIA_TYPE:
            return f"its content is none of {', '.join(CONTENT_TYPES)}"
        case Code.FILE_TOO_LARGE:
            return f"it is larger than {limits.file_bytes_max} bytes, the most one file may have"
        case Code.TOO_MANY_FILES:
            return f"the batch holds {limits.files_max} files, which is as many as it may"
        case Code.BATCH_TOO_LARGE:
            return f"the batch would hold more than {limits.batch_bytes_max} bytes"
        case Code.INVALID_REQUEST:
            return "its name is empty once paths and control characters are taken away; give it another"
        case _:
            return f"it was not taken: {code}"


def limits_of(batch: Batch) -> Limits:
    """The limits that bind this batch for ever."""
    return Limits(files_max=batch.files_max, batch_bytes_max=batch.batch_bytes_max, file_bytes_max=batch.file_bytes_max)


def _queued_by(batch: Batch, upload: Upload, request: Request | None) -> bool:
    """Whether this request queued the upload last, which rows of an older Sluice know though they know no retries."""
    if request is None or upload.key_hash != request.key_hash:
        return False
    if upload.body_hash != request.body_hash:
        raise refusal(Ignored.IDEMPOTENCY_KEY_REUSED, batch)
    return True


def _retried(upload: Upload, *, user_id: str, request: Request | None) -> UploadRetried:
    return UploadRetried(
        batch_id=upload.batch_id,
        user_id=user_id,
        request=request,
        upload_id=upload.id,
        queueing=upload.queueing + 1,
    )


def _details(reason: Ignored, batch: Batch, upload: Upload | None) -> str:
    match reason:
        case Ignored.BATCH_ENDED:
            return f"batch {batch.id} is {batch.status}; make a new one"
        case Ignored.BATCH_SEALED:
            return f"batch {batch.id} is sealed and takes no more files; make a new one"
        case Ignored.IDEMPOTENCY_KEY_REUSED:
            return "this Idempotency-Key came with another request before; use a new key for a new request"
        case Ignored.FILENAME_TAKEN:
            name = upload.filename if upload else "this name"
            return f"batch {batch.id} holds {name!r} with other bytes; use another name"
        case Ignored.NOT_FAILED:
            status = upload.status if upload else "not failed"
            return f"the upload is {status}; only a failed one can be retried"
        case Ignored.FILE_TOO_LARGE | Ignored.TOO_MANY_FILES | Ignored.BATCH_TOO_LARGE:
            return refused_file(CODE_OF[reason], limits=limits_of(batch))
        case _:
            return f"the log did not take this as it stands: {reason}; try again"
