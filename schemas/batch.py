"""What the facts mean: the state of a batch and its uploads, and `evolve`, the only place where an event has a meaning.

Processor, api, notifier and replay all fold with this function, so they all ignore the same facts for the same
reasons. A status change *moves* an upload from one bucket to another, so counts add up by construction. States are
mutable slotted objects (folding is the hot path); `evolve` changes those it is given, or returns why it did not. Times
are the running maximum of the partition's record timestamps (`Lane.time_ms`), in milliseconds.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypedDict, assert_never

from schemas.errors import Code
from schemas.events import (
    BatchCancelled,
    BatchCompleted,
    BatchCreated,
    BatchDeleted,
    BatchSealed,
    ByUser,
    Erased,
    Fact,
    LaneClaimed,
    LogCreated,
    LogEvent,
    OfAttempt,
    Request,
    UploadAttemptFailed,
    UploadFailed,
    UploadInterrupted,
    UploadQueued,
    UploadRetried,
    UploadStarted,
    UploadSucceeded,
)

ATTEMPTS_PER_QUEUEING = 2

Bucket = Literal["queued", "processing", "completed", "failed", "cancelled"]


class Ignored(StrEnum):
    """Why a fact has no effect."""

    REPETITION = "repetition"
    ERASED = "erased"
    DELETED = "deleted"
    FOREIGN = "foreign"
    UNKNOWN = "unknown"
    BATCH_ENDED = "batch_ended"
    UPLOAD_ENDED = "upload_ended"
    BATCH_SEALED = "batch_sealed"
    FILE_TOO_LARGE = "file_too_large"
    TOO_MANY_FILES = "too_many_files"
    BATCH_TOO_LARGE = "batch_too_large"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    FILENAME_TAKEN = "filename_taken"
    NOT_FAILED = "not_failed"
    STALE_EPOCH = "stale_epoch"
    UNEXPECTED_ATTEMPT = "unexpected_attempt"
    COUNTS_DISAGREE = "counts_disagree"
    MISPLACED = "misplaced"


CODE_OF: dict[Ignored, Code] = {
    Ignored.ERASED: Code.NOT_FOUND,
    Ignored.DELETED: Code.NOT_FOUND,
    Ignored.FOREIGN: Code.NOT_FOUND,
    Ignored.UNKNOWN: Code.NOT_FOUND,
    Ignored.BATCH_ENDED: Code.BATCH_ENDED,
    Ignored.BATCH_SEALED: Code.BATCH_SEALED,
    Ignored.FILE_TOO_LARGE: Code.FILE_TOO_LARGE,
    Ignored.TOO_MANY_FILES: Code.TOO_MANY_FILES,
    Ignored.BATCH_TOO_LARGE: Code.BATCH_TOO_LARGE,
    Ignored.IDEMPOTENCY_KEY_REUSED: Code.IDEMPOTENCY_KEY_REUSED,
    Ignored.FILENAME_TAKEN: Code.FILENAME_TAKEN,
    Ignored.NOT_FAILED: Code.NOT_FAILED,
}
"""What the api answers when the fold ignored a fact of its request; a repetition counts as effective."""


@dataclass(slots=True)
class Lane:
    """What one partition is at: `next_offset` is the offset after the last record folded, `epoch` the newest effective
    claim's, `time_ms` the running maximum of the record timestamps."""

    partition: int
    log_id: str = ""
    next_offset: int = 0
    epoch: int | None = None
    time_ms: int = 0


class Retry(TypedDict):
    """A keyed request that queued failed uploads again: the offsets of its first and its newest effective fact."""

    body_hash: str
    first: int
    last: int


