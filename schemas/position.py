"""A position: a place in one log, written `LOGID.PARTITION-OFFSET[.PARTITION-OFFSET…]`.

It names the last record included: `since=P` is what comes after P, `at=P` includes P. LOGID is the first eight hex
digits of the log's id, so a position of another log is seen as such. Clients treat it as opaque, URL-safe text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

LOG_ID_DIGITS = 8
PARTITIONS_MAX = 256
OFFSET_MAX = 2**63 - 1
_TEXT_CHARACTERS_MAX = LOG_ID_DIGITS + PARTITIONS_MAX * len(".255-9223372036854775807")
_TEXT = re.compile(r"[0-9a-f]{8}(?:\.(?:0|[1-9][0-9]{0,2})-(?:0|[1-9][0-9]{0,18}))+", re.ASCII)


class InvalidPositionError(ValueError):
    """The text is not a position; says which text and what one looks like."""


@dataclass(frozen=True, slots=True)
class Position:
    """`offsets`: partition → offset of the last record included, in partition order."""

    log: str
    offsets: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, log_id: str, offsets: Mapping[int, int]) -> Self:
        """The position of these last-included offsets; `log_id` may be the whole id or its first eight digits."""
        return cls(log_id.replace("-", "")[:LOG_ID_DIGITS], tuple(sorted(offsets.items())))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str(position)` wrote; raises InvalidPositionError."""
        if len(text) > _TEXT_CHARACTERS_MAX or not _TEXT.fullmatch(text):
            raise InvalidPositionError(f"{text[:80]!r} is not a position: it looks like 1f3a9c02.0-1234")
        log, *places = text.split(".")
        pairs = [(int(partition), int(offset)) for partition, offset in (place.split("-") for place in places)]
        offsets = dict(pairs)
        if len(offsets) != len(pairs) or max(offsets) >= PARTITIONS_MAX or max(offsets.values()) > OFFSET_MAX:
            raise InvalidPositionError(f"{text[:80]!r} names a partition twice, or one or an offset out of range")
        return cls.of(log, offsets)

    def __str__(self) -> str:
        return ".".join([self.log, *(f"{partition}-{offset}" for partition, offset in self.offsets)])

    def offset(self, partition: int) -> int | None:
        """The offset of the last record included of this partition; None where the position does not name it."""
        return next((offset for named, offset in self.offsets if named == partition), None)

    def includes(self, other: Self) -> bool:
        """Whether every record `other` includes is included here; False between two logs."""
        mine = dict(self.offsets)
        return self.log == other.log and all(mine.get(partition, -1) >= offset for partition, offset in other.offsets)

    def at(self, partition: int, offset: int) -> Self:
        """This position with one partition moved to `offset`."""
        return type(self).of(self.log, {**dict(self.offsets), partition: offset})
