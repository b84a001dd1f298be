"""An S3 bucket that holds the blobs, under a prefix of its own.

Writing and deleting are whole or not at all there, and durable when they are answered. What is large comes and goes in
pieces, so memory stays flat. Requests are in `bucket.py`, incoming files in `s3_sink.py`, the sweep in `s3_shelf.py`.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from services.blobs.bucket import Bucket
from services.blobs.naming import BlobMissing, known_name, newest_thumbnail, thumbnail_name
from services.blobs.s3_shelf import S3Shelf
from services.blobs.s3_sink import S3Sink
from services.blobs.shelf import Shelf
from services.blobs.store import LocalFile, Sink, StorageUnavailable
from services.blobs.threads import Threads, finished

T = TypeVar("T")

CHECK_INTERVAL_S = 5.0
CHECK_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
_FIRST_BYTES = 256 * 1024
_READ_BYTES = 4 * 1024 * 1024
_SETTLING_AT_ONCE = 16
PARTS_AT_ONCE = 16
"""So many parts of large files are sent at a time; the others wait, and their senders with them. What a request that
sends a part needs is bounded by that; who has no full part yet, as slow as it may be, holds up nobody."""


class S3Blobs:
    """The blobs under one prefix of a bucket, which exists."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._threads = Threads(bucket.url)
        self._places = asyncio.Semaphore(_SETTLING_AT_ONCE)
        self._part_places = asyncio.Semaphore(PARTS_AT_ONCE)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, bucket: str, *, prefix: str) -> AsyncIterator["S3Blobs"]:
        """The store, for as long as the block lasts; raises StorageUnavailable where it cannot be used."""
        store = cls(Bucket(bucket, prefix=prefix))
        try:
            await store._within(START_TIMEOUT_S, store._try_out())
            yield store
        finally:
            store._threads.close()

    @property
    def url(self) -> str:
        return self._bucket.url

    async def check(self) -> None:
        """Ask as little as will do: nothing where it answered just now, all that is needed where something failed."""
        if self._bucket.in_trouble:
            await self._within(CHECK_TIMEOUT_S, self._try_out())
        elif time.monotonic() - self._bucket.answered_s > CHECK_INTERVAL_S:
            await self._within(CHECK_TIMEOUT_S, self._look())

    async def _look(self) -> None:
        """See that the bucket is there, by the answer that something in it is not."""
        with contextlib.suppress(BlobMissing):
            await self._bucket.start_of(_probe(), bytes_max=1)

    async def _try_out(self) -> None:
        """Write, read, list and remove a small object."""
        probe = _probe()
        await self._bucket.put(probe, b"sluice")
        await self._bucket.start_of(probe, bytes_max=1)
        async for _ in self._bucket.keys(probe):
            pass  # there is nothing below it: to list everything would take long where much lies
        await self._bucket.delete([probe])

    async def _within(self, seconds: float, asking: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(seconds):
                await asking
        except TimeoutError:
            self._bucket.in_trouble = True
            raise StorageUnavailable(f"{self.url} gave no answer within {seconds:.0f} s") from None

    def sink(self, name: str, *, bytes_max: int) -> S3Sink:
        return S3Sink(self._bucket, known_name(name), bytes_max=bytes_max)

    async def run(self, work: Callable[[], T]) -> T:
        return await self._threads.run(work)

    async def settle(self, sinks: Sequence[Sink]) -> None:
        """Several at once; all have come to their end when this returns or raises."""
        await finished(asyncio.ensure_future(self._settle(sinks)))

    async def _settle(self, sinks: Sequence[Sink]) -> None:
        for error in await asyncio.gather(*map(self._settle_one, sinks), return_exceptions=True):
            if error is not None:
                raise error

    async def _settle_one(self, sink: Sink) -> None:
        assert isinstance(sink, S3Sink), "a sink is settled by the store that gave it"
        async with self._part_places if sink.sends_part else self._places:
            await sink.settle()

    @contextlib.asynccontextmanager
    async def reading(self, name: str) -> AsyncIterator["S3Blob"]:
        try:
            size_bytes, first = await self._bucket.start_of(known_name(name), bytes_max=_FIRST_BYTES)
        except BlobMissing:
            raise BlobMissing(f"{name} is not in the blob store") from None
        yield S3Blob(self._bucket, name, size_bytes, first)

    async def bring(self, name: str, *, to: Path) -> LocalFile:
        async with self.reading(name) as blob:
            file = await self.run(lambda: to.open("wb"))
            try:
                async for piece in blob.chunks(0, blob.size_bytes):
                    await self.run(lambda piece=piece: _write(file, piece))  # type: ignore[misc]  # bound at once
            finally:
                file.close()
            return LocalFile(to, blob.size_bytes)

    async def put_file(self, source: Path, upload_id: str, *, epoch: int, attempt: int) -> str:
        name = thumbnail_name(upload_id, epoch=epoch, attempt=attempt)
        await self._bucket.put(name, await self.run(source.read_bytes))
        await self.run(source.unlink)
        return name

    async def thumbnail(self, upload_id: str, *, attempt: int) -> str:
        files = [name.rpartition("/")[2] for name in await self._names(upload_id)]
        return newest_thumbnail(files, upload_id, attempt=attempt)

    async def delete(self, names: Iterable[str]) -> None:
        await self._bucket.delete([known_name(name) for name in names])

    async def delete_upload(self, upload_id: str) -> None:
        await self._bucket.delete(await self._names(upload_id))

    def shelf(self) -> Shelf:
        return S3Shelf(self._bucket)

    async def _names(self, upload_id: str) -> list[str]:
        folder = known_name(f"{upload_id}/any").partition("/")[0]
        return [each.name async for keys in self._bucket.keys(folder) for each in keys]


class S3Blob:
    """A blob of which the first bytes are here already: a thumbnail takes one request."""

    def __init__(self, bucket: Bucket, name: str, size_bytes: int, first: bytes) -> None:
        self._bucket = bucket
        self._name = name
        self._first = first
        self.size_bytes = size_bytes

    async def chunks(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to and without `stop`, in pieces of at most 4 MiB."""
        while start < stop:
            piece = self._first[start:stop] or await self._fetched(start, min(start + _READ_BYTES, stop))
            start += len(piece)
            yield piece

    async def _fetched(self, start: int, stop: int) -> bytes:
        try:
            piece = await self._bucket.span(self._name, start, stop)
        except BlobMissing:
            raise StorageUnavailable(f"{self._name} was removed while it was read") from None
        if not piece:
            raise StorageUnavailable(f"{self._name} ended {stop - start} bytes early")
        return piece


def _probe() -> str:
    return f"check-{secrets.token_hex(8)}"


def _write(file: BinaryIO, piece: bytes) -> None:
    file.write(piece)
