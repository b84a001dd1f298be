"""The local folder that holds the blobs. Every call that touches the disk runs in a thread of the store's own.

A name is `{upload_id}/{file}` and nothing else, so no name leads out of the folder. What is written is complete before
its name stands in the log; a name nobody refers to is left to the sweeper. With `fsync`, file and folders are on the
disk before a writer hears of it.
"""

import asyncio
import contextlib
import functools
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

NAME = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/[A-Za-z0-9_-]{1,100}", re.ASCII)
THUMBNAIL = re.compile(r"thumb-(\d+)-(\d+)", re.ASCII)
_RANDOM_BYTES = 9
_THREADS_MAX = 8
_READ_BYTES = 256 * 1024
_FREE_BYTES_MIN = 100_000_000


class BlobMissing(Exception):  # noqa: N818  # named for what it says
    """There is no blob of that name; it was removed, or never was."""


class StorageUnavailable(Exception):  # noqa: N818  # a state that passes
    """The folder cannot be read or written just now; the message says why."""


class BlobStore:
    """The blobs under one folder, which is made if it is missing."""

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        self.folder = folder
        self.fsync = fsync
        self._threads = ThreadPoolExecutor(max_workers=_THREADS_MAX, thread_name_prefix="blobs")

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder: Path, *, fsync: bool) -> AsyncIterator["BlobStore"]:
        """The store, for as long as the block lasts; raises StorageUnavailable where it cannot be written."""
        store = cls(folder, fsync=fsync)
        try:
            await store.run(lambda: folder.mkdir(parents=True, exist_ok=True))
            await store.check()
            yield store
        finally:
            store._threads.shutdown()

    async def check(self) -> None:
        """Write, read and remove a small file; raises StorageUnavailable where that fails or the disk is full."""
        await self.run(self._check)

    def _check(self) -> None:
        probe = self.folder / f".check-{secrets.token_hex(_RANDOM_BYTES)}"
        try:
            probe.write_bytes(b"sluice")
        finally:
            probe.unlink(missing_ok=True)
        if (free_bytes := shutil.disk_usage(self.folder).free) < _FREE_BYTES_MIN:
            raise StorageUnavailable(f"{self.folder} has only {free_bytes} bytes left: free some space")

    def path(self, name: str) -> Path:
        """Where the blob's bytes lie on this machine; raises BlobMissing for what is no blob's name."""
        if not NAME.fullmatch(name):
            raise BlobMissing(f"{name[:80]!r} is not the name of a blob")
        return self.folder / name

    def fresh_name(self, upload_id: str) -> str:
        """A name that no blob had before."""
        return f"{upload_id}/{secrets.token_urlsafe(_RANDOM_BYTES)}"

    @contextlib.asynccontextmanager
    async def reading(self, name: str) -> AsyncIterator["Blob"]:
        """The blob, open for reading; raises BlobMissing."""
        file = await self.run(lambda: _open(self.path(name)))
        try:
            yield Blob(self, file, os.fstat(file.fileno()).st_size)
        finally:
            file.close()

    async def put_file(self, source: Path, upload_id: str, *, epoch: int, attempt: int) -> str:
        """Move a finished thumbnail into the store, from whichever file system; its name."""
        name = f"{upload_id}/thumb-{epoch}-{attempt}"
        await self.run(lambda: self._move(source, self.path(name)))
        return name

    async def thumbnail(self, upload_id: str, *, attempt: int) -> str:
        """The name of the thumbnail an attempt made; raises BlobMissing.

        Where several epochs made one under the same attempt, all but the newest were superseded (or the attempt was
        interrupted), so the newest epoch's counts.
        """
        return await self.run(lambda: self._thumbnail(upload_id, attempt))

    async def delete(self, names: Iterable[str]) -> None:
        """Remove blobs, those already gone included; raises StorageUnavailable where one cannot be removed."""
        paths = [self.path(name) for name in names]
        if paths:
            await self.run(lambda: remove_all(paths))

    async def delete_upload(self, upload_id: str) -> None:
        """Remove all an upload has here: its file and its thumbnails."""
        folder = self.path(f"{upload_id}/any").parent
        await self.run(lambda: _remove_folder(folder))

    async def run(self, work: Callable[[], T]) -> T:
        """Do something with files in a thread; its OSError becomes StorageUnavailable.

        The thread finishes what it began when the caller is cancelled, and the caller waits for it: nobody cleans up
        what is still being written.
        """
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait({working})
            raise
        except OSError as error:
            raise StorageUnavailable(f"{self.folder} cannot be used: {error.strerror or error}") from error

    def sync_folders(self, path: Path) -> None:
        """Put the names that lead to a new file on the disk, if the store does that."""
        if self.fsync:
            for folder in (path.parent, self.folder):
                _sync_folder(folder)

    def _move(self, source: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        shutil.move(source, target)
        if self.fsync:
            with target.open("rb") as file:
                os.fsync(file.fileno())
            self.sync_folders(target)

    def _thumbnail(self, upload_id: str, attempt: int) -> str:
        folder = self.path(f"{upload_id}/any").parent
        files = folder.iterdir() if folder.is_dir() else ()
        found = (THUMBNAIL.fullmatch(file.name) for file in files)
        epochs = [int(match[1]) for match in found if match and int(match[2]) == attempt]
        if not epochs:
            raise BlobMissing(f"upload {upload_id} has no thumbnail")
        return f"{upload_id}/thumb-{max(epochs)}-{attempt}"


class Blob:
    """An open blob. `size_bytes` is its length."""

    def __init__(self, store: BlobStore, file: BinaryIO, size_bytes: int) -> None:
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
        raise BlobMissing(f"{path.parent.name}/{path.name} is not in the blob store") from None


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
