"""A server that is kept running as `sluice up` keeps its own, by the same supervisor; nobody else starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import httpx

from services.cli.parts import Server
from services.cli.supervision import Supervisor
from services.embedded import EmbeddedKafka, EmbeddedPostgres
from services.lifecycle import cancelled
from tests.faults.checking import Away

SAID_WITHIN_S = 60.0


class Supervised:
    """`lines`: what the supervisor said; `away`: from when to when there was no server, by what it said."""

    def __init__(self, server: EmbeddedKafka | EmbeddedPostgres) -> None:
        self.server = server
        self.lines: list[str] = []
        self.away: list[Away] = []
        self._ended_s = 0.0
        self._more = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Supervised]:
        """Started, and started again whenever it ends, until the block is left."""
        async with self.server, httpx.AsyncClient(trust_env=False) as http:
            supervisor = Supervisor(http=http, say=self._say, changed=lambda: None)
            keeping = asyncio.create_task(supervisor.keep([Server(self.server)]), name=f"keep {self.server.name}")
            try:
                yield self
            finally:
                gave_up = keeping.done()
                await cancelled(keeping)
                assert not gave_up, f"the supervisor ended: {keeping.exception()!r}"

    def _say(self, _part: str, line: str) -> None:
        self.lines.append(line)
        if line.startswith("ended "):
            self._ended_s = time.monotonic()
        elif line.startswith("ready again "):
            self.away.append(Away(self.server.name, self._ended_s, time.monotonic()))
        self._more.set()

    async def said(self, beginning: str) -> None:
        """Wait until the supervisor said a line that begins so."""
        try:
            async with asyncio.timeout(SAID_WITHIN_S):
                while not any(line.startswith(beginning) for line in self.lines):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            said = "\n".join(self.lines)
            raise AssertionError(f"{beginning!r} was not said within {SAID_WITHIN_S:.0f} s, only:\n{said}") from None
