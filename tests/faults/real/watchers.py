"""Clients that follow batches over WebSocket through every cut: what each batch's stream said, message by message.

Who is cut off, by a fault or by its own choice, comes back with `since` and goes on. Nothing is judged here.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from schemas.ids import partition_of
from schemas.position import Position
from services.lifecycle import cancelled
from tests.faults.checking import Stream

PAUSE_S = 0.2
STAYS_S = 2.5
STAYS_MAX = 6
CAUGHT_UP_TIMEOUT_S = 30.0


class Watcher:
    """One user's connection; it follows whatever batches it is told of. `deleted`: those whose user asked for that."""

    def __init__(self, *, urls: list[str], token: str, deleted: set[str], chance: random.Random) -> None:
        self.streams: dict[str, Stream] = {}
        self._urls = [f"ws{url.removeprefix('http')}/v1/ws" for url in urls]
        self._token = token
        self._deleted = deleted
        self._chance = chance
        self._asked: set[str] = set()
        self._subscribed: set[str] = set()
        self._gone: set[str] = set()
        self._new = asyncio.Event()
        self._heard = asyncio.Condition()

    def follow(self, batch_id: str) -> None:
        self.streams[batch_id] = Stream(batch_id)
        self._new.set()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator["Watcher"]:
        task = asyncio.create_task(self._watch(), name="watch")
        try:
            yield self
        finally:
            was_done = task.done()
            await cancelled(task)
            assert not was_done, f"a watcher ended: {task.exception()!r}"

    async def caught_up(self, ends: Mapping[str, int]) -> None:
        """Wait until every stream has come to the last fact of its batch, for a bounded time."""

        def behind() -> bool:
            return any(
                stream.to_the_end and (at(stream) or 0) < ends.get(batch_id, 0)
                for batch_id, stream in self.streams.items()
            )

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CAUGHT_UP_TIMEOUT_S), self._heard:
                await self._heard.wait_for(lambda: not behind())

    async def _watch(self) -> None:
        while True:
            reason = "the client closed"
            try:
                async with connect(
                    self._chance.choice(self._urls), open_timeout=5, close_timeout=2, proxy=None, max_size=None
                ) as socket:
                    await self._talk(socket)
            except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as error:
                reason = str(error) or type(error).__name__
            for batch_id in self._subscribed:
                self.streams[batch_id].messages.append({"type": "cut", "reason": reason})
            self._subscribed.clear()
            await asyncio.sleep(PAUSE_S)

    async def _talk(self, socket: ClientConnection) -> None:
        """For a while, until all was answered that was asked: then this client has had enough, and comes back."""
        await socket.send(json.dumps({"type": "auth", "token": self._token}))
        self._asked.clear()
        asking = asyncio.create_task(self._ask(socket), name="ask")
        try:
            for _ in range(STAYS_MAX):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._chance.uniform(1, 2) * STAYS_S):
                        await self._listen(socket)
                        return
                if self.streams.keys() <= self._subscribed | self._gone:
                    return
        finally:
            await cancelled(asking)

    async def _listen(self, socket: ClientConnection) -> None:
        async for frame in socket:
            for line in str(frame).split("\n"):
                self._take(json.loads(line))
            async with self._heard:
                self._heard.notify_all()

    async def _ask(self, socket: ClientConnection) -> None:
        """Subscribe to what is new, and again to what was refused; each in its turn."""
        while True:
            self._new.clear()
            for batch_id, stream in list(self.streams.items()):
                if batch_id not in self._asked | self._gone:
                    self._asked.add(batch_id)
                    since = last_position(stream)
                    wish = {"type": "subscribe", "batch_id": batch_id, **({"since": since} if since else {})}
                    await socket.send(json.dumps(wish))
            await self._new.wait()
            await asyncio.sleep(PAUSE_S)

    def _take(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "subscribed":
                self._subscribed.add(message["batch_id"])
                self.streams[message["batch_id"]].messages.append(message)
            case "event":
                batch_id = message["event"]["data"]["batch_id"]
                self.streams[batch_id].messages.append(message)
                if message["batch"] is None:
                    self._gone.add(batch_id)
            case "error":
                self._take_refusal(message)

    def _take_refusal(self, message: dict[str, Any]) -> None:
        """Deleted while we were away, not known to this notifier yet, or not to be looked up just now."""
        batch_id = message["batch_id"]
        self.streams[batch_id].messages.append(message)
        if message["code"] == "not_found" and batch_id in self._deleted:
            self.streams[batch_id].to_the_end = False
            self._gone.add(batch_id)
            return
        self._asked.discard(batch_id)
        self._new.set()


def last_position(stream: Stream) -> str | None:
    return next((each["position"] for each in reversed(stream.messages) if "position" in each), None)


def at(stream: Stream) -> int | None:
    """Where the stream is in its batch's partition."""
    position = last_position(stream)
    return None if position is None else Position.parse(position).offset(partition_of(stream.batch_id))
