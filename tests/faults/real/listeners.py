"""Clients that follow all batches of their user, and some one by one, over server-sent events through every cut: each
stream is a request of its own, which comes back with the last id it was sent as `Last-Event-ID`.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Self

import httpx

from services.lifecycle import cancelled
from tests.faults.checking import Stream
from tests.faults.checking.streams import at_the_end
from tests.faults.real.clients import code_of
from tests.faults.real.watchers import PAUSE_S, STAYS_MAX, Follower

BATCHES_MAX = 2
"""So many of the batches it hears of are followed: each is a connection."""
TIMEOUT_S = 5.0


class Listener(Follower):
    """One user's streams."""

    def __init__(self, *, urls: Sequence[str], token: str, deleted: set[str], chance: random.Random, user: str) -> None:
        super().__init__(urls=urls, token=token, deleted=deleted, chance=chance)
        self._user = user
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
            timeout=httpx.Timeout(TIMEOUT_S, read=None),  # how long a stream may be silent is not ours to say
        )
        self._last_ids: dict[str | None, str] = {}
        self._subscribed: set[str | None] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def hear_of(self, batch_id: str) -> None:
        if len(self.streams) <= BATCHES_MAX and batch_id not in self.streams:
            self._follow(Stream(batch_id, by="SSE"))

    def _follow(self, stream: Stream) -> None:
        self.streams[stream.batch_id] = stream
        self._tasks.append(asyncio.create_task(self._watch(stream), name="listen"))

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Self]:
        self._follow(Stream(None, user_id=self._user, by="SSE"))
        try:
            yield self
        finally:
            ended = [task for task in self._tasks if task.done()]
            await cancelled(*self._tasks)
            await self._http.aclose()
            for task in ended:
                task.result()

    async def _watch(self, stream: Stream) -> None:
        while not self._is_over(stream):
            listening = asyncio.create_task(self._listen(stream))
            try:
                for _ in range(STAYS_MAX):
                    done, _ = await asyncio.wait({listening}, timeout=self._stays_s())
                    if done or stream.batch_id in self._subscribed:
                        break
            finally:
                await cancelled(listening)
            reason = "the client closed" if listening.cancelled() else listening.result()
            if stream.batch_id in self._subscribed:
                stream.messages.append({"type": "cut", "reason": reason})
                self._subscribed.discard(stream.batch_id)
            await asyncio.sleep(PAUSE_S)
        await asyncio.Event().wait()  # nothing more will come

    async def _listen(self, stream: Stream) -> str:
        """One request, to its end; how it ended."""
        path = "/v1/stream" if stream.batch_id is None else f"/v1/stream/batches/{stream.batch_id}"
        last_id = self._last_ids.get(stream.batch_id)
        headers = {"Last-Event-ID": last_id} if last_id else {}
        try:
            async with self._http.stream("GET", f"{self._chance.choice(self._urls)}{path}", headers=headers) as answer:
                if not answer.is_success:
                    await answer.aread()
                    self._take_refusal(stream, code_of(answer))
                    await self._tell_those_who_wait()
                    return "it was refused"
                return await self._hear(stream, answer)
        except httpx.TransportError as error:
            return str(error) or type(error).__name__

    async def _hear(self, stream: Stream, answer: httpx.Response) -> str:
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                continue
            if fields.get("event") == "close":
                return fields["data"]
            if "data" in fields:
                self._take(stream, fields)
                await self._tell_those_who_wait()
            fields = {}
        return "the answer ended"

    def _take(self, stream: Stream, fields: dict[str, str]) -> None:
        message = json.loads(fields["data"])
        if message["type"] == "subscribed":
            self._subscribed.add(stream.batch_id)
        if "id" in fields:
            self._last_ids[stream.batch_id] = fields["id"]
        if message["type"] in ("subscribed", "event"):
            stream.messages.append(message)

    def _take_refusal(self, stream: Stream, code: str) -> None:
        """As over WebSocket: deleted meanwhile, not known yet, or not to be looked up just now."""
        stream.messages.append({"type": "error", "code": code})
        if code == "not_found" and stream.batch_id in self._deleted:
            stream.to_the_end = False

    def _is_over(self, stream: Stream) -> bool:
        """Whether it heard that its batch is deleted."""
        _, known = at_the_end(stream)
        return not stream.to_the_end or (stream.batch_id in known and known[stream.batch_id] is None)