@dataclass(slots=True)
class Batch:
    """A batch without its uploads. Offsets are of its own partition; times in milliseconds; `requests` maps the key
    hash of each keyed request that made it or queued uploads to its body hash, `retries` that of each that queued
    uploads again to what is known of it."""

    id: str
    partition: int
    user_id: str
    name: str | None
    metadata: dict[str, Any]
    expected_uploads: int | None
    files_max: int
    batch_bytes_max: int
    file_bytes_max: int
    request_key_hash: str | None
    request_body_hash: str | None
    created_ms: int
    created_offset: int
    updated_ms: int
    offset: int
    last_queued_ms: int
    requests: dict[str, str] = field(default_factory=dict)
    status: Literal["pending", "processing", "completed", "failed", "cancelled"] = "pending"
    sealed: bool = False
    deleted: bool = False
    queued: int = 0
    processing: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    size_bytes: int = 0
    error_message: str | None = None
    started_ms: int | None = None
    completed_ms: int | None = None
    retries: dict[str, Retry] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.queued + self.processing + self.completed + self.failed + self.cancelled

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    @property
    def completable(self) -> bool:
        """Whether BatchCompleted is due: sealed, every upload ended, and not said yet."""
        return self.sealed and not self.ended and not self.deleted and self.queued == 0 and self.processing == 0

    def move(self, source: Bucket, target: Bucket) -> None:
        """One upload leaves a bucket and enters another."""
        setattr(self, source, getattr(self, source) - 1)
        setattr(self, target, getattr(self, target) + 1)


@dataclass(slots=True)
class Upload:
    """One file of a batch. `place` is the offset of its newest queueing fact (its place in the batch's queue),
    `attempts_before` how many attempts were made before the newest queueing."""

    id: str
    batch_id: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    blob: str
    key_hash: str | None
    body_hash: str | None
    created_ms: int
    created_offset: int
    updated_ms: int
    offset: int
    place: int
    status: Bucket = "queued"
    attempts: int = 0
    attempts_before: int = 0
    queueing: int = 1
    error_code: str | None = None
    error_message: str | None = None
    result: dict[str, Any] | None = None
    started_ms: int | None = None
    completed_ms: int | None = None

    @property
    def attempts_of_queueing(self) -> int:
        return self.attempts - self.attempts_before

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Changed:
    """An effective fact: the batch and upload after it. `swept` says what became of all the batch's unended uploads
    (`cancel_swept` does it to one), so that nobody copies a whole batch for one fact."""

    batch: Batch | None
    upload: Upload | None = None
    swept: Literal["cancelled", "deleted"] | None = None


_LANE_CHANGED = Changed(batch=None)


def evolve(  # noqa: PLR0911  # one case an event, closed by assert_never: that is the point
    lane: Lane, batch: Batch | None, upload: Upload | None, fact: Fact
) -> Changed | Ignored:
    """Fold one fact, in place, into its batch and upload (None where there is none, a deleted batch included as long
    as its tombstone is not given).

    `lane` must be advanced by `step` first. `batch` and `upload` are those the fact names.
    """
    event = fact.event
    match event:
        case Erased():
            return Ignored.ERASED
        case LogCreated():
            return _log_created(lane, event, fact)
        case LaneClaimed():
            return _claimed(lane, event, fact)
        case BatchCreated():
            return _batch_created(lane, batch, event, fact)
        case UploadQueued():
            return _upload_queued(lane, batch, upload, event, fact)
        case BatchSealed():
            return _sealed(lane, batch, event, fact)
        case BatchCancelled():
            return _cancelled(lane, batch, event, fact)
        case BatchDeleted():
            return _deleted(lane, batch, event, fact)
        case UploadRetried():
            return _retried(lane, batch, upload, event, fact)
        case UploadStarted() | UploadInterrupted() | UploadAttemptFailed() | UploadSucceeded() | UploadFailed():
            return _worked(lane, batch, upload, event, fact)
        case BatchCompleted():
            return _completed(lane, batch, event, fact)
        case _:
            assert_never(event)


def step(lane: Lane, offset: int, timestamp_ms: int) -> None:
    """Move the lane past a record, decodable or not."""
    assert offset == lane.next_offset, f"record {lane.partition}-{offset} does not follow {lane.next_offset - 1}"
    lane.next_offset = offset + 1
    lane.time_ms = max(lane.time_ms, timestamp_ms)


def cancel_swept(upload: Upload, *, at_ms: int, offset: int) -> bool:
    """What a cancelled batch does to one of its uploads; whether it did anything."""
    if upload.ended:
        return False
    upload.status = "cancelled"
    upload.updated_ms = upload.completed_ms = at_ms
    upload.offset = offset
    return True


def _log_created(lane: Lane, event: LogCreated, fact: Fact) -> Changed | Ignored:
    if fact.offset != 0:
        return Ignored.MISPLACED
    lane.log_id = event.log_id
    return _LANE_CHANGED


