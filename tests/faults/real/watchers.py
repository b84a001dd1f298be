"""Clients that follow batches over WebSocket through every cut, one by one or all of their user's at once: what each
stream said, message by message.

Who is cut off, by a fault or by its own choice, comes back with `since` and goes on. Nothing is judged here. The same
over server-sent events: `listeners.py`.
"""

import asyncio
import contextlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from services.lifecycle import cancelled
from tests.faults.checking import Stream
from tests.faults.checking.folded import FoldedLog
from tests.faults.checking.streams import at_the_end, untold

PAUSE_S = 0.2
STAYS_S = 2.5
STAYS_MAX = 6
CAUGHT_UP_TIMEOUT_S = 30.0


class Follower(ABC):
    """Somebody who follows batches of a user. `deleted`: those whose user asked for that."""

    def __init__(self, *, urls: Sequence[str], token: str, deleted: set[str], chance: random.Random) -> None:
        self.streams: dict[str | None, Stream] = {}
        """By batch; that of all batches is under None."""
        self._urls = urls
        self._token = token
        self._deleted = deleted
        self._chance = chance
        self._heard = asyncio.Condition()

    @abstractmethod
    def hear_of(self, batch_id: str) -> None:
        """Its user made this batch: follow it, perhaps."""

    @abstractmethod
    def watching(self) -> contextlib.AbstractAsyncContextManager[Self]:
        """Follow, and come back after each cut, until the block is left."""

    async def caught_up(self, folded: FoldedLog) -> None:
        """Wait until every stream has come to the last fact of what it follows, for a bounded time."""

        def behind() -> bool:
            return any(stream.to_the_end and untold(stream, folded) for stream in self.streams.values())

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CAUGHT_UP_TIMEOUT_S), self._heard:
                await self._heard.wait_for(lambda: not behind())

    async def _tell_those_who_wait(self) -> None:
        async with self._heard:
            self._heard.notify_all()

    def _stays_s(self) -> float:
        """How long it listens before it looks whether it was answered, and has had enough."""
        return self._chance.uniform(1, 2) * STAYS_S


class Watcher(Follower):
    """One WebSocket, for whatever batches it hears of, or for all of the user's."""

    def __init__(
        self,
        *,
        urls: Sequence[str],
        token: str,
        deleted: set[str],
        chance: random.Random,
        all_of: str | None = None,
    ) -> None:
        sockets = [f"ws{url.removeprefix('http')}/v1/ws" for url in urls]
        super().__init__(urls=sockets, token=token, deleted=deleted, chance=chance)
        self._follows_all = all_of is not None
        self._asked: set[str | None] = set()
        self._subscribed: set[str | None] = set()
        self._gone: set[str | None] = set()
        self._new = asyncio.Event()
        if all_of is not None:
            self.streams[None] = Stream(None, user_id=all_of)

    def hear_of(self, batch_id: str) -> None:
        if not self._follows_all and batch_id not in self.streams:
            self.streams[batch_id] = Stream(batch_id)
            self._new.set()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Self]:
        task = asyncio.create_task(self._watch(), name="watch")
        try:
            yield self
        finally:
            was_done = task.done()
            await cancelled(task)
            assert not was_done, f"a watcher ended: {task.exception()!r}"

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
            for followed in self._subscribed:
                self.streams[followed].messages.append({"type": "cut", "reason": reason})
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
                    async with asyncio.timeout(self._stays_s()):
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
            await self._tell_those_who_wait()

    async def _ask(self, socket: ClientConnection) -> None:
        """Subscribe to what is new, and again to what was refused; each in its turn."""
        while True:
            self._new.clear()
            for followed, stream in list(self.streams.items()):
                if followed not in self._asked | self._gone:
                    self._asked.add(followed)
                    since, _ = at_the_end(stream)
                    what = {"user": True} if followed is None else {"batch_id": followed}
                    wish = {"type": "subscribe", **what, **({"since": since} if since else {})}
                    await socket.send(json.dumps(wish))
            await self._new.wait()
            await asyncio.sleep(PAUSE_S)

    def _take(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "subscribed":
                followed = message.get("batch_id")
                self._subscribed.add(followed)
                self.streams[followed].messages.append(message)
            case "event":
                batch_id = message["event"]["data"]["batch_id"]
                self.streams[None if self._follows_all else batch_id].messages.append(message)
                if message["batch"] is None and not self._follows_all:
                    self._gone.add(batch_id)
            case "error":
                self._take_refusal(message)

    def _take_refusal(self, message: dict[str, Any]) -> None:
        """Deleted while we were away, not known to this notifier yet, or not to be looked up just now."""
        followed = message.get("batch_id")
        self.streams[followed].messages.append(message)
        if message["code"] == "not_found" and followed in self._deleted:
            self.streams[followed].to_the_end = False
            self._gone.add(followed)
            return
        self._asked.discard(followed)
        self._new.set()
