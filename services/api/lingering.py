"""Answering before a body came to its end: the sender gets the time to hear it, and no more is taken than that.

A connection that is closed at once while bytes still come in is reset, and the answer with it. So whoever sends on is
listened to for a moment after the answer (RFC 9112, section 9.6); a long rest of a body, or one of unknown length, ends
the connection then.
"""

import asyncio
import contextlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REST_BYTES_MAX = 1024 * 1024
"""A body that says it is no longer than this is read to its end, and the connection lives on."""
LINGER_BYTES_MAX = 16 * 1024 * 1024
LINGER_S = 2.0


class Lingering:
    """ASGI around the app; see the module's text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _may_be_long(Headers(scope=scope)):
            one = _Exchange(receive, send)
            await self._app(scope, one.receive, one.send)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request with a long body, and its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = self._ended or message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._ended:
            await self._send(message)
        elif message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
            await self._send(message)
        elif message.get("more_body", False):
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self._linger()
            await self._send({"type": "http.response.body", "body": b""})

    async def _linger(self) -> None:
        left_bytes = LINGER_BYTES_MAX
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._ended and left_bytes > 0:
                    left_bytes -= len((await self.receive()).get("body", b""))


def _may_be_long(headers: Headers) -> bool:
    if "transfer-encoding" in headers:
        return True
    length = headers.get("content-length", "0")
    return not length.isdigit() or int(length) > REST_BYTES_MAX
