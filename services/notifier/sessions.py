"""The WebSocket skin: one session a connection, which hears its client and sends what the hub has queued for it.

A session has two tasks. One hears messages, one at a time; the other sends what waits, joined into frames, at most one
frame per `JOIN_PAUSE_S`. Neither can keep other clients waiting: the hub never awaits a socket. A connection that must
end is closed within `CLOSE_TIMEOUT_S`, or cut where its client takes nothing. Close codes stand in `CloseCode`.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, assert_never

from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from schemas.errors import Code, RequestError
from services.auth import Principal
from services.database import DatabaseUnavailable
from services.faults import reach
from services.lifecycle import cancelled
from services.notifier import messages
from services.notifier.hub import TOO_SLOW, Client, Close, Frame, Hub, TooManyConnectionsError
from services.notifier.subscriptions import Subscriptions
from services.observability import CLIENTS, CLIENTS_CLOSED, FRAMES_SENT, logger
from services.serving import HttpConnection

_log = logger("notifier")

AUTH_TIMEOUT_S = 5.0
JOIN_PAUSE_S = 0.002
CLOSE_TIMEOUT_S = 5.0
CUT_AFTER_S = 15.0
RESTART_SPREAD_S_MAX = 3.0
RESTARTS_PER_S = 1_000
FRAME_BYTES_MAX = 256 * 1024
CLIENT_MESSAGE_BYTES_MAX = 16 * 1024
CONNECTED_S_MAX = 30 * 24 * 3600.0


class CloseCode(IntEnum):
    """Why we close a connection (4000 and above: our own, RFC 6455 section 7.4.2)."""

    RESTARTING = 1012
    UNAUTHORIZED = 4001
    TOO_SLOW = TOO_SLOW
    TOO_MANY = 4009


class StreamConnection(HttpConnection):
    """An HTTP connection that also tells a stream how to cut it off where its client takes nothing."""

    def on_headers_complete(self) -> None:
        self.scope["state"]["cut"] = self.transport.abort
        super().on_headers_complete()


class Connection(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, which also tells the session how to cut it off, and is cut off when a ping stays
    without answer. uvicorn closes instead; but a close frame waits behind what is not read, perhaps for ever."""

    async def run_asgi(self) -> None:
        self.scope["state"]["cut"] = self.transport.abort
        await super().run_asgi()

    def keepalive_timeout(self) -> None:
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a session needs. `authenticate` says whom a token speaks for, or raises RequestError."""

    hub: Hub
    subscriptions: Subscriptions
    authenticate: Callable[[str], Awaitable[Principal]]
    heartbeat_s: float


class Connected:
    """What every connection has, whatever its skin: a client of the hub, and a reason once it must end."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.client: Client | None = None
        self.woken = asyncio.Event()
        self.close: asyncio.Future[Close] = asyncio.get_running_loop().create_future()
        self._expiry: asyncio.TimerHandle | None = None

    def end(self, close: Close) -> None:
        """Have the connection closed; the first reason given stays."""
        if not self.close.done():
            self.close.set_result(close)

    def reason(self, close: Close) -> str:
        """Why it ends; to be asked for when nothing is sent any more."""
        return close.reason(self.client.position if self.client is not None else None)

    def wake(self) -> None:
        """Something waits for the client, or it must end."""
        if self.client is not None and self.client.close is not None:
            self.end(self.client.close)
        self.woken.set()

    def end_with_token(self, expires_at_s: float | None) -> None:
        """End it when the token does, unless this is called with a newer one before."""
        self.forget_expiry()
        left_s = CONNECTED_S_MAX if expires_at_s is None else min(CONNECTED_S_MAX, expires_at_s - time.time())
        expired = Close(CloseCode.UNAUTHORIZED, "the token has expired: come back with a new one and `since`")
        self._expiry = asyncio.get_running_loop().call_later(max(0.0, left_s), self.end, expired)

    def forget_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()


class Sessions:
    """All connections of this notifier."""

    def __init__(self, parts: Parts) -> None:
        self.stopping = False
        self.parts = parts
        self._open: dict[Connected, asyncio.Task[None]] = {}

    @contextlib.contextmanager
    def counted(self, connected: Connected) -> Iterator[None]:
        """Know of this connection, which the current task serves, as long as the block lasts."""
        task = asyncio.current_task()
        assert task is not None
        self._open[connected] = task
        CLIENTS.set(len(self._open))
        if self.stopping:
            connected.end(RESTARTING)
        try:
            yield
        finally:
            del self._open[connected]
            CLIENTS.set(len(self._open))

    async def serve(self, websocket: WebSocket) -> None:
        """Talk with one client until the connection ends."""
        session = Session(websocket, self.parts)
        with self.counted(session):
            await session.run()

    async def close(self) -> None:
        """Send every client away, not all at the same moment: they come back to another notifier, or to the next."""
        self.stopping = True
        loop = asyncio.get_running_loop()
        ending = dict(self._open)
        for number, session in enumerate(ending):
            delay_s = min(number / RESTARTS_PER_S, number / len(ending) * RESTART_SPREAD_S_MAX)
            loop.call_later(delay_s, session.end, RESTARTING)
        if ending:
            await asyncio.wait(ending.values())
        _log.info("clients_sent_away", clients=len(ending), position=str(self.parts.subscriptions.tail.position()))


