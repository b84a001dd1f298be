"""Every error code callers can meet, in one place: its HTTP status, its title, and whether asking again can help.

A code never changes once it was given out. Work errors are what becomes of one file; the others answer a request.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """What is wrong with a request or with the service just now."""

    INVALID_REQUEST = "invalid_request"
    INVALID_POSITION = "invalid_position"
    DIGEST_MISMATCH = "digest_mismatch"
    EMPTY_FILE = "empty_file"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN_SCOPE = "forbidden_scope"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BATCH_SEALED = "batch_sealed"
    BATCH_ENDED = "batch_ended"
    FILENAME_TAKEN = "filename_taken"
    NOT_FAILED = "not_failed"
    POSITION_OF_ANOTHER_LOG = "position_of_another_log"
    FILE_TOO_LARGE = "file_too_large"
    TOO_MANY_FILES = "too_many_files"
    BATCH_TOO_LARGE = "batch_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    HEADERS_TOO_LARGE = "headers_too_large"
    RATE_LIMITED = "rate_limited"
    LOG_UNAVAILABLE = "log_unavailable"
    DATABASE_UNAVAILABLE = "database_unavailable"
    PROJECTION_BEHIND = "projection_behind"
    OUTCOME_UNKNOWN = "outcome_unknown"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    KEYS_UNAVAILABLE = "keys_unavailable"
    INTERNAL_ERROR = "internal_error"


class WorkCode(StrEnum):
    """Why the work on one file failed (`error.code` of an upload)."""

    CORRUPT_MEDIA = "corrupt_media"
    MEDIA_TOO_COMPLEX = "media_too_complex"
    WORK_TIMEOUT = "work_timeout"
    WORKER_CRASHED = "worker_crashed"
    OUT_OF_MEMORY = "out_of_memory"
    BLOB_MISSING = "blob_missing"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class Meaning:
    """`retry_after_s`: after how many seconds asking again makes sense; None where it does not."""

    status: int
    title: str
    retry_after_s: int | None = None


MEANINGS: dict[Code, Meaning] = {
    Code.INVALID_REQUEST: Meaning(422, "The request is not understood"),
    Code.INVALID_POSITION: Meaning(400, "That is not a position"),
    Code.DIGEST_MISMATCH: Meaning(400, "The bytes that came are not the bytes that were announced"),
    Code.EMPTY_FILE: Meaning(400, "The file is empty"),
    Code.UNAUTHORIZED: Meaning(401, "A valid token is needed"),
    Code.FORBIDDEN_SCOPE: Meaning(403, "The token does not allow this"),
    Code.NOT_FOUND: Meaning(404, "There is no such thing"),
    Code.METHOD_NOT_ALLOWED: Meaning(405, "This cannot be done here"),
    Code.BATCH_SEALED: Meaning(409, "The batch takes no more files"),
    Code.BATCH_ENDED: Meaning(409, "The batch has ended"),
    Code.FILENAME_TAKEN: Meaning(409, "Another file of this name is in the batch"),
    Code.NOT_FAILED: Meaning(409, "Only a failed upload can be retried"),
    Code.POSITION_OF_ANOTHER_LOG: Meaning(409, "The position belongs to another log"),
    Code.FILE_TOO_LARGE: Meaning(413, "The file is too large"),
    Code.TOO_MANY_FILES: Meaning(413, "The batch holds as many files as it may"),
    Code.BATCH_TOO_LARGE: Meaning(413, "The batch holds as many bytes as it may"),
    Code.UNSUPPORTED_MEDIA_TYPE: Meaning(415, "Files of this type are not taken"),
    Code.RANGE_NOT_SATISFIABLE: Meaning(416, "The file has no such bytes"),
    Code.IDEMPOTENCY_KEY_REUSED: Meaning(422, "The Idempotency-Key was used for another request"),
    Code.RATE_LIMITED: Meaning(429, "Too many requests", retry_after_s=1),
    Code.HEADERS_TOO_LARGE: Meaning(431, "The headers are too large"),
    Code.LOG_UNAVAILABLE: Meaning(503, "The log cannot be reached", retry_after_s=2),
    Code.DATABASE_UNAVAILABLE: Meaning(503, "The database cannot be reached", retry_after_s=2),
    Code.PROJECTION_BEHIND: Meaning(503, "The read models are behind the log", retry_after_s=1),
    Code.OUTCOME_UNKNOWN: Meaning(503, "It is not known whether this was done", retry_after_s=2),
    Code.STORAGE_UNAVAILABLE: Meaning(503, "The blob store cannot be used", retry_after_s=5),
    Code.KEYS_UNAVAILABLE: Meaning(503, "Tokens cannot be checked", retry_after_s=5),
    Code.INTERNAL_ERROR: Meaning(500, "Sluice made a mistake"),
}


class PartError(Exception):
    """An error of a part behind the service: the log, the database, the blob store, the keys.

    `str` is for operators and may name addresses, paths and causes; `told` is for callers, a sentence without these.
    """

    def __init__(self, text: str, *, told: str | None = None) -> None:
        super().__init__(text)
        self.told = text if told is None else told


@dataclass(slots=True, eq=False)  # errors are compared and hashed by identity, as tracebacks and groups expect
class RequestError(Exception):
    """A request that is answered with a code; `detail` says what, which value and what to do.

    `extra` holds further members of the problem document, such as `rejected`.
    """

    code: Code
    detail: str
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


def problem(error: RequestError) -> dict[str, Any]:
    """The body of the answer: problem details (RFC 9457) with a stable `code`."""
    meaning = MEANINGS[error.code]
    return {
        "type": f"urn:sluice:error:{error.code}",
        "title": meaning.title,
        "status": meaning.status,
        "detail": error.detail,
        "code": str(error.code),
        **error.extra,
    }
