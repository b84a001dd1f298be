"""The shelf of a bucket. The trash lies under `trash/`; moving there is a copy and then a deletion.

Who is killed between the two leaves a blob in both places: the next sweep moves it again, or empties it from the trash.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from itertools import groupby

from services.blobs.bucket import COPY_BYTES_MAX, Bucket, Key
from services.blobs.naming import NAME, BlobMissing, known_name
from services.blobs.s3_sink import PART_BYTES_MIN
from services.blobs.shelf import Lying

TRASH = "trash"
_READ_BYTES = 4 * 1024 * 1024


class S3Shelf:
    """See `Shelf`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def lying(self) -> AsyncIterator[list[Lying]]:
        held: list[Lying] = []
        async for keys in self._bucket.keys():
            held += [Lying(each.name, each.size_bytes, each.written_s) for each in keys if NAME.fullmatch(each.name)]
            uploads = [list(group) for _, group in groupby(held, key=lambda each: each.upload_id)]
            if len(uploads) > 1:  # of the last one more may follow
                yield [each for upload in uploads[:-1] for each in upload]
                held = uploads[-1]
        if held:
            yield held

    async def size(self, name: str) -> int | None:
        try:
            return await self._bucket.size(known_name(name))
        except BlobMissing:
            return None

    async def sha256(self, name: str) -> str | None:
        digest = hashlib.sha256()
        try:
            async for piece in self._pieces(known_name(name)):
                await asyncio.to_thread(digest.update, piece)
        except BlobMissing:
            return None
        return digest.hexdigest()

    async def discard(self, name: str, *, sweep_s: int) -> None:
        try:
            await self._move(known_name(name), f"{TRASH}/{sweep_s}/{name}")
        except BlobMissing:
            return  # somebody removed it first

    async def bring_back(self, name: str) -> bool:
        for sweep in await self._bucket.folders(TRASH):
            try:
                await self._move(f"{TRASH}/{sweep}/{name}", known_name(name))
            except BlobMissing:
                continue
            return True
        return False

    async def empty_trash(self, *, before_s: float) -> int:
        removed = 0
        async for keys in self._bucket.keys(TRASH):
            old = [each.name for each in keys if _is_before(each, before_s)]
            await self._bucket.delete(old)
            removed += len(old)
        return removed

    async def _move(self, source: str, target: str) -> None:
        """Raises BlobMissing."""
        if await self._bucket.size(source) > COPY_BYTES_MAX:
            await self._bucket.put_parts(target, self._pieces(source), part_bytes=PART_BYTES_MIN * 8)
        else:
            await self._bucket.copy(source, target)
        await self._bucket.delete([source])

    async def _pieces(self, key: str) -> AsyncIterator[bytes]:
        size_bytes = await self._bucket.size(key)
        for start in range(0, size_bytes, _READ_BYTES):
            yield await self._bucket.span(key, start, min(start + _READ_BYTES, size_bytes))


def _is_before(key: Key, before_s: float) -> bool:
    sweep = key.name.split("/")[1]
    return sweep.isdigit() and int(sweep) < before_s
