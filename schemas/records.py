"""What the log stores, as bytes: a record as it was read, and one as it is to be appended.

These two shapes are all that the Kafka module and the language share: the module moves bytes, `schemas.events` gives
them meaning.
"""

from dataclasses import dataclass

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """One record as it lies in the log.

    `timestamp_ms` is the broker's (LogAppendTime), in milliseconds since 1970-01-01 UTC.
    """

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(frozen=True, slots=True)
class NewRecord:
    """One record to append; the broker gives it its offset and time."""

    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def size_bytes(self) -> int:
        """Its size before compression, a little over what the broker will count (it counts varint lengths)."""
        framing_bytes_max = 64
        header_bytes = sum(len(name.encode()) + len(value) + 10 for name, value in self.headers)
        return framing_bytes_max + len(self.key or b"") + len(self.value or b"") + header_bytes
