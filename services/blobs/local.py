"""A local folder that holds the blobs. Every call that touches the disk runs in a thread of the store's own.

What is written is complete before its name stands in the log; a name nobody refers to is left to the sweeper. Nothing
is renamed over and no name is used twice: that is 60 to 100 times slower on ext4. With `fsync`, file and folders are on
the disk before a writer hears of it.
"""

import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from services.blobs.local_shelf import LocalShelf
from services.blobs.naming import BlobMissing, known_name, newest_thumbnail, thumbnail_name
from services.blobs.shelf import Shelf
from services.blobs.store import LocalFile, Sink, StorageUnavailable
from services.blobs.threads import Threads

T = TypeVar("T")

_READ_BYTES = 256 * 1024
_FREE_BYTES_MIN = 100_000_000


class LocalBlobs:
    """The blobs under one folder, which is made if it is missing."""

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        self.folder = folder
        self.fsync = fsync
        self._threads = Threads(str(folder))

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder: Path, *, fsync: bool) -> AsyncIterator["LocalBlobs"]:
        """The store, for as long as the block lasts; raises StorageUnavailable where it cannot be written."""
        store = cls(folder, fsync=fsync)
        try:
            await store.run(lambda: folder.mkdir(parents=True, exist_ok=True))
            await store.check()
            yield store
        finally:
            store._threads.close()

    @property
    def url(self) -> str:
        return str(self.folder)

    async def check(self) -> None:
        """Write, read and remove a small file; raises StorageUnavailable where that fails or the disk is full."""
        await self.run(self._check)

    def _check(self) -> None:
        probe = self.folder / f".check-{secrets.token_hex(8)}"
        try:
            probe.write_bytes(b"sluice")
        finally:
            probe.unlink(missing_ok=True)
        if (free_bytes := shutil.disk_usage(self.folder).free) < _FREE_BYTES_MIN:
            raise StorageUnavailable(f"{self.folder} has only {free_bytes} bytes left: free some space")

    def path(self, name: str) -> Path:
        """Where the blob's bytes lie on this machine; raises BlobMissing for what is no blob's name."""
        return self.folder / known_name(name)

    def sink(self, name: str, *, bytes_max: int) -> "LocalSink":  # noqa: ARG002  # a folder takes any size
        return LocalSink(self.path(name), fsync=self.fsync)

    async def run(self, work: Callable[[], T]) -> T:
        return await self._threads.run(work)

    async def settle(self, sinks: Sequence[Sink]) -> None:
        """What a sink is told here is done at once."""

    @contextlib.asynccontextmanager
    async def reading(self, name: str) -> AsyncIterator["LocalBlob"]:
        """The blob, open for reading; raises BlobMissing."""
        file = await self.run(lambda: _open(self.path(name)))
        try:
            yield LocalBlob(self, file, os.fstat(file.fileno()).st_size)
        finally:
            file.close()

    async def bring(self, name: str, *, to: Path) -> LocalFile:  # noqa: ARG002  # it is here already
        path = self.path(name)
        return LocalFile(path, await self.run(lambda: _size(path)))

    async def put_file(self, source: Path, upload_id: str, *, epoch: int, attempt: int) -> str:
        name = thumbnail_name(upload_id, epoch=epoch, attempt=attempt)
        await self.run(lambda: self._move(source, self.path(name)))
        return name

    async def thumbnail(self, upload_id: str, *, attempt: int) -> str:
        return await self.run(lambda: newest_thumbnail(self._files(upload_id), upload_id, attempt=attempt))

    async def delete(self, names: Iterable[str]) -> None:
        paths = [self.path(name) for name in names]
        if paths:
            await self.run(lambda: remove_all(paths))

    async def delete_upload(self, upload_id: str) -> None:
        folder = self.path(f"{upload_id}/any").parent
        await self.run(lambda: _remove_folder(folder))

    def shelf(self) -> Shelf:
        return LocalShelf(self.folder, self.run)

    def _move(self, source: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        shutil.move(source, target)
        if self.fsync:
            with target.open("rb") as file:
                os.fsync(file.fileno())
            _sync_folders(target)

    def _files(self, upload_id: str) -> list[str]:
        folder = self.path(f"{upload_id}/any").parent
        return [file.name for file in folder.iterdir()] if folder.is_dir() else []


class LocalBlob:
    """An open file. `size_bytes` is its length."""

    def __init__(self, store: LocalBlobs, file: BinaryIO, size_bytes: int) -> None:
        self._store = store
        self._file = file
        self.size_bytes = size_bytes

    async def chunks(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to and without `stop`, in pieces of at most 256 KiB."""
        await self._store.run(lambda: self._file.seek(start))
        while start < stop:
            piece = await self._store.run(functools.partial(self._file.read, min(_READ_BYTES, stop - start)))
            if not piece:
                raise StorageUnavailable(f"a blob ended {stop - start} bytes early")
            start += len(piece)
            yield piece


class LocalSink:
    """A new file; what it is told is done at once."""

    def __init__(self, path: Path, *, fsync: bool) -> None:
        self._path = path
        self._fsync = fsync
        self._file: BinaryIO | None = None

    def begin(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        self._file = self._path.open("xb")

    def write(self, chunk: bytes) -> None:
        assert self._file is not None, "bytes come after `begin`"
        self._file.write(chunk)

    def finish(self) -> None:
        assert self._file is not None, "a file that ends was begun"
        self._file.flush()
        if self._fsync:
            os.fdatasync(self._file.fileno())
        self._close()
        if self._fsync:
            _sync_folders(self._path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full, and what was not written yet still is not
            self._close()
        remove(self._path)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def remove_all(paths: Iterable[Path]) -> None:
    """`remove` each."""
    for path in paths:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file that may be gone, and its folder if nothing else is in it."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None


def _missing(path: Path) -> BlobMissing:
    return BlobMissing(f"{path.parent.name}/{path.name} is not in the blob store")


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _sync_folders(path: Path) -> None:
    """Put the names that lead to a new file on the disk."""
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
