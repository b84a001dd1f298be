"""The facts: every event of the log as a frozen model, and how each lies in Kafka (CloudEvents 1.0, binary mode).

An event holds plain values and no behaviour. Its fields are for ever: recorded logs must decode for as long as Sluice
lives, so a field may be added, never changed or taken away. What an event means stands in `schemas.batch` alone.
Decoding is a pure function of the record's bytes and partition: what cannot be decoded is `Undecodable` for every
reader, with the same reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from schemas.ids import is_id, partition_of
from schemas.records import NewRecord, StoredRecord
from schemas.text import (
    ERROR_MESSAGE_CHARACTERS_MAX,
    NAME_CHARACTERS_MAX,
    STORABLE,
    USER_ID_CHARACTERS_MAX,
    Filename,
    Metadata,
    Result,
)

LOG_TOPIC = "sluice.events"
PROGRESS_TOPIC = "sluice.progress"
CONTENT_TYPE = "application/json"

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UserId = Annotated[str, Field(min_length=1, max_length=USER_ID_CHARACTERS_MAX), STORABLE]
Reason = Annotated[str, Field(max_length=500), STORABLE]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[int, Field(ge=1, lt=2**31)]
Offset = Annotated[int, Field(ge=0, lt=2**63)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
_LEFT_OUT_IF_NULL = Field(exclude_if=lambda value: value is None)


class Shape(BaseModel):
    """A frozen value; fields it does not know are those of a newer version and are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Request(Shape):
    """The fingerprint of an idempotent request: hex SHA-256 of its scoped key, and of its body."""

    key_hash: Sha256
    body_hash: Sha256


class Limits(Shape):
    """What binds a batch for ever: most files, most bytes together, most bytes of one file."""

    files_max: Count
    batch_bytes_max: Bytes
    file_bytes_max: Bytes


class Failure(Shape):
    """Why an attempt failed: one of the work codes, and a sentence for people."""

    code: Annotated[str, Field(min_length=1, max_length=64), STORABLE]
    message: Annotated[str, Field(max_length=ERROR_MESSAGE_CHARACTERS_MAX), STORABLE]


class PreviousLog(Shape):
    """A log this one was imported from; its positions below `next_offset` are still valid."""

    log_id: Id
    next_offset: Offset


class LogCreated(Shape):
    """The log's first record, at offset 0 of every partition; anywhere else it means nothing."""

    type: Literal["sluice.LogCreated.v1"] = "sluice.LogCreated.v1"
    log_id: Id
    previous: Annotated[tuple[PreviousLog, ...] | None, Field(strict=False), _LEFT_OUT_IF_NULL] = None


class OfBatch(Shape):
    """A fact about a batch or one of its uploads."""

    batch_id: Id


class ByUser(OfBatch):
    """A fact a user brought about through the api (or the processor for them)."""

    user_id: UserId
    request: Annotated[Request | None, _LEFT_OUT_IF_NULL] = None


class BatchCreated(ByUser):
    """A user made a batch; its limits bind it for ever."""

    type: Literal["sluice.BatchCreated.v1"] = "sluice.BatchCreated.v1"
    name: Annotated[str, Field(max_length=NAME_CHARACTERS_MAX), STORABLE] | None = None
    expected_uploads: Annotated[Count | None, _LEFT_OUT_IF_NULL] = None
    metadata: Metadata = Field(default_factory=dict)
    limits: Limits


class UploadQueued(ByUser):
    """A file's bytes are in the blob store and wait to be worked."""

    type: Literal["sluice.UploadQueued.v1"] = "sluice.UploadQueued.v1"
    upload_id: Id
    filename: Filename
    content_type: Annotated[str, Field(min_length=1, max_length=255), STORABLE]
    size_bytes: Bytes
    sha256: Sha256
    blob: Annotated[str, Field(min_length=1, max_length=512), STORABLE]


class BatchSealed(ByUser):
    """The batch takes no more files; `reason` is `idle` where the processor sealed it."""

    type: Literal["sluice.BatchSealed.v1"] = "sluice.BatchSealed.v1"
    reason: Annotated[Reason | None, _LEFT_OUT_IF_NULL] = None


class BatchCancelled(ByUser):
    """Everything in the batch that has not ended is cancelled, at once."""

    type: Literal["sluice.BatchCancelled.v1"] = "sluice.BatchCancelled.v1"
    reason: Annotated[Reason | None, _LEFT_OUT_IF_NULL] = None


class BatchDeleted(ByUser):
    """The batch is gone; a tombstone is left."""

    type: Literal["sluice.BatchDeleted.v1"] = "sluice.BatchDeleted.v1"
    reason: Annotated[Reason | None, _LEFT_OUT_IF_NULL] = None


