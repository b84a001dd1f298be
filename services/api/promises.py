"""Which codes each call may be answered with, for the OpenAPI document. Pure; a call that is missing here is an error.

What a code means stands in `schemas.errors`, what to do about it in docs/errors.md.
"""

from schemas.errors import Code

_CALLER = {Code.UNAUTHORIZED, Code.FORBIDDEN_SCOPE, Code.RATE_LIMITED, Code.KEYS_UNAVAILABLE}
_POSITION = {Code.INVALID_POSITION, Code.POSITION_OF_ANOTHER_LOG, Code.PROJECTION_BEHIND}
_READ = _CALLER | _POSITION | {Code.DATABASE_UNAVAILABLE, Code.INVALID_REQUEST}
_BYTES = (
    _CALLER
    | _POSITION
    | {
        Code.NOT_FOUND,
        Code.RANGE_NOT_SATISFIABLE,
        Code.DATABASE_UNAVAILABLE,
        Code.STORAGE_UNAVAILABLE,
    }
)
_LOG = {Code.LOG_UNAVAILABLE, Code.OUTCOME_UNKNOWN, Code.PROJECTION_BEHIND, Code.DATABASE_UNAVAILABLE}
_WRITE = _CALLER | _LOG | {Code.NOT_FOUND}
_KEY = {Code.IDEMPOTENCY_KEY_REUSED, Code.INVALID_REQUEST}
_CLOSED = {Code.BATCH_SEALED, Code.BATCH_ENDED}
_FILE = {
    Code.EMPTY_FILE,
    Code.FILE_TOO_LARGE,
    Code.TOO_MANY_FILES,
    Code.BATCH_TOO_LARGE,
    Code.UNSUPPORTED_MEDIA_TYPE,
    Code.STORAGE_UNAVAILABLE,
    Code.INVALID_REQUEST,
}

CODES: dict[tuple[str, str], set[Code]] = {
    ("get", "/v1/batches"): _READ,
    ("post", "/v1/batches"): _WRITE | _KEY | _FILE | _CLOSED,
    ("get", "/v1/batches/{batch_id}"): _READ | {Code.NOT_FOUND, Code.LOG_UNAVAILABLE},
    ("delete", "/v1/batches/{batch_id}"): _WRITE,
    ("get", "/v1/batches/{batch_id}/events"): _READ | {Code.NOT_FOUND, Code.LOG_UNAVAILABLE},
    ("get", "/v1/batches/{batch_id}/uploads"): _READ | {Code.NOT_FOUND},
    ("post", "/v1/batches/{batch_id}/uploads"): _WRITE
    | _KEY
    | _CLOSED
    | {Code.TOO_MANY_FILES, Code.STORAGE_UNAVAILABLE},
    ("put", "/v1/batches/{batch_id}/uploads/{filename}"): _WRITE
    | _CLOSED
    | _FILE
    | {Code.FILENAME_TAKEN, Code.DIGEST_MISMATCH},
    ("post", "/v1/batches/{batch_id}/seal"): _WRITE | {Code.BATCH_ENDED},
    ("post", "/v1/batches/{batch_id}/cancel"): _WRITE | {Code.BATCH_ENDED},
    ("post", "/v1/batches/{batch_id}/retry"): _WRITE | _KEY | {Code.BATCH_ENDED},
    ("get", "/v1/uploads/{upload_id}"): _READ | {Code.NOT_FOUND},
    ("post", "/v1/uploads/{upload_id}/retry"): _WRITE | _KEY | {Code.BATCH_ENDED, Code.NOT_FAILED},
    ("get", "/v1/uploads/{upload_id}/content"): _BYTES,
    ("get", "/v1/uploads/{upload_id}/thumbnail"): _BYTES,
    ("get", "/v1/status"): _CALLER,
    ("get", "/v1/config"): set(),
    ("get", "/livez"): set(),
    ("get", "/readyz"): set(),
    ("get", "/metrics"): set(),
}
"""Beside these, every call may meet `internal_error`."""
