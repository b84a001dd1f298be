"""The files of one request on their way into the store: hashed, told by content, counted and kept within limits.

Bytes wait in memory until there are `FLUSH_BYTES` of them or `FLUSH_FILES` files are complete, then one thread hop
judges and writes them all; until the store has settled them nothing more is read, so the pressure reaches the sender
and memory stays flat. A file that is refused is hashed to its end (a request's fingerprint includes it) and not kept.
What nobody asked to keep is removed when the intake closes, also after a disconnect.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from schemas.errors import Code
from services.blobs.naming import fresh_name
from services.blobs.sniff import SNIFF_BYTES, sniff
from services.blobs.store import BlobStore, Sink, StorageUnavailable

FLUSH_BYTES = 1024 * 1024
FLUSH_FILES = 64


@dataclass(slots=True)
class Room:
    """What still fits: bytes of one file, files, and bytes together."""

    file_bytes_max: int
    files: int
    bytes: int


class Incoming:
    """One file. Once it ended: `sha256` (hex), `size_bytes`, and either `content_type` and `blob`, or `problem`.

    With `hash_only` its bytes are only hashed and counted.
    """

    def __init__(self, blob: str, sink: Sink, room: Room, *, hash_only: bool) -> None:
        self.blob = blob
        self.size_bytes = 0
        self.sha256 = ""
        self.content_type: str | None = None
        self.problem: Code | None = None
        self.sink = sink
        self._room = room
        self._hash_only = hash_only
        self._digest = hashlib.sha256()
        self._head = b""
        self._begun = False

    def write(self, chunk: bytes) -> None:
        """Take more bytes; in a thread."""
        self._digest.update(chunk)
        self.size_bytes += len(chunk)
        if self._wanted():
            self._keep(chunk)
        if self._wanted() and self.size_bytes > self._room.file_bytes_max:
            self._refuse(Code.FILE_TOO_LARGE)
        if self._wanted() and self._begun and self.size_bytes > self._room.bytes:
            self._refuse(Code.BATCH_TOO_LARGE)

    def end(self) -> None:
        """All bytes came; in a thread."""
        self.sha256 = self._digest.hexdigest()
        if self._wanted() and self.size_bytes == 0:
            self._refuse(Code.EMPTY_FILE)
        if self._wanted() and not self._begun:
            self._begin()
        if self._wanted() and self.size_bytes > self._room.bytes:
            self._refuse(Code.BATCH_TOO_LARGE)
        if self._wanted():
            self._finish()

    def _wanted(self) -> bool:
        return not self._hash_only and self.problem is None

    def _keep(self, chunk: bytes) -> None:
        if self._begun:
            self.sink.write(chunk)
            return
        self._head += chunk
        if len(self._head) >= SNIFF_BYTES:
            self._begin()

    @property
    def kept(self) -> bool:
        """Whether it ended and its bytes lie in the store."""
        return bool(self.sha256) and self.content_type is not None and self.problem is None

    def _begin(self) -> None:
        """The first bytes are here: tell what it is, and write them if it is taken."""
        self.content_type = sniff(self._head)
        if self.content_type is None:
            self._refuse(Code.UNSUPPORTED_MEDIA_TYPE)
        elif self._room.files <= 0:
            self._refuse(Code.TOO_MANY_FILES)
        else:
            self._begun = True
            self.sink.begin()
            self.sink.write(self._head)
        self._head = b""

    def _finish(self) -> None:
        assert self._begun, "a file with bytes and without a problem was begun"
        self.sink.finish()
        self._room.files -= 1
        self._room.bytes -= self.size_bytes

    def _refuse(self, problem: Code) -> None:
        self.problem = problem
        self._head = b""
        if self._begun:
            self.sink.discard()


@dataclass(slots=True)
class Intake:
    """See the module's text. Use it as `async with Intake(store, room) as intake`."""

    store: BlobStore
    room: Room
    _files: set[Incoming] = field(default_factory=set)
    _waiting: list[tuple[Incoming, bytes | None]] = field(default_factory=list)
    _waiting_bytes: int = 0
    _waiting_files: int = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drop(list(self._files))

    def begin(self, upload_id: str, *, hash_only: bool = False) -> Incoming:
        """A file begins; `hash_only` where its bytes are here already or are not wanted."""
        blob = fresh_name(upload_id)
        sink = self.store.sink(blob, bytes_max=self.room.file_bytes_max)
        incoming = Incoming(blob, sink, self.room, hash_only=hash_only)
        if not hash_only:
            self._files.add(incoming)
        return incoming

    async def write(self, incoming: Incoming, chunk: bytes) -> None:
        """More bytes of a file; raises StorageUnavailable."""
        self._waiting.append((incoming, chunk))
        self._waiting_bytes += len(chunk)
        if self._waiting_bytes >= FLUSH_BYTES:
            await self.flush()

    async def end(self, incoming: Incoming) -> None:
        """A file's bytes all came; it is judged at the next flush. Raises StorageUnavailable."""
        self._waiting.append((incoming, None))
        self._waiting_files += 1
        if self._waiting_files >= FLUSH_FILES:
            await self.flush()

    async def flush(self) -> None:
        """Write what waits; raises StorageUnavailable."""
        waiting, self._waiting = self._waiting, []
        self._waiting_bytes = self._waiting_files = 0
        if waiting:
            await self.store.settle(await self.store.run(lambda: _take(waiting)))

    def keep(self) -> None:
        """From here on the log may name these files, so none is removed unless it is dropped by name."""
        self._files.clear()

    async def drop(self, files: Iterable[Incoming]) -> None:
        """Remove what these files left here; what cannot be removed now is left to the sweeper."""
        dropped = list(files)
        self._files.difference_update(dropped)
        if dropped:
            with contextlib.suppress(StorageUnavailable):
                await self.store.settle(await self.store.run(lambda: _discard(dropped)))


def _take(waiting: Iterable[tuple[Incoming, bytes | None]]) -> Sequence[Sink]:
    """Judge and write what came, in order; the sinks that were told something."""
    told: dict[Incoming, Sink] = {}
    for incoming, chunk in waiting:
        if chunk is None:
            incoming.end()
        else:
            incoming.write(chunk)
        told[incoming] = incoming.sink
    return [*told.values()]


def _discard(files: Iterable[Incoming]) -> Sequence[Sink]:
    sinks = [incoming.sink for incoming in files]
    with contextlib.ExitStack() as stack:  # each is discarded, also where another cannot be
        for sink in sinks:
            stack.callback(sink.discard)
    return sinks
