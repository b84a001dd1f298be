"""What callers send: request bodies, filenames made safe, and the formats that are taken. Pure, no I/O."""

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.events import Count
from schemas.text import FILENAME_BYTES_MAX, NAME_CHARACTERS_MAX, STORABLE, Metadata

CONTENT_TYPES = (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
    "image/heic",
    "video/mp4",
    "video/quicktime",
    "video/x-msvideo",
    "video/webm",
    "video/mpeg",
    "video/x-flv",
)
"""The formats that are taken, told by their content."""
_EXTENSION_BYTES_MAX = 32
_DECEIVING = frozenset("\u200b\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
"""Invisible characters that turn the direction of text, so that `exe.jpg` may be shown for `gpj.exe`, or make two names
look alike. Those that scripts and emoji need (ZWJ, ZWNJ, the direction marks) are not among them."""


class CreateBatch(BaseModel):
    """The JSON body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(max_length=NAME_CHARACTERS_MAX), STORABLE] | None = None
    expected_uploads: Count | None = None
    metadata: Metadata = Field(default_factory=dict)


def safe_filename(given: str) -> str | None:
    """The last path part, NFC, without control characters (those of direction and no width too) and lone surrogates,
    cut to 255 bytes with its extension kept; None where nothing is left."""
    name = given.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(
        character
        for character in name
        if character not in _DECEIVING and unicodedata.category(character) not in ("Cc", "Cs")
    )
    cut = _cut(unicodedata.normalize("NFC", kept).strip())
    return cut if cut.strip(". ") else None


def _cut(name: str) -> str:
    if len(name.encode()) <= FILENAME_BYTES_MAX:
        return name
    stem, dot, extension = name.rpartition(".")
    suffix = dot + extension
    if not stem or len(suffix.encode()) > _EXTENSION_BYTES_MAX:
        stem, suffix = name, ""
    room = FILENAME_BYTES_MAX - len(suffix.encode())
    return (stem.encode()[:room].decode(errors="ignore") + suffix).strip()


def key_hash(user_id: str, method: str, path: str, key: str) -> str:
    """The scoped key of an idempotent request: hex SHA-256 over user, method, path and Idempotency-Key."""
    return _hashed([user_id, method, path, key])


def parts_hash(parts: Iterable[tuple[str, str, str]]) -> str:
    """The fingerprint of a multipart body: hex SHA-256 over its parts in order (field, filename, hex SHA-256)."""
    return _hashed([text for part in parts for text in part])


def _hashed(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
