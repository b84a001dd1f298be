"""The server-sent events skin: one subscription a connection, the same messages as over WebSocket, each fact under its
position as `id`, so that `Last-Event-ID` goes on where the stream broke.

For clients that can set headers (the token stands in `Authorization`, never in the URL). What cannot be streamed is
answered with a problem before the stream begins; a stream that must end says so with an event `close` (code and reason
as a WebSocket would be closed). Comments keep it alive meanwhile. HTML Living Standard, section 9.2.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from schemas.errors import Code, RequestError
from services.auth import bearer
from services.database import DatabaseUnavailable
from services.lifecycle import cancelled
from services.notifier import messages
from services.notifier.hub import Client, Close, Frame, TooManyConnectionsError
from services.notifier.sessions import (
    CLOSE_TIMEOUT_S,
    FRAME_BYTES_MAX,
    JOIN_PAUSE_S,
    CloseCode,
    Connected,
    Parts,
    Sessions,
)
from services.observability import CLIENTS_CLOSED, FRAMES_SENT
from services.serving import problem_answer

RETRY_MS = 1_000
SILENT_HEARTBEATS_MAX = 2
COMMENT = ":\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Stream(Connected):
    """One connection. `cut`: ends it at once where its client takes nothing."""

    def __init__(self, request: Request, parts: Parts) -> None:
        super().__init__(parts)
        self._request = request
        self._last_event_id = request.headers.get("last-event-id") or None

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, to its end."""
        client: Client | None = None
        try:
            try:
                client = await self._begin()
            except RequestError as error:
                await problem_answer(error)(scope, receive, send)
                return
            await self._stream(client, receive, send)
        finally:
            self.forget_expiry()
            if self.client is not None:
                self.parts.subscriptions.end_all(self.client)

    async def _begin(self) -> Client:
        """A client that is subscribed, with what it is told first in its queue. Raises RequestError."""
        principal = await self.parts.authenticate(bearer(self._request.headers.get("authorization")))
        try:
            self.client = self.parts.hub.connect(wake=self.wake)
            self.parts.hub.identify(self.client, principal.user_id)
            self.end_with_token(principal.expires_at_s)
            batch_id = self._request.path_params.get("batch_id")
            wish = messages.Subscribe(
                type="subscribe", batch_id=batch_id, user=None if batch_id else True, since=self._last_event_id
            )
            await self.parts.subscriptions.begin(self.client, wish)
        except TooManyConnectionsError as error:
            raise RequestError(Code.RATE_LIMITED, str(error)) from None
        except DatabaseUnavailable as error:
            raise RequestError(Code.DATABASE_UNAVAILABLE, f"It cannot be looked up now: {error.told}") from error
        return self.client

    async def _stream(self, client: Client, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        hearing = asyncio.create_task(_gone(receive), name="hear")
        sending = asyncio.create_task(self._send(client, send), name="send")
        try:
            ending: set[asyncio.Future[Any]] = {hearing, sending, self.close}
            await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(hearing, sending)
        if sending.done() and not sending.cancelled():
            sending.result()
        if self.close.done():
            await self._say_goodbye(self.close.result(), receive, send)

    async def _send(self, client: Client, send: Send) -> None:
        await self._put(send, opening())
        while True:
            try:
                async with asyncio.timeout(self.parts.heartbeat_s):
                    await self.woken.wait()
            except TimeoutError:
                await self._put(send, COMMENT)
                continue
            self.woken.clear()
            while frames := client.take(bytes_max=FRAME_BYTES_MAX):
                if not await self._put(send, events(frames)):
                    return
                client.sent(frames)
                FRAMES_SENT.inc()
            await asyncio.sleep(JOIN_PAUSE_S)  # what comes meanwhile goes out together

    async def _put(self, send: Send, text: str) -> bool:
        """Send, within a bound: there are no pings here that would tell a dead client from a slow one."""
        try:
            async with asyncio.timeout(SILENT_HEARTBEATS_MAX * self.parts.heartbeat_s):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except TimeoutError:
            self.end(Close(CloseCode.TOO_SLOW, "nothing was taken for too long", with_position=True))
            return False
        return True

    async def _say_goodbye(self, close: Close, receive: Receive, send: Send) -> None:
        """Say why, and end the answer; cut the connection where its client does not take it."""
        CLIENTS_CLOSED.labels(CloseCode(close.code).name.lower()).inc()
        last = closing(close.code, self.reason(close))
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await send({"type": "http.response.body", "body": last.encode(), "more_body": False})
        except TimeoutError:
            self._request.scope["state"]["cut"]()
            await _gone(receive)


class Streaming(Response):
    """The answer that streams, for as long as the connection lasts."""

    def __init__(self, request: Request, sessions: Sessions) -> None:
        super().__init__()
        self._request = request
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = Stream(self._request, self._sessions.parts)
        with self._sessions.counted(stream):
            await stream.run(scope, receive, send)


def opening() -> str:
    """What a stream begins with: how long a client waits before it comes back."""
    return f"retry: {RETRY_MS}\n\n"


def closing(code: int, reason: str) -> str:
    """What a stream ends with, if we end it."""
    return f"event: close\ndata: {json.dumps({'type': 'close', 'code': code, 'reason': reason})}\n\n"


def events(frames: Sequence[Frame]) -> str:
    """Messages as server-sent events; those of facts and snapshots carry their position as id."""
    return "".join(
        f"id: {frame.position}\ndata: {frame.text}\n\n" if frame.position else f"data: {frame.text}\n\n"
        for frame in frames
    )


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