class UploadRetried(ByUser):
    """A failed upload is queued again, for the `queueing`th time."""

    type: Literal["sluice.UploadRetried.v1"] = "sluice.UploadRetried.v1"
    upload_id: Id
    queueing: Annotated[int, Field(ge=2, lt=2**31)]


class LaneClaimed(Shape):
    """A worker takes the lane; the record's offset becomes its epoch."""

    type: Literal["sluice.LaneClaimed.v1"] = "sluice.LaneClaimed.v1"
    worker_id: Annotated[str, Field(min_length=1, max_length=255), STORABLE]
    after: Offset | None


class OfAttempt(OfBatch):
    """A fact of the lane about one attempt, under the epoch of the worker that says it."""

    upload_id: Id
    attempt: Number
    epoch: Offset


class UploadStarted(OfAttempt):
    """The work on an upload begins; said before it does."""

    type: Literal["sluice.UploadStarted.v1"] = "sluice.UploadStarted.v1"


class UploadInterrupted(OfAttempt):
    """Given back unharmed; the attempt's number is used again."""

    type: Literal["sluice.UploadInterrupted.v1"] = "sluice.UploadInterrupted.v1"
    reason: Reason


class UploadAttemptFailed(OfAttempt):
    """The attempt failed and another one follows."""

    type: Literal["sluice.UploadAttemptFailed.v1"] = "sluice.UploadAttemptFailed.v1"
    error: Failure


class UploadSucceeded(OfAttempt):
    """The upload is done; `result` is what its handler found."""

    type: Literal["sluice.UploadSucceeded.v1"] = "sluice.UploadSucceeded.v1"
    result: Result
    duration_ms: Bytes


class UploadFailed(OfAttempt):
    """The upload failed for good, until a person retries it."""

    type: Literal["sluice.UploadFailed.v1"] = "sluice.UploadFailed.v1"
    error: Failure


class BatchCompleted(OfBatch):
    """Every upload of a sealed batch ended; counts only if it agrees with the facts before it."""

    type: Literal["sluice.BatchCompleted.v1"] = "sluice.BatchCompleted.v1"
    epoch: Offset
    status: Literal["completed", "failed"]
    total_uploads: Count
    successful_uploads: Count
    failed_uploads: Count
    cancelled_uploads: Count


class UploadProgressed(OfAttempt):
    """How far the attempt in work is, from the work itself; on the progress topic, never in the log."""

    type: Literal["sluice.UploadProgressed.v1"] = "sluice.UploadProgressed.v1"
    stage: Annotated[str, Field(min_length=1, max_length=64), STORABLE]
    percent: Annotated[int, Field(ge=0, le=100)]


BatchEvent = (
    BatchCreated
    | UploadQueued
    | BatchSealed
    | BatchCancelled
    | BatchDeleted
    | UploadRetried
    | UploadStarted
    | UploadInterrupted
    | UploadAttemptFailed
    | UploadSucceeded
    | UploadFailed
    | BatchCompleted
)
LogEvent = LogCreated | LaneClaimed | BatchEvent
Event = Annotated[LogEvent, Field(discriminator="type")]
EVENT: TypeAdapter[LogEvent] = TypeAdapter(Event)

type_of: dict[str, type[LogEvent]] = {model.model_fields["type"].default: model for model in get_args(LogEvent)}
WITH_UPLOAD = frozenset(name for name, model in type_of.items() if "upload_id" in model.model_fields)
_OF_BATCH = frozenset(name for name, model in type_of.items() if "batch_id" in model.model_fields)


@dataclass(frozen=True, slots=True)
class Erased:
    """A fact of a batch whose content was erased from the log; only its ids are left."""

    type: str
    batch_id: str
    upload_id: str | None


@dataclass(frozen=True, slots=True)
class Fact:
    """An event where it stands in the log. `timestamp_ms`: the broker's, in milliseconds since 1970 UTC."""

    partition: int
    offset: int
    timestamp_ms: int
    id: str
    event: LogEvent | Erased

    @property
    def batch_id(self) -> str | None:
        return None if isinstance(self.event, LogCreated | LaneClaimed) else self.event.batch_id

    @property
    def upload_id(self) -> str | None:
        return cast("str | None", getattr(self.event, "upload_id", None))


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A record that says nothing to this version of Sluice: it goes into quarantine, and the lane goes on."""

    partition: int
    offset: int
    timestamp_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class Envelope:
    """What goes around an event when it is written: CloudEvents attributes. `time` is RFC 3339 and informational."""

    id: str
    source: str
    time: str
    traceparent: str | None = None


def encode(event: LogEvent | UploadProgressed, envelope: Envelope) -> NewRecord:
    """The record to append: CloudEvents attributes as headers, the data as UTF-8 JSON, the batch id as key."""
    batch_id = None if isinstance(event, LogCreated | LaneClaimed) else event.batch_id
    subject = getattr(event, "upload_id", None) or batch_id
    headers = [
        ("ce_specversion", "1.0"),
        ("ce_id", envelope.id),
        ("ce_source", envelope.source),
        ("ce_type", event.type),
        ("ce_time", envelope.time),
        ("content-type", CONTENT_TYPE),
    ]
    if subject:
        headers.append(("ce_subject", subject))
    if envelope.traceparent:
        headers.append(("traceparent", envelope.traceparent))
    return NewRecord(
        key=batch_id.encode() if batch_id else None,
        value=event.model_dump_json(exclude={"type"}).encode(),
        headers=tuple((name, value.encode()) for name, value in headers),
    )


class _Erasure(BaseModel):
    """Data of which only the ids are left."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    erased: Literal[True]
    batch_id: Id
    upload_id: Id | None = None


