"""A TCP proxy that can be told to cut: at once, or just when a COMMIT was carried out and its answer is on its way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Literal

COMMIT = b"COMMIT;\x00"
MOVES_POSITION = b"SET next_offset"
"""Stands in a statement of the projection's transactions, and is seen once on each connection that has them."""
BYTES_MAX = 65_536

Cut = Literal["before the commit", "after the commit"]


class Proxy:
    """Carries bytes to `target_port`, both ways. `cuts`: what the next COMMITs of the projection meet, one each."""

    def __init__(self, *, target_port: int) -> None:
        self.port = 0
        self.cuts: list[Cut] = []
        self.cut_at: list[Cut] = []
        self.on_cut: Callable[[str], None] = lambda _cut: None
        self._target_port = target_port
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}

    @contextlib.asynccontextmanager
    async def carrying(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut_all()
            await server.wait_closed()

    def cut_all(self) -> None:
        """Cut every connection there is; new ones are carried."""
        for client, server in list(self._open.items()):
            client.transport.abort()
            server.transport.abort()

    async def _carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            to_client.transport.abort()
            return
        self._open[to_client] = to_server
        committed = asyncio.Event()
        tasks = [
            asyncio.create_task(self._forth(from_client, to_server, committed)),
            asyncio.create_task(self._back(from_server, to_client, committed)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._open.pop(to_client)
        to_client.transport.abort()
        to_server.transport.abort()

    async def _forth(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, committed: asyncio.Event
    ) -> None:
        """Return where the connection is to be cut."""
        projects = False
        with contextlib.suppress(OSError):
            while chunk := await reader.read(BYTES_MAX):
                projects = projects or MOVES_POSITION in chunk
                if projects and COMMIT in chunk and self.cuts:
                    cut = self.cuts.pop(0)
                    self.cut_at.append(cut)
                    self.on_cut(f"postgres: connection cut just {cut}")
                    if cut == "before the commit":
                        return
                    committed.set()
                writer.write(chunk)
                await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, committed: asyncio.Event) -> None:
        """What the server says after a COMMIT that is to be cut is waited for, and kept from the client."""
        with contextlib.suppress(OSError):
            while chunk := await reader.read(BYTES_MAX):
                if committed.is_set():
                    return
                writer.write(chunk)
                await writer.drain()
