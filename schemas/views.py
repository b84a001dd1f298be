"""What callers are shown of the state: the same shapes over HTTP, WebSocket and in the command line's JSON.

Times are RFC 3339 in UTC with milliseconds. `position` is that of the thing's newest effective fact.
"""

from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from schemas.batch import Batch, Upload
from schemas.events import EventView
from schemas.position import Position

BatchStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]
UploadStatus = Literal["queued", "processing", "completed", "failed", "cancelled"]


def rfc3339(time_ms: int) -> str:
    """A time in milliseconds since 1970 UTC as text, such as 2026-01-31T12:00:00.123Z."""
    seconds, millis = divmod(time_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{millis:03d}Z"


def _optional(time_ms: int | None) -> str | None:
    return None if time_ms is None else rfc3339(time_ms)


class View(BaseModel):
    """A shape that goes out to callers; new members may be added."""

    model_config = ConfigDict(frozen=True)


class ErrorView(View):
    code: str
    message: str


def progress_of(batch: Batch) -> float:
    """The share of uploads that came to an end, 0 to 1; an empty batch is at 1 once it ended."""
    if batch.total == 0:
        return 1.0 if batch.ended else 0.0
    return (batch.completed + batch.failed + batch.cancelled) / batch.total


class BatchCounts(View):
    """A batch's state in brief, as it goes with each event: the counts after it."""

    id: str
    status: BatchStatus
    sealed: bool
    total_uploads: int
    processed_uploads: int
    successful_uploads: int
    failed_uploads: int
    cancelled_uploads: int
    progress: float

    @classmethod
    def of(cls, batch: Batch) -> Self:
        return cls(**_counts(batch))


class BatchView(BatchCounts):
    name: str | None
    user_id: str
    expected_uploads: int | None
    error_message: str | None
    metadata: dict[str, Any]
    created_at: str
    updated_at: str
    started_at: str | None
    completed_at: str | None
    position: str

    @classmethod
    def of_log(cls, batch: Batch, *, log_id: str) -> Self:
        return cls(
            **_counts(batch),
            name=batch.name,
            user_id=batch.user_id,
            expected_uploads=batch.expected_uploads,
            error_message=batch.error_message,
            metadata=batch.metadata,
            created_at=rfc3339(batch.created_ms),
            updated_at=rfc3339(batch.updated_ms),
            started_at=_optional(batch.started_ms),
            completed_at=_optional(batch.completed_ms),
            position=str(Position.of(log_id, {batch.partition: batch.offset})),
        )


class UploadView(View):
    id: str
    batch_id: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    status: UploadStatus
    attempts: int
    error: ErrorView | None
    result: dict[str, Any] | None
    created_at: str
    updated_at: str
    started_at: str | None
    completed_at: str | None
    position: str

    @classmethod
    def of_log(cls, upload: Upload, *, log_id: str, partition: int) -> Self:
        error = None
        if upload.error_code is not None:
            error = ErrorView(code=upload.error_code, message=upload.error_message or "")
        return cls(
            id=upload.id,
            batch_id=upload.batch_id,
            filename=upload.filename,
            content_type=upload.content_type,
            size_bytes=upload.size_bytes,
            sha256=upload.sha256,
            status=upload.status,
            attempts=upload.attempts,
            error=error,
            result=upload.result,
            created_at=rfc3339(upload.created_ms),
            updated_at=rfc3339(upload.updated_ms),
            started_at=_optional(upload.started_ms),
            completed_at=_optional(upload.completed_ms),
            position=str(Position.of(log_id, {partition: upload.offset})),
        )


class Rejected(View):
    """A file that was not taken, and why."""

    filename: str
    code: str
    detail: str


class Added(View):
    """The answer to a request that brought files."""

    accepted: list[UploadView]
    rejected: list[Rejected]


class BatchAdded(Added):
    batch: BatchView


class BatchPage(View):
    """`next_cursor` asks for the next page; null at the end."""

    items: list[BatchView]
    next_cursor: str | None


class UploadPage(View):
    items: list[UploadView]
    next_cursor: str | None


class PastEvent(EventView, View):
    """A fact in a batch's history. `ignored`: why it had no effect; null where it had."""

    position: str
    ignored: str | None


class EventPage(View):
    items: list[PastEvent]
    next_cursor: str | None


class ProcessorView(View):
    """A processor, as it said itself `heard_s` seconds ago. `epoch`: of its claim of the lane, null while it stands by;
    `working_since`: when it began with the file in work; `degraded`: what it goes on without; `problems`: what stops
    it."""

    partition: int
    worker_id: str
    state: Literal["standing by", "catching up", "working"]
    since: str
    heard_s: float
    epoch: int | None
    working_since: str | None
    attempt: int | None
    degraded: list[str]
    problems: list[str]


class StatusView(View):
    """How the service is: `head` and `projected` are positions, `lag` the records between them."""

    mode: Literal["full", "degraded"]
    degraded: list[str]
    version: str
    head: str | None
    projected: str | None
    lag: int | None
    oldest_unfinished_s: float | None = Field(
        description="age in seconds of the oldest unfinished step: a fact the read models do not have yet, an upload "
        "that waits or is in work, a batch that is due to complete; null where there is none"
    )
    processors: list[ProcessorView]


class LimitsView(View):
    files_max: int
    batch_bytes_max: int
    file_bytes_max: int
    content_types: list[str]


class ConfigView(View):
    notifier_url: str
    version: str
    limits: LimitsView


def _counts(batch: Batch) -> dict[str, Any]:
    return {
        "id": batch.id,
        "status": batch.status,
        "sealed": batch.sealed,
        "total_uploads": batch.total,
        "processed_uploads": batch.completed + batch.failed,
        "successful_uploads": batch.completed,
        "failed_uploads": batch.failed,
        "cancelled_uploads": batch.cancelled,
        "progress": progress_of(batch),
    }
