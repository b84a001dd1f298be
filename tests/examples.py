"""Ready-made events, and logs made of them: what tests fold, store and send.

Everything is the same in every run: ids, times and bytes come from arguments alone. A log usually begins with
`OPENING` (the log's first record and a worker's claim), after which `EPOCH` is the epoch of the worker's facts:
`log_of(*OPENING, a_batch_created(), an_upload_queued(), …)`. `fold` is the plainest fold there is, over dicts; the
services' folds must agree with it.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, cancel_swept, evolve, step
from schemas.events import (
    BatchCancelled,
    BatchCompleted,
    BatchCreated,
    BatchDeleted,
    BatchSealed,
    Envelope,
    Erased,
    Fact,
    Failure,
    LaneClaimed,
    Limits,
    LogCreated,
    LogEvent,
    Request,
    Undecodable,
    UploadAttemptFailed,
    UploadFailed,
    UploadInterrupted,
    UploadProgressed,
    UploadQueued,
    UploadRetried,
    UploadStarted,
    UploadSucceeded,
    decode,
    encode,
)
from schemas.ids import derived_id
from schemas.records import StoredRecord

START_MS = 1_767_268_800_000
"""When example logs begin: 2026-01-01T12:00:00Z; their records are a second apart."""
STEP_MS = 1_000
LOG_ID = "1f3a9c02-5b7e-7d41-9c00-3f2a6b8d4e00"
USER = "ada"
OTHER_USER = "grace"


def an_id(*parts: str | int, partition: int = 0) -> str:
    """The same id for the same parts, in the given partition."""
    return derived_id("example", *parts, partition=partition)


def a_sha256(text: str) -> str:
    """The hex SHA-256 of a text: what stands for the content of a file."""
    return hashlib.sha256(text.encode()).hexdigest()


BATCH = an_id("batch", 1)
OTHER_BATCH = an_id("batch", 2)
UPLOAD = an_id("upload", 1)
OTHER_UPLOAD = an_id("upload", 2)
EPOCH = 1
"""The epoch of the claim in `OPENING`."""
LIMITS = Limits(files_max=1_000, batch_bytes_max=10_000_000_000, file_bytes_max=100_000_000)
RESULT: dict[str, Any] = {
    "kind": "image",
    "format": "jpeg",
    "width": 640,
    "height": 480,
    "frames": 1,
    "exif": {"Model": "Brownie"},
    "taken_at": "2025-12-24T18:00:00Z",
    "phash": "c3d2e1f0a5b49687",
    "blurhash": "LEHV6nWB2yk8pyo0adR*.7kCMdnj",
    "thumbnail": {"width": 256, "height": 192, "size_bytes": 9_000},
}


def a_request(key: str = "a key", body: str = "a body") -> Request:
    """The fingerprint of a request with this Idempotency-Key and body."""
    return Request(key_hash=a_sha256(f"key:{key}"), body_hash=a_sha256(f"body:{body}"))


def a_log_created(**changes: Any) -> LogCreated:
    return LogCreated(**{"log_id": LOG_ID, **changes})


def a_lane_claimed(after: int | None = None, worker_id: str = "worker-1") -> LaneClaimed:
    return LaneClaimed(worker_id=worker_id, after=after)


OPENING: tuple[LogEvent, ...] = (a_log_created(), a_lane_claimed())


def a_batch_created(batch_id: str = BATCH, **changes: Any) -> BatchCreated:
    return BatchCreated(**{"batch_id": batch_id, "user_id": USER, "name": "holiday", "limits": LIMITS, **changes})


def an_upload_queued(upload_id: str = UPLOAD, batch_id: str = BATCH, **changes: Any) -> UploadQueued:
    """A file whose name, content and blob follow from its id."""
    given = {
        "upload_id": upload_id,
        "batch_id": batch_id,
        "user_id": USER,
        "filename": f"{upload_id[:8]}.jpg",
        "content_type": "image/jpeg",
        "size_bytes": 1_000,
        "sha256": a_sha256(upload_id),
        "blob": f"{upload_id}/{a_sha256(upload_id)[:16]}",
    }
    return UploadQueued(**{**given, **changes})


def a_batch_sealed(batch_id: str = BATCH, **changes: Any) -> BatchSealed:
    return BatchSealed(**{"batch_id": batch_id, "user_id": USER, **changes})


def a_batch_cancelled(batch_id: str = BATCH, **changes: Any) -> BatchCancelled:
    return BatchCancelled(**{"batch_id": batch_id, "user_id": USER, **changes})


def a_batch_deleted(batch_id: str = BATCH, **changes: Any) -> BatchDeleted:
    return BatchDeleted(**{"batch_id": batch_id, "user_id": USER, **changes})


def an_upload_retried(
    upload_id: str = UPLOAD, batch_id: str = BATCH, *, queueing: int = 2, **changes: Any
) -> UploadRetried:
    return UploadRetried(
        **{"upload_id": upload_id, "batch_id": batch_id, "user_id": USER, "queueing": queueing, **changes}
    )


def an_upload_started(
    upload_id: str = UPLOAD, batch_id: str = BATCH, *, attempt: int = 1, epoch: int = EPOCH
) -> UploadStarted:
    return UploadStarted(upload_id=upload_id, batch_id=batch_id, attempt=attempt, epoch=epoch)


def an_upload_interrupted(
    upload_id: str = UPLOAD, batch_id: str = BATCH, *, attempt: int = 1, epoch: int = EPOCH, reason: str = "shutdown"
) -> UploadInterrupted:
    return UploadInterrupted(upload_id=upload_id, batch_id=batch_id, attempt=attempt, epoch=epoch, reason=reason)


def an_upload_attempt_failed(
    upload_id: str = UPLOAD,
    batch_id: str = BATCH,
    *,
    attempt: int = 1,
    epoch: int = EPOCH,
    code: str = "worker_crashed",
    message: str = "The worker died of signal 11.",
) -> UploadAttemptFailed:
    error = Failure(code=code, message=message)
    return UploadAttemptFailed(upload_id=upload_id, batch_id=batch_id, attempt=attempt, epoch=epoch, error=error)


def an_upload_succeeded(
    upload_id: str = UPLOAD, batch_id: str = BATCH, *, attempt: int = 1, epoch: int = EPOCH, **changes: Any
) -> UploadSucceeded:
    given = {"upload_id": upload_id, "batch_id": batch_id, "attempt": attempt, "epoch": epoch}
    return UploadSucceeded(**{**given, "result": copy.deepcopy(RESULT), "duration_ms": 12, **changes})


def an_upload_failed(
    upload_id: str = UPLOAD,
    batch_id: str = BATCH,
    *,
    attempt: int = 1,
    epoch: int = EPOCH,
    code: str = "corrupt_media",
    message: str = "The file is not a picture.",
) -> UploadFailed:
    error = Failure(code=code, message=message)
    return UploadFailed(upload_id=upload_id, batch_id=batch_id, attempt=attempt, epoch=epoch, error=error)


def a_batch_completed(batch_id: str = BATCH, *, epoch: int = EPOCH, **changes: Any) -> BatchCompleted:
    """Of a batch whose only upload succeeded, unless told otherwise."""
    counts = {"total_uploads": 1, "successful_uploads": 1, "failed_uploads": 0, "cancelled_uploads": 0}
    return BatchCompleted(**{"batch_id": batch_id, "epoch": epoch, "status": "completed", **counts, **changes})


def an_upload_progressed(
    upload_id: str = UPLOAD, batch_id: str = BATCH, *, attempt: int = 1, epoch: int = EPOCH, **changes: Any
) -> UploadProgressed:
    given = {"upload_id": upload_id, "batch_id": batch_id, "attempt": attempt, "epoch": epoch}
    return UploadProgressed(**{**given, "stage": "decode", "percent": 40, **changes})


def an_erased(batch_id: str = BATCH, upload_id: str | None = None, *, event: str = "BatchCreated") -> Erased:
    return Erased(f"sluice.{event}.v1", batch_id, upload_id)


def one_of_each() -> list[LogEvent]:
    """Every type of event of the log once, as examples of shape; not a log that makes sense."""
    return [
        a_log_created(),
        a_batch_created(metadata={"trip": "Iceland"}, expected_uploads=2, request=a_request()),
        an_upload_queued(request=a_request()),
        a_batch_sealed(),
        a_batch_cancelled(),
        a_batch_deleted(),
        an_upload_retried(),
        a_lane_claimed(),
        an_upload_started(),
        an_upload_interrupted(),
        an_upload_attempt_failed(),
        an_upload_succeeded(),
        an_upload_failed(),
        a_batch_completed(),
    ]


def a_finished_batch(
    batch_id: str = BATCH, upload_ids: Iterable[str] = (UPLOAD,), *, epoch: int = EPOCH
) -> list[LogEvent]:
    """The facts of a batch from its creation to its completion, every upload a success at first attempt."""
    uploads = list(upload_ids)
    facts: list[LogEvent] = [a_batch_created(batch_id)]
    facts += [an_upload_queued(upload_id, batch_id) for upload_id in uploads]
    facts.append(a_batch_sealed(batch_id))
    for upload_id in uploads:
        facts.append(an_upload_started(upload_id, batch_id, epoch=epoch))
        facts.append(an_upload_succeeded(upload_id, batch_id, epoch=epoch))
    counts = {"total_uploads": len(uploads), "successful_uploads": len(uploads)}
    facts.append(a_batch_completed(batch_id, epoch=epoch, **counts))
    return facts


def log_of(
    *events: LogEvent | Erased,
    partition: int = 0,
    first_offset: int = 0,
    first_ms: int = START_MS,
    step_ms: int = STEP_MS,
) -> list[Fact]:
    """These events as they stand in one partition of a log, one after the other, `step_ms` apart."""
    return [
        Fact(
            partition=partition,
            offset=offset,
            timestamp_ms=first_ms + (offset - first_offset) * step_ms,
            id=an_id("event", partition, offset),
            event=event,
        )
        for offset, event in enumerate(events, start=first_offset)
    ]


def stored(fact: Fact) -> StoredRecord:
    """The record that says this fact."""
    envelope = Envelope(id=fact.id, source="/sluice/tests", time="2026-01-01T12:00:00Z")
    if isinstance(fact.event, Erased):
        return _stored_erased(fact, fact.event, envelope)
    new = encode(fact.event, envelope)
    return StoredRecord(fact.partition, fact.offset, fact.timestamp_ms, new.key, new.value, new.headers)


def _stored_erased(fact: Fact, event: Erased, envelope: Envelope) -> StoredRecord:
    ids = {"batch_id": event.batch_id} | ({"upload_id": event.upload_id} if event.upload_id else {})
    headers = {
        "ce_specversion": "1.0",
        "ce_id": envelope.id,
        "ce_source": envelope.source,
        "ce_type": event.type,
        "ce_time": envelope.time,
        "content-type": "application/json",
        "ce_subject": event.upload_id or event.batch_id,
    }
    return StoredRecord(
        partition=fact.partition,
        offset=fact.offset,
        timestamp_ms=fact.timestamp_ms,
        key=event.batch_id.encode(),
        value=json.dumps({"erased": True, **ids}).encode(),
        headers=tuple((name, value.encode()) for name, value in headers.items()),
    )


def records_of(
    *events: LogEvent | Erased,
    partition: int = 0,
    first_offset: int = 0,
    first_ms: int = START_MS,
    step_ms: int = STEP_MS,
) -> list[StoredRecord]:
    """`log_of` as the bytes in Kafka."""
    facts = log_of(*events, partition=partition, first_offset=first_offset, first_ms=first_ms, step_ms=step_ms)
    return [stored(fact) for fact in facts]


@dataclass
class State:
    """A whole folded log. Of a deleted batch the tombstone stays (`deleted` is true) and its uploads go.

    `outcomes` has one entry a fact, in the order they were folded: what `evolve` said to it.
    """

    lanes: dict[int, Lane] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    outcomes: list[Changed | Ignored] = field(default_factory=list)

    @property
    def lane(self) -> Lane:
        """The lane of a log with one partition."""
        (lane,) = self.lanes.values()
        return lane

    @property
    def ignored(self) -> list[Ignored]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Ignored)]

    @property
    def last(self) -> Changed | Ignored:
        return self.outcomes[-1]

    def uploads_of(self, batch_id: str) -> list[Upload]:
        return [upload for upload in self.uploads.values() if upload.batch_id == batch_id]

    def apply(self, fact: Fact | Undecodable) -> Changed | Ignored | None:
        """Fold one more fact; None for a record that says nothing."""
        lane = self.lanes.setdefault(fact.partition, Lane(fact.partition))
        step(lane, fact.offset, fact.timestamp_ms)
        if isinstance(fact, Undecodable):
            return None
        outcome = evolve(lane, self.batches.get(fact.batch_id or ""), self.uploads.get(fact.upload_id or ""), fact)
        self.outcomes.append(outcome)
        if isinstance(outcome, Changed):
            self._store(outcome, at_ms=lane.time_ms, offset=fact.offset)
        return outcome

    def _store(self, changed: Changed, *, at_ms: int, offset: int) -> None:
        if changed.batch is not None:
            self.batches[changed.batch.id] = changed.batch
        if changed.upload is not None:
            self.uploads[changed.upload.id] = changed.upload
        if changed.batch is None or changed.swept is None:
            return
        for upload in self.uploads_of(changed.batch.id):
            if changed.swept == "deleted":
                del self.uploads[upload.id]
            else:
                cancel_swept(upload, at_ms=at_ms, offset=offset)


def fold(facts: Iterable[Fact | StoredRecord], onto: State | None = None) -> State:
    """The state after these facts (or records), from nothing or from a copy of the state before them."""
    state = copy.deepcopy(onto) if onto is not None else State()
    for fact in facts:
        state.apply(decode(fact) if isinstance(fact, StoredRecord) else fact)
    return state