class _UndecodableError(Exception):
    """Carries the reason out of the steps of `decode`."""


def decode(record: StoredRecord) -> Fact | Undecodable:
    """What the record says; `Undecodable` with the reason where it says nothing. Never raises."""
    try:
        event_type, event_id = _attributes(record.headers)
        event = _event(event_type, record.value)
        _check_place(event, record)
    except _UndecodableError as error:
        return Undecodable(record.partition, record.offset, record.timestamp_ms, str(error))
    return Fact(record.partition, record.offset, record.timestamp_ms, event_id, event)


def decode_progress(record: StoredRecord) -> UploadProgressed | None:
    """The progress a record of the progress topic tells; None where it tells none."""
    try:
        return UploadProgressed.model_validate_json(record.value or b"")
    except ValidationError:
        return None


def _attributes(headers: Iterable[tuple[str, bytes]]) -> tuple[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        if name not in ("ce_specversion", "ce_type", "ce_id", "content-type"):
            continue
        if name in found:
            raise _UndecodableError(f"the header {name} stands twice")
        try:
            found[name] = (value or b"").decode()
        except UnicodeDecodeError:
            raise _UndecodableError(f"the header {name} is not UTF-8") from None
    if found.get("ce_specversion") != "1.0":
        raise _UndecodableError(f"ce_specversion is {found.get('ce_specversion')!r:.60}, not '1.0'")
    if found.get("content-type", CONTENT_TYPE) != CONTENT_TYPE:
        raise _UndecodableError(f"content-type is {found['content-type']!r:.60}, not {CONTENT_TYPE!r}")
    if found.get("ce_type") not in type_of:
        raise _UndecodableError(f"ce_type {found.get('ce_type')!r:.120} is not known to this version")
    if not is_id(found.get("ce_id", "")):
        raise _UndecodableError(f"ce_id {found.get('ce_id')!r:.60} is not a UUID")
    return found["ce_type"], found["ce_id"]


def _event(event_type: str, value: bytes | None) -> LogEvent | Erased:
    if value is None:
        raise _UndecodableError("a tombstone: the record has no value")
    try:
        return type_of[event_type].model_validate_json(value)
    except ValidationError as error:
        if event_type in _OF_BATCH and b'"erased"' in value and (erasure := _erasure(value)):
            return Erased(event_type, erasure.batch_id, erasure.upload_id)
        raise _UndecodableError(_complaint(event_type, error)) from None


def _erasure(value: bytes) -> _Erasure | None:
    try:
        return _Erasure.model_validate_json(value)
    except ValidationError:
        return None


def _complaint(event_type: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "data"
    return f"{event_type}: {place}: {first['msg']}"[:500]


def _check_place(event: LogEvent | Erased, record: StoredRecord) -> None:
    batch_id = None if isinstance(event, LogCreated | LaneClaimed) else event.batch_id
    expected_key = batch_id.encode() if batch_id else None
    if record.key != expected_key:
        raise _UndecodableError(f"the record's key is {record.key!r:.60}, its batch is {batch_id}")
    upload_id: str | None = getattr(event, "upload_id", None)
    for kind, identifier in (("batch", batch_id), ("upload", upload_id)):
        if identifier and partition_of(identifier) != record.partition:
            raise _UndecodableError(f"{kind} {identifier} belongs to partition {partition_of(identifier)}")


class EventView(BaseModel):
    """An event as callers see it: no `blob`, since where bytes lie is nobody's business."""

    id: str
    type: str
    time: str
    data: dict[str, Any]

    @classmethod
    def of(cls, fact: Fact, *, time: str) -> Self:
        return cls(id=fact.id, type=fact.event.type, time=time, data=public_data(fact.event))


def public_data(event: LogEvent | Erased) -> dict[str, Any]:
    """The event's data without what callers must not see (`blob`, fingerprints of requests)."""
    if isinstance(event, Erased):
        return {"erased": True, "batch_id": event.batch_id, "upload_id": event.upload_id}
    return event.model_dump(mode="json", exclude={"type", "blob", "request"})
