"""Examples for the OpenAPI document: one small batch at three moments, built from the views themselves, so they cannot
differ from what is answered. Pure."""

from typing import Any

from pydantic import BaseModel

from schemas.batch import Batch, Upload
from schemas.errors import Code, RequestError, problem
from schemas.events import UploadSucceeded
from schemas.requests import CONTENT_TYPES
from schemas.views import (
    Added,
    BatchAdded,
    BatchPage,
    BatchView,
    ConfigView,
    EventPage,
    LimitsView,
    PastEvent,
    ProcessorView,
    Rejected,
    StatusView,
    UploadPage,
    UploadView,
    rfc3339,
)

BATCH_ID = "019c13a8-7b6e-7a31-9d5e-3f0c6b1d2a00"
UPLOAD_ID = "019c13a8-7b6f-7c52-8e0a-5d4b9c7e1f00"
EVENT_ID = "019c13a8-7f01-7e11-8a44-2c6d8e9f0b00"
POSITION = "1f3a9c02.0-1234"
CURSOR = "dS4xMjMwLi0"
KEY = "holiday-2026-01-31"
_LOG_ID = "1f3a9c02-5b7d-4e8f-9a10-b2c3d4e5f607"
_MADE_MS = 1_769_860_800_000
_SHA256 = "3f0c6b1d2a005d4b9c7e1f002c6d8e9f0b0019c13a87b6e7a319d5e8e0a4411a"
_PHASH = "c3d4e5f60718293a"


def _batch(*, done: bool) -> Batch:
    batch = Batch(
        id=BATCH_ID,
        partition=0,
        user_id="ada",
        name="Iceland",
        metadata={"trip": "Iceland"},
        expected_uploads=None,
        files_max=1_000,
        batch_bytes_max=10_000_000_000,
        file_bytes_max=100_000_000,
        request_key_hash=None,
        request_body_hash=None,
        created_ms=_MADE_MS,
        created_offset=1_228,
        updated_ms=_MADE_MS,
        offset=1_230,
        last_queued_ms=_MADE_MS,
        sealed=True,
    )
    batch.queued, batch.completed = (0, 1) if done else (1, 0)
    if done:
        batch.status, batch.offset = "completed", 1_234
        batch.started_ms, batch.completed_ms = _MADE_MS + 4, _MADE_MS + 61
        batch.updated_ms = _MADE_MS + 61
    return batch


_RESULT: dict[str, Any] = {
    "kind": "image",
    "format": "jpeg",
    "width": 4_032,
    "height": 3_024,
    "frames": 1,
    "exif": {"Make": "Canon"},
    "taken_at": "2026-01-30T16:20:00",
    "phash": _PHASH,
    "blurhash": "LEHV6nWB2yk8pyo0adR*.7kCMdnj",
    "thumbnail": {"width": 256, "height": 192, "size_bytes": 9_410},
}


def _upload(*, done: bool) -> Upload:
    upload = Upload(
        id=UPLOAD_ID,
        batch_id=BATCH_ID,
        filename="geysir.jpg",
        content_type="image/jpeg",
        size_bytes=2_345_678,
        sha256=_SHA256,
        blob="",
        key_hash=None,
        body_hash=None,
        created_ms=_MADE_MS,
        created_offset=1_229,
        updated_ms=_MADE_MS,
        offset=1_229,
        place=1_229,
    )
    if done:
        upload.status, upload.attempts, upload.offset, upload.result = "completed", 1, 1_233, _RESULT
        upload.started_ms, upload.completed_ms = _MADE_MS + 4, _MADE_MS + 58
        upload.updated_ms = _MADE_MS + 58
    return upload


_QUEUED = UploadView.of_log(_upload(done=False), log_id=_LOG_ID, partition=0)
_DONE = UploadView.of_log(_upload(done=True), log_id=_LOG_ID, partition=0)
_FILLED = BatchView.of_log(_batch(done=False), log_id=_LOG_ID)
_COMPLETED = BatchView.of_log(_batch(done=True), log_id=_LOG_ID)
_REJECTED = Rejected(
    filename="notes.txt", code=Code.UNSUPPORTED_MEDIA_TYPE, detail="its content is none of image/jpeg, …"
)
_SUCCEEDED = UploadSucceeded(
    batch_id=BATCH_ID, upload_id=UPLOAD_ID, attempt=1, epoch=1_120, result=_RESULT, duration_ms=54
)

VIEWS: tuple[BaseModel, ...] = (
    _COMPLETED,
    _DONE,
    Added(accepted=[_QUEUED], rejected=[_REJECTED]),
    BatchAdded(batch=_FILLED, accepted=[_QUEUED], rejected=[_REJECTED]),
    BatchPage(items=[_COMPLETED], next_cursor=None),
    UploadPage(items=[_DONE], next_cursor=CURSOR),
    EventPage(
        items=[
            PastEvent(
                id=EVENT_ID,
                type=_SUCCEEDED.type,
                time=rfc3339(_MADE_MS + 58),
                data=_SUCCEEDED.model_dump(mode="json", exclude={"type"}),
                position="1f3a9c02.0-1233",
                ignored=None,
            )
        ],
        next_cursor=None,
    ),
    StatusView(
        mode="full",
        degraded=[],
        version="0.1.0",
        head=POSITION,
        projected=POSITION,
        lag=0,
        oldest_unfinished_s=0.042,
        processors=[
            ProcessorView(
                partition=0,
                worker_id="sluice-processor-0-7",
                state="working",
                since=rfc3339(_MADE_MS - 3_600_000),
                heard_s=0.613,
                epoch=1_120,
                working_since=rfc3339(_MADE_MS + 4),
                attempt=1,
                degraded=[],
                problems=[],
            )
        ],
    ),
    ConfigView(
        notifier_url="http://127.0.0.1:8081",
        version="0.1.0",
        limits=LimitsView(
            files_max=1_000,
            batch_bytes_max=10_000_000_000,
            file_bytes_max=100_000_000,
            content_types=list(CONTENT_TYPES),
        ),
    ),
)
OF_SCHEMA: dict[str, Any] = {type(view).__name__: view.model_dump(mode="json") for view in VIEWS}
"""An example of each shape that is answered, by the shape's name."""
NEW_BATCH: dict[str, Any] = {"name": "Iceland", "expected_uploads": 12, "metadata": {"trip": "Iceland"}}
_DETAILS = {
    Code.UNAUTHORIZED: "the token has expired; get a new one",
    Code.FORBIDDEN_SCOPE: "this needs a token with the scope `write`, which yours lacks",
    Code.NOT_FOUND: "there is no such batch, or it is not yours",
    Code.RATE_LIMITED: "you may send 5000 requests a second, and 20000 at once; wait 1 s",
    Code.BATCH_SEALED: f"batch {BATCH_ID} is sealed and takes no more files; make a new one",
    Code.FILE_TOO_LARGE: "it is larger than 100000000 bytes, the most one file may have",
    Code.INVALID_REQUEST: "query.limit: Input should be less than or equal to 200",
}


def problem_of(code: Code) -> dict[str, Any]:
    """A problem with this code."""
    return problem(RequestError(code, _DETAILS.get(code, "what is wrong, with which value, and what to do")))