def _claimed(lane: Lane, event: LaneClaimed, fact: Fact) -> Changed | Ignored:
    if event.after != lane.epoch:
        return Ignored.STALE_EPOCH
    lane.epoch = fact.offset
    return _LANE_CHANGED


def _batch_created(lane: Lane, batch: Batch | None, event: BatchCreated, fact: Fact) -> Changed | Ignored:
    if batch is not None:
        if batch.user_id != event.user_id:
            return Ignored.FOREIGN
        same = (batch.request_key_hash, batch.request_body_hash) == _fingerprint(event.request)
        return Ignored.REPETITION if same else Ignored.IDEMPOTENCY_KEY_REUSED
    key_hash, body_hash = _fingerprint(event.request)
    created = Batch(
        id=event.batch_id,
        partition=fact.partition,
        user_id=event.user_id,
        name=event.name,
        metadata=event.metadata,
        expected_uploads=event.expected_uploads,
        files_max=event.limits.files_max,
        batch_bytes_max=event.limits.batch_bytes_max,
        file_bytes_max=event.limits.file_bytes_max,
        request_key_hash=key_hash,
        request_body_hash=body_hash,
        created_ms=lane.time_ms,
        created_offset=fact.offset,
        updated_ms=lane.time_ms,
        offset=fact.offset,
        last_queued_ms=lane.time_ms,
        requests={key_hash: body_hash} if key_hash and body_hash else {},
        sealed=event.expected_uploads == 0,
    )
    return Changed(created)


def _upload_queued(
    lane: Lane, batch: Batch | None, upload: Upload | None, event: UploadQueued, fact: Fact
) -> Changed | Ignored:
    if repeated := _repeated_upload(batch, upload, event):
        return repeated
    if missing := _not_theirs(batch, event):
        return missing
    assert batch is not None
    if refused := _not_addable(batch, event):
        return refused
    key_hash, body_hash = _fingerprint(event.request)
    queued = Upload(
        id=event.upload_id,
        batch_id=event.batch_id,
        filename=event.filename,
        content_type=event.content_type,
        size_bytes=event.size_bytes,
        sha256=event.sha256,
        blob=event.blob,
        key_hash=key_hash,
        body_hash=body_hash,
        created_ms=lane.time_ms,
        created_offset=fact.offset,
        updated_ms=lane.time_ms,
        offset=fact.offset,
        place=fact.offset,
    )
    if key_hash and body_hash and batch.requests.get(key_hash) != body_hash:
        batch.requests = {**batch.requests, key_hash: body_hash}
    batch.queued += 1
    batch.size_bytes += event.size_bytes
    batch.last_queued_ms = lane.time_ms
    batch.sealed = batch.sealed or batch.total == batch.expected_uploads
    return _touched(lane, batch, fact, queued)


def _repeated_upload(batch: Batch | None, upload: Upload | None, event: UploadQueued) -> Ignored | None:
    """A second UploadQueued of one id: the same request again (a PUT, which has no key: the same bytes), or another
    one under the same key or name. Needs the batch: of a deleted one nothing is repeated."""
    if batch is None or batch.deleted or batch.user_id != event.user_id:
        return None
    if _key_reused(batch, event.request):
        return Ignored.IDEMPOTENCY_KEY_REUSED
    if upload is None:
        return None
    if event.request:
        same = (upload.batch_id, upload.sha256, upload.filename) == (event.batch_id, event.sha256, event.filename)
        return Ignored.REPETITION if same else Ignored.IDEMPOTENCY_KEY_REUSED
    same = (upload.batch_id, upload.sha256) == (event.batch_id, event.sha256)
    return Ignored.REPETITION if same else Ignored.FILENAME_TAKEN


def _not_addable(batch: Batch, event: UploadQueued) -> Ignored | None:
    if batch.ended:
        return Ignored.BATCH_ENDED
    if batch.sealed:
        return Ignored.BATCH_SEALED
    if event.size_bytes > batch.file_bytes_max:
        return Ignored.FILE_TOO_LARGE
    if batch.total >= batch.files_max:
        return Ignored.TOO_MANY_FILES
    if batch.size_bytes + event.size_bytes > batch.batch_bytes_max:
        return Ignored.BATCH_TOO_LARGE
    return None