class Session(Connected):
    """One WebSocket."""

    def __init__(self, websocket: WebSocket, parts: Parts) -> None:
        super().__init__(parts)
        self._websocket = websocket

    async def run(self) -> None:
        """Accept the connection and talk until one of the two ends it."""
        with contextlib.suppress(WebSocketDisconnect):
            await self._websocket.accept()
            await self._talk()
            if self.close.done():
                await self._say_goodbye(self.close.result())

    async def _talk(self) -> None:
        try:
            self.client = self.parts.hub.connect(wake=self.wake)
        except TooManyConnectionsError as error:
            self.end(Close(CloseCode.TOO_MANY, str(error)))
            return
        hearing = asyncio.create_task(self._hear(self.client), name="hear")
        sending = asyncio.create_task(self._send(self.client), name="send")
        try:
            ending: set[asyncio.Future[Any]] = {hearing, sending, self.close}
            await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(hearing, sending)
            self.forget_expiry()
            self.parts.subscriptions.end_all(self.client)
        for task in (hearing, sending):
            if not task.cancelled():
                task.result()

    async def _say_goodbye(self, close: Close) -> None:
        """Send the close frame; cut the connection where the client does not take it or does not answer it."""
        CLIENTS_CLOSED.labels(CloseCode(close.code).name.lower()).inc()
        cut = self._websocket.scope["state"]["cut"]
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._websocket.close(close.code, self.reason(close))
        except TimeoutError:
            cut()
        else:
            asyncio.get_running_loop().call_later(CUT_AFTER_S, cut)

    # Sending

    async def _send(self, client: Client) -> None:
        while True:
            await self.woken.wait()
            self.woken.clear()
            while frames := client.take(bytes_max=FRAME_BYTES_MAX):
                text = messages.joined([frame.text for frame in frames])
                reach("notifier.before_send")
                try:
                    await self._websocket.send_text(text)
                except RuntimeError as error:  # the protocol closed the connection by itself: a frame too large
                    raise WebSocketDisconnect(code=1006) from error
                client.sent(frames)
                FRAMES_SENT.inc()
            await asyncio.sleep(JOIN_PAUSE_S)  # what comes meanwhile goes out as one frame

    # Hearing

    async def _hear(self, client: Client) -> None:
        if not await self._begin(client):
            return
        while True:
            for text in await self._receive():
                await self._answer(client, text)

    async def _receive(self) -> list[str]:
        """The messages of the next frame; of a binary one a message that nobody understands."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"], message.get("reason"))
        text = message.get("text")
        return messages.split(text) if text is not None else ["a binary frame"]

    async def _begin(self, client: Client) -> bool:
        """Learn who the client is, from the handshake or from its first message; whether it may stay."""
        scheme, _, token = self._websocket.headers.get("authorization", "").partition(" ")
        rest: list[str] = []
        try:
            if scheme:
                principal = await self.parts.authenticate(token if scheme.lower() == "bearer" else "")
            else:
                async with asyncio.timeout(AUTH_TIMEOUT_S):
                    first, *rest = await self._receive() or [""]
                principal = await self.parts.authenticate(_token_of(first))
            self.parts.hub.identify(client, principal.user_id)
        except TimeoutError:
            self.end(Close(CloseCode.UNAUTHORIZED, f"no token within {AUTH_TIMEOUT_S:g} s"))
            return False
        except RequestError as error:
            later = error.code is Code.KEYS_UNAVAILABLE  # the token may be good
            self.end(Close(CloseCode.RESTARTING if later else CloseCode.UNAUTHORIZED, error.detail))
            return False
        except TooManyConnectionsError as error:
            self.end(Close(CloseCode.TOO_MANY, str(error)))
            return False
        self._greet(client, principal)
        for text in rest:
            await self._answer(client, text)
        return True

    def _greet(self, client: Client, principal: Principal) -> None:
        self.end_with_token(principal.expires_at_s)
        parts = self.parts
        ready = messages.ready(
            user_id=principal.user_id, heartbeat_s=parts.heartbeat_s, position=parts.subscriptions.tail.position()
        )
        client.put(Frame.of(ready))

    async def _answer(self, client: Client, text: str) -> None:
        batch_id: str | None = None
        try:
            message = messages.understand(text)
            batch_id = getattr(message, "batch_id", None)
            match message:
                case messages.Auth():
                    await self._renew(client, message)
                case messages.Subscribe():
                    await self.parts.subscriptions.begin(client, message)
                case messages.Unsubscribe():
                    self.parts.subscriptions.end(client, message)
                case messages.Ping():
                    client.put(Frame.of(messages.pong()))
                case _:
                    assert_never(message)
        except RequestError as error:
            client.put(Frame.of(messages.error(error, batch_id=batch_id)))
        except DatabaseUnavailable as error:
            refusal = RequestError(Code.DATABASE_UNAVAILABLE, f"The batch cannot be looked up now: {error.told}")
            client.put(Frame.of(messages.error(refusal, batch_id=batch_id)))

    async def _renew(self, client: Client, message: messages.Auth) -> None:
        """A client that is known may bring a newer token of the same user."""
        principal = await self.parts.authenticate(message.token)
        if principal.user_id != client.user_id:
            raise RequestError(Code.UNAUTHORIZED, "This connection belongs to another user: open one of your own")
        self._greet(client, principal)


def _token_of(text: str) -> str:
    """The token of a first message; raises RequestError where it is anything else."""
    message = messages.understand(text)
    if not isinstance(message, messages.Auth):
        raise RequestError(Code.UNAUTHORIZED, 'The first message must be {"type":"auth","token":…}')
    return message.token


RESTARTING = Close(CloseCode.RESTARTING, "restarting: come back with `since`")
