"""The blob store as the sweeper goes through it: what lies there, what is in it, and the trash.

The trash has one folder for each sweep, named by its time in seconds since 1970; what lies there keeps its name, so it
can be brought back, until its folder is older than the grace time. A blob that nobody wants is moved there, never
removed at once, and never over another. Each store has a shelf of its own: `local_shelf.py`, `s3_shelf.py`.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from services.blobs.naming import THUMBNAIL


@dataclass(frozen=True, slots=True)
class Lying:
    """A blob or thumbnail in the store. `written_s`: when it was last written, in seconds since 1970."""

    name: str
    size_bytes: int
    written_s: float

    @property
    def upload_id(self) -> str:
        return self.name.partition("/")[0]

    @property
    def thumbnail_of(self) -> tuple[int, int] | None:
        """Epoch and attempt of a thumbnail; None for a file."""
        match = THUMBNAIL.fullmatch(self.name.partition("/")[2])
        return (int(match[1]), int(match[2])) if match else None


class Shelf(Protocol):
    """See the module's text. Every method raises StorageUnavailable where the store cannot be used."""

    def lying(self) -> AsyncIterator[list[Lying]]:
        """All that lies in the store, some uploads at a time, each upload's whole."""

    async def size(self, name: str) -> int | None:
        """The bytes of a blob; None where there is none."""

    async def sha256(self, name: str) -> str | None:
        """Hex SHA-256 of a blob's bytes, read in pieces; None where there is none."""

    async def discard(self, name: str, *, sweep_s: int) -> None:
        """Move a blob into the trash of the sweep of this time."""

    async def bring_back(self, name: str) -> bool:
        """Take a blob out of the trash, if it lies there."""

    async def empty_trash(self, *, before_s: float) -> int:
        """Remove for good what was discarded before this time; how many blobs it was."""
