"""A Kafka and a Postgres that may be killed, paused and restarted; when each was away is written down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

from services.embedded import EmbeddedKafka, EmbeddedPostgres
from tests.faults.checking import Away

Part = Literal["kafka", "postgres"]


class Breakable:
    """One server on a fixed port. `on_strike` is told each fault."""

    def __init__(self, part: Part, *, data_dir: Path) -> None:
        self.part = part
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
        self.on_strike(f"{self.part} paused")
        with self._gone():
            for pid in self._pids():
                os.kill(pid, signal.SIGSTOP)
            await let_pass(seconds)
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def kill(self, *, away_s: float = 0.0) -> None:
        """SIGKILL, and a new one on the same data after so long."""
        self.on_strike(f"{self.part} killed")
        with self._gone():
            os.kill(self.server.pid, signal.SIGKILL)
            await self.server.wait()
            await self._again(away_s)

    async def restart(self, *, away_s: float = 0.0) -> None:
        """A clean stop, and a new one on the same data after so long."""
        self.on_strike(f"{self.part} restarted")
        with self._gone():
            await self._again(away_s)

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
