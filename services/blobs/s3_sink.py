"""A file on its way into a bucket: a small one in one request, a larger one part by part while it comes.

Parts are sent as they fill, and nothing more is taken meanwhile, so memory stays flat whatever the size: of a large
file one part waits and two are under way. A file that is given up is aborted there, so that no part of it stays; only
a process that dies leaves parts behind, which a lifecycle rule of the bucket removes.
"""

import asyncio
from collections.abc import AsyncIterator

from services.blobs.bucket import Bucket

PART_BYTES_MIN = 5 * 1024 * 1024
"""S3's own limit for all parts but the last."""
PARTS_MAX = 10_000
"""S3's own limit."""


class GivenUp(Exception):  # noqa: N818  # not an error: nobody wants the file any more
    """The file is not wanted any more."""


class S3Sink:
    """See the module's text, and `Sink`. `settle` is called by the store when it was told something."""

    def __init__(self, bucket: Bucket, key: str, *, bytes_max: int) -> None:
        self._bucket = bucket
        self._key = key
        self._part_bytes = max(PART_BYTES_MIN, -(-bytes_max // PARTS_MAX))
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._ended = False
        self._given_up = False
        self._stored = False
        self._handing: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._sending: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Nothing is asked of the bucket before there are bytes for it."""

    def write(self, chunk: bytes) -> None:
        self._pieces.append(chunk)
        self._bytes += len(chunk)

    def finish(self) -> None:
        self._ended = True

    def discard(self) -> None:
        self._given_up = True
        self._pieces.clear()

    async def settle(self) -> None:
        """Bring about what was asked for; raises StorageUnavailable."""
        if self._given_up:
            await self._remove()
        elif self._sending is not None or self._bytes >= self._part_bytes:
            await self._send()
        elif self._ended and not self._stored:
            self._stored = True  # whatever the answer is, it may be there now
            await self._bucket.put(self._key, self._taken())

    async def _send(self) -> None:
        if self._sending is None:
            self._stored = True
            self._sending = asyncio.create_task(
                self._bucket.put_parts(self._key, self._handed(), part_bytes=self._part_bytes), name="blobs.parts"
            )
        if self._pieces:
            await self._hand(self._sending, self._taken())
        if self._ended and not self._sending.done():
            await self._hand(self._sending, None)
            await self._sending

    async def _hand(self, sending: asyncio.Task[None], piece: bytes | None) -> None:
        """Give a piece to who sends; raises what ended the sending."""
        handing = asyncio.create_task(self._handing.put(piece))
        await asyncio.wait({handing, sending}, return_when=asyncio.FIRST_COMPLETED)
        if not handing.done():
            handing.cancel()
            await sending

    async def _handed(self) -> AsyncIterator[bytes]:
        while True:
            piece = await self._handing.get()
            if self._given_up:
                raise GivenUp
            if piece is None:
                return
            yield piece

    async def _remove(self) -> None:
        if self._sending is not None and not self._sending.done():
            if self._handing.empty():
                self._handing.put_nowait(None)
            await asyncio.wait({self._sending})
        gone = self._sending is not None and isinstance(self._sending.exception(), GivenUp)
        if self._stored and not gone:
            await self._bucket.delete([self._key])
        self._stored = False

    def _taken(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken
