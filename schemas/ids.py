"""The ids of batches, uploads and events: UUIDs whose last two hex digits are the partition.

New ones are version 7 (RFC 9562, section 5.7), derived ones version 8 (section 5.8). The partition in the id keeps a
batch in its lane when lanes are added. Ids are never ordered by.
"""

import hashlib
import re
from uuid import UUID

_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)


def is_id(text: str) -> bool:
    """Whether `text` is a UUID in its canonical form (lower case, with hyphens)."""
    return _CANONICAL.fullmatch(text) is not None


def partition_of(identifier: str) -> int:
    """The partition a batch's or upload's id names."""
    return int(identifier[-2:], 16)


def new_id(*, now_ms: int, random: bytes, partition: int = 0) -> str:
    """A version 7 UUID of a time in milliseconds and at least nine random bytes, which ends in `partition`."""
    body = now_ms.to_bytes(6, "big") + random[:9] + bytes([partition])
    return _stamped(body, version=7)


def derived_id(*parts: str | int, partition: int) -> str:
    """A version 8 UUID that is the same whenever the parts are, which ends in `partition`."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(4, "big") + encoded)
    return _stamped(digest.digest()[:15] + bytes([partition]), version=8)


def _stamped(body: bytes, *, version: int) -> str:
    stamped = bytearray(body)
    stamped[6] = (version << 4) | (stamped[6] & 0x0F)
    stamped[8] = 0x80 | (stamped[8] & 0x3F)
    return str(UUID(bytes=bytes(stamped)))
