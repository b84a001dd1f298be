"""What a blob store is, whatever keeps it: what can be asked of it and what it may raise.

Names (`naming.py`) are fresh and never written twice, so what was read once stays true. What is written is complete
before its name stands in the log; a name nobody refers to is left to the sweeper. The two stores are `local.py` (a
folder) and `s3.py` (a bucket); both pass the same contract suite.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from schemas.errors import PartError
from services.blobs.shelf import Shelf

T = TypeVar("T")


class StorageUnavailable(PartError):  # noqa: N818  # a state that passes
    """The store cannot be read or written just now; the message says why, and callers are told that it is so."""

    def __init__(self, text: str) -> None:
        super().__init__(text, told="the blob store cannot be used just now")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A blob's bytes as a file on this machine. Only read it: it may be the blob itself."""

    path: Path
    size_bytes: int


class Blob(Protocol):
    """An open blob."""

    @property
    def size_bytes(self) -> int: ...

    def chunks(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to and without `stop`, in pieces; raises StorageUnavailable."""


class Sink(Protocol):
    """Where the bytes of one file go that is coming in. Its methods are called in a thread (`BlobStore.run`), and what
    they ask for is done when `BlobStore.settle` returned."""

    def begin(self) -> None:
        """The file is taken: bytes follow."""

    def write(self, chunk: bytes) -> None: ...

    def finish(self) -> None:
        """All bytes came: they are to stay, under the file's name."""

    def discard(self) -> None:
        """Forget the file, however far it came."""


class BlobStore(Protocol):
    """Where the bytes of files and thumbnails are. Every method raises StorageUnavailable where that cannot be used."""

    @property
    def url(self) -> str:
        """Where it is, for people; without secrets."""

    async def check(self) -> None:
        """Return when it can be used; raises StorageUnavailable. May be asked each second."""

    def sink(self, name: str, *, bytes_max: int) -> Sink:
        """Where the bytes of a new file go; it is refused before it has more than `bytes_max`."""

    async def run(self, work: Callable[[], T]) -> T:
        """Do something with sinks in a thread. It is finished when this returns, also when the caller is cancelled."""

    async def settle(self, sinks: Sequence[Sink]) -> None:
        """Return when all is done that these sinks were told; until then the sender is not read from."""

    def reading(self, name: str) -> AbstractAsyncContextManager[Blob]:
        """The blob, open for reading; raises BlobMissing."""

    async def bring(self, name: str, *, to: Path) -> LocalFile:
        """The blob as a file here: the one it is, or a copy at `to`, which the caller removes. Raises BlobMissing.

        May be cancelled at any time; what it wrote by then lies at `to`.
        """

    async def put_file(self, source: Path, upload_id: str, *, epoch: int, attempt: int) -> str:
        """Move a finished thumbnail into the store, from whichever file system; its name."""

    async def thumbnail(self, upload_id: str, *, attempt: int) -> str:
        """The name of the thumbnail an attempt made; raises BlobMissing. See `newest_thumbnail`."""

    async def delete(self, names: Iterable[str]) -> None:
        """Remove blobs, those already gone included."""

    async def delete_upload(self, upload_id: str) -> None:
        """Remove all an upload has here: its file and its thumbnails."""

    def shelf(self) -> Shelf:
        """The store as the sweeper goes through it."""
