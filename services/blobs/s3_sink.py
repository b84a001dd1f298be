"""A file on its way into a bucket: a small one in one request, a larger one part by part while it comes.

A part is sent when it is full, and nothing more is taken until it is there, so a large file holds one part in memory
whatever its size. How many are sent at once is the store's to say: who takes a turn has a part to send, and none is
still waiting for its bytes. A file that is given up is aborted there, so that no part of it stays; only a process that
dies leaves parts behind, which a lifecycle rule of the bucket removes.
"""

import asyncio
from collections import deque
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
        self._pieces: deque[bytes] = deque()
        self._bytes = 0
        self._ended = False
        self._given_up = False
        self._stored = False
        self._handing: asyncio.Queue[list[bytes] | None] = asyncio.Queue()
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

    @property
    def sends_part(self) -> bool:
        """Whether `settle` has a part of a large file to send now, or its end."""
        full, is_large = self._bytes >= self._part_bytes, self._sending is not None
        return not self._given_up and (full or (is_large and self._ended))

    async def settle(self) -> None:
        """Bring about what was asked for; raises StorageUnavailable."""
        if self._given_up:
            await self._remove()
        elif self.sends_part:
            await self._send()
        elif self._ended and not self._stored:
            self._stored = True  # whatever the answer is, it may be there now
            await self._bucket.put(self._key, b"".join(self._pieces))
            self._pieces.clear()

    async def _send(self) -> None:
        """What is there in parts, the rest too when the file has ended."""
        if self._sending is None:
            self._stored = True
            self._sending = asyncio.create_task(
                self._bucket.put_parts(self._key, self._handed(), part_bytes=self._part_bytes), name="blobs.parts"
            )
        while self._bytes >= self._part_bytes or (self._ended and self._bytes):
            await self._hand(self._sending, self._part())
        if self._ended and not self._sending.done():
            self._handing.put_nowait(None)
            await self._sending

    def _part(self) -> list[bytes]:
        """The next part: as many bytes as every part but the last one has, or what is left."""
        part: list[bytes] = []
        missing = self._part_bytes
        while self._pieces and missing:
            piece = self._pieces.popleft()
            part.append(piece[:missing])
            if rest := piece[missing:]:
                self._pieces.appendleft(rest)
            missing -= len(part[-1])
        self._bytes -= self._part_bytes - missing
        return part

    async def _hand(self, sending: asyncio.Task[None], part: list[bytes]) -> None:
        """Give a part to who sends, and return when it is there; raises what ended the sending."""
        self._handing.put_nowait(part)
        taken = asyncio.create_task(self._handing.join())
        await asyncio.wait({taken, sending}, return_when=asyncio.FIRST_COMPLETED)
        if not taken.done():
            taken.cancel()
            await sending

    async def _handed(self) -> AsyncIterator[bytes]:
        while True:
            part = await self._handing.get()
            if self._given_up:
                raise GivenUp
            if part is None:
                return
            for piece in part:
                yield piece
            part.clear()
            yield b""  # who asks for what follows this has sent the part
            self._handing.task_done()

    async def _remove(self) -> None:
        if self._sending is not None and not self._sending.done():
            self._handing.put_nowait(None)
            await asyncio.wait({self._sending})
        gone = self._sending is not None and isinstance(self._sending.exception(), GivenUp)
        if self._stored and not gone:
            await self._bucket.delete([self._key])
        self._stored = False