def _sealed(lane: Lane, batch: Batch | None, event: BatchSealed, fact: Fact) -> Changed | Ignored:
    if missing := _not_theirs(batch, event):
        return missing
    assert batch is not None
    if _key_reused(batch, event.request):
        return Ignored.IDEMPOTENCY_KEY_REUSED
    if batch.sealed:
        return Ignored.REPETITION
    if batch.ended:
        return Ignored.BATCH_ENDED
    batch.sealed = True
    return _touched(lane, batch, fact)


def _cancelled(lane: Lane, batch: Batch | None, event: BatchCancelled, fact: Fact) -> Changed | Ignored:
    if missing := _not_theirs(batch, event):
        return missing
    assert batch is not None
    if batch.status == "cancelled":
        return Ignored.REPETITION
    if batch.ended:
        return Ignored.BATCH_ENDED
    batch.cancelled += batch.queued + batch.processing
    batch.queued = batch.processing = 0
    batch.status = "cancelled"
    batch.completed_ms = lane.time_ms
    return _touched(lane, batch, fact, swept="cancelled")


def _deleted(lane: Lane, batch: Batch | None, event: BatchDeleted, fact: Fact) -> Changed | Ignored:
    if batch is not None and batch.deleted and batch.user_id == event.user_id:
        return Ignored.REPETITION
    if missing := _not_theirs(batch, event):
        return missing
    assert batch is not None
    batch.deleted = True
    return _touched(lane, batch, fact, swept="deleted")


def _retried(
    lane: Lane, batch: Batch | None, upload: Upload | None, event: UploadRetried, fact: Fact
) -> Changed | Ignored:
    if missing := _not_theirs(batch, event):
        return missing
    assert batch is not None
    if upload is None or upload.batch_id != batch.id:
        return Ignored.UNKNOWN
    if event.request and event.request.key_hash == upload.key_hash:
        return Ignored.REPETITION if event.request.body_hash == upload.body_hash else Ignored.IDEMPOTENCY_KEY_REUSED
    if batch.status == "cancelled":
        return Ignored.BATCH_ENDED
    if upload.status != "failed" or event.queueing != upload.queueing + 1:
        return Ignored.NOT_FAILED
    if event.request:
        _note_retry(batch, event.request, fact.offset)
    batch.move("failed", "queued")
    if batch.ended:
        batch.status = "processing"
        batch.completed_ms = None
        batch.error_message = None
    upload.status = "queued"
    upload.queueing = event.queueing
    upload.attempts_before = upload.attempts
    upload.place = fact.offset
    upload.key_hash, upload.body_hash = _fingerprint(event.request)
    upload.error_code = upload.error_message = None
    upload.completed_ms = None
    return _touched(lane, batch, fact, upload)


_Attempt = UploadStarted | UploadInterrupted | UploadAttemptFailed | UploadSucceeded | UploadFailed


def _worked(lane: Lane, batch: Batch | None, upload: Upload | None, event: _Attempt, fact: Fact) -> Changed | Ignored:
    if refused := _not_workable(lane, batch, upload, event):
        return refused
    assert batch is not None
    assert upload is not None
    match event:
        case UploadStarted():
            _start(lane, batch, upload, event)
        case UploadInterrupted():
            _requeue(batch, upload)
            upload.attempts -= 1
        case UploadAttemptFailed():
            _requeue(batch, upload)
            upload.place = fact.offset
            upload.error_code, upload.error_message = event.error.code, event.error.message
        case UploadSucceeded():
            _end(lane, batch, upload, "completed")
            upload.result = event.result
            upload.error_code = upload.error_message = None
        case UploadFailed():
            _end(lane, batch, upload, "failed")
            upload.error_code, upload.error_message = event.error.code, event.error.message
        case _:
            assert_never(event)
    return _touched(lane, batch, fact, upload)


def _not_workable(lane: Lane, batch: Batch | None, upload: Upload | None, event: OfAttempt) -> Ignored | None:
    if batch is None or batch.deleted:
        return Ignored.UNKNOWN if batch is None else Ignored.DELETED
    if upload is None or upload.batch_id != batch.id:
        return Ignored.UNKNOWN
    if batch.ended:
        return Ignored.BATCH_ENDED
    if upload.ended:
        return Ignored.UPLOAD_ENDED
    if event.epoch != lane.epoch:
        return Ignored.STALE_EPOCH
    starting = isinstance(event, UploadStarted)
    expected_status, expected_attempt = ("queued", upload.attempts + 1) if starting else ("processing", upload.attempts)
    if upload.status != expected_status or event.attempt != expected_attempt:
        return Ignored.UNEXPECTED_ATTEMPT
    return None


def _start(lane: Lane, batch: Batch, upload: Upload, event: UploadStarted) -> None:
    batch.move("queued", "processing")
    batch.status = "processing"
    if batch.started_ms is None:
        batch.started_ms = lane.time_ms
    upload.status = "processing"
    upload.attempts = event.attempt
    upload.started_ms = lane.time_ms


def _requeue(batch: Batch, upload: Upload) -> None:
    batch.move("processing", "queued")
    upload.status = "queued"


def _end(lane: Lane, batch: Batch, upload: Upload, status: Literal["completed", "failed"]) -> None:
    batch.move("processing", status)
    upload.status = status
    upload.completed_ms = lane.time_ms


def completion(batch: Batch, *, epoch: int) -> BatchCompleted:
    """The BatchCompleted that agrees with the fold, for a batch that is `completable`."""
    return BatchCompleted(
        batch_id=batch.id,
        epoch=epoch,
        status="failed" if batch.total and not batch.completed else "completed",
        total_uploads=batch.total,
        successful_uploads=batch.completed,
        failed_uploads=batch.failed,
        cancelled_uploads=batch.cancelled,
    )


def _completed(lane: Lane, batch: Batch | None, event: BatchCompleted, fact: Fact) -> Changed | Ignored:
    if batch is None or batch.deleted:
        return Ignored.UNKNOWN if batch is None else Ignored.DELETED
    if batch.ended:
        return Ignored.BATCH_ENDED
    if event.epoch != lane.epoch:
        return Ignored.STALE_EPOCH
    if not batch.completable or event != completion(batch, epoch=event.epoch):
        return Ignored.COUNTS_DISAGREE
    batch.status = event.status
    batch.completed_ms = lane.time_ms
    batch.error_message = _sentence(batch) if event.status == "failed" else None
    return _touched(lane, batch, fact)


def _sentence(batch: Batch) -> str:
    return "Its only upload failed." if batch.total == 1 else f"None of its {batch.total} uploads succeeded."


def _not_theirs(batch: Batch | None, event: ByUser) -> Ignored | None:
    if batch is None:
        return Ignored.UNKNOWN
    if batch.user_id != event.user_id:
        return Ignored.FOREIGN
    return Ignored.DELETED if batch.deleted else None


def _key_reused(batch: Batch, request: Request | None) -> bool:
    """Whether the batch knows this key with another body: then no fact of the request may count, or half of what was
    answered with an error would be done."""
    return request is not None and batch.requests.get(request.key_hash, request.body_hash) != request.body_hash


def _note_retry(batch: Batch, request: Request, offset: int) -> None:
    known = batch.retries.get(request.key_hash, Retry(body_hash=request.body_hash, first=offset, last=offset))
    batch.retries = {**batch.retries, request.key_hash: {**known, "last": offset}}


def _fingerprint(request: Request | None) -> tuple[str | None, str | None]:
    return (request.key_hash, request.body_hash) if request else (None, None)


def _touched(
    lane: Lane,
    batch: Batch,
    fact: Fact,
    upload: Upload | None = None,
    swept: Literal["cancelled", "deleted"] | None = None,
) -> Changed:
    batch.updated_ms = lane.time_ms
    batch.offset = fact.offset
    if upload is not None:
        upload.updated_ms = lane.time_ms
        upload.offset = fact.offset
    return Changed(batch, upload, swept)


__all__ = [
    "ATTEMPTS_PER_QUEUEING",
    "CODE_OF",
    "Batch",
    "Changed",
    "Ignored",
    "Lane",
    "LogEvent",
    "Retry",
    "Upload",
    "cancel_swept",
    "completion",
    "evolve",
    "step",
]
