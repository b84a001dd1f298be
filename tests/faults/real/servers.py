"""A Kafka and a Postgres that may be killed, paused, restarted and left without room; when each was away is noted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

import asyncpg

from services.embedded import EmbeddedKafka, EmbeddedPostgres
from tests.faults.checking import Away
from tests.faults.real.disks import SmallDisk

Part = Literal["kafka", "postgres"]
ENDS_WITHIN_S = 3.0
"""How long a server that met a full disk may take to end by that, once there is room again."""
USED_UP_WITHIN_S = 10.0


class Breakable:
    """One server on a fixed port, on a small disk of its own where it is given one; it breaks in one way at a time.
    `on_strike` is told each fault."""

    def __init__(self, part: Part, *, data_dir: Path, disk: SmallDisk | None = None) -> None:
        self.part = part
        self.disk = disk
        self._turn = asyncio.Lock()
        self.away: list[Away] = []
        self.server = self._new(data_dir, 0)
        self._data_dir = data_dir
        self.on_strike: Callable[[str], None] = lambda _fault: None

    def _new(self, data_dir: Path, port: int) -> EmbeddedKafka | EmbeddedPostgres:
        made = EmbeddedKafka if self.part == "kafka" else EmbeddedPostgres
        return made(data_dir=data_dir, port=port)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Breakable]:
        await self.server.start()
        try:
            yield self
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGCONT)
            await self.server.stop()

    async def pause(self, seconds: float) -> None:
        """SIGSTOP for so long."""
        async with self._struck(f"{self.part} paused"):
            with self._gone():
                for pid in self._pids():
                    os.kill(pid, signal.SIGSTOP)
                await let_pass(seconds)
                for pid in self._pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    async def kill(self, *, away_s: float = 0.0) -> None:
        """SIGKILL, and a new one on the same data after so long."""
        async with self._struck(f"{self.part} killed"):
            with self._gone():
                os.kill(self.server.pid, signal.SIGKILL)
                await self.server.wait()
                await self._again(away_s)

    async def restart(self, *, away_s: float = 0.0) -> None:
        """A clean stop, and a new one on the same data after so long."""
        async with self._struck(f"{self.part} restarted"):
            with self._gone():
                await self._again(away_s)

    async def fill(self, seconds: float) -> None:
        """No room at all on its disk for so long, of Postgres' in its log neither; where it ends by that, a new one on
        the same data when there is room again."""
        assert self.disk is not None, f"{self.part} has no disk of its own"
        async with self._struck(f"{self.part}: disk full"):
            await self.disk.fill()
            try:
                if isinstance(self.server, EmbeddedPostgres):
                    await use_up_the_log(self.server.url)
                await let_pass(seconds)
            finally:
                await self.disk.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.server.wait(), ENDS_WITHIN_S)
            if not self.server.runs:
                with self._gone():
                    await self._again(0)

    async def _again(self, away_s: float) -> None:
        port = self.server.port
        await self.server.stop()
        await let_pass(away_s)
        self.server = self._new(self._data_dir, port)
        await self.server.start()

    def _pids(self) -> list[int]:
        """Of Postgres also its sessions: a stopped parent alone would only keep new ones away."""
        if self.part == "kafka":
            return [self.server.pid]
        children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children")
        return [self.server.pid, *map(int, children.read_text().split())]

    @contextlib.asynccontextmanager
    async def _struck(self, fault: str) -> AsyncIterator[None]:
        async with self._turn:
            self.on_strike(fault)
            yield

    @contextlib.contextmanager
    def _gone(self) -> Iterator[None]:
        from_s = time.monotonic()
        try:
            yield
        finally:
            self.away.append(Away(self.part, from_s, time.monotonic()))


async def let_pass(seconds: float) -> None:
    """A fault lasts; there is nothing to wait for."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:  # noqa: ASYNC110  # see above
        await asyncio.sleep(min(0.5, left_s))


async def use_up_the_log(url: str) -> None:
    """Go through the segments of Postgres' write-ahead log that are there, until it needs one more."""
    with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        async with asyncio.timeout(USED_UP_WITHIN_S):
            connection = await asyncpg.connect(url, timeout=5)
            try:
                while True:
                    await connection.execute("SELECT pg_logical_emit_message(false, 'test', 'full'), pg_switch_wal()")
            finally:
                connection.terminate()
