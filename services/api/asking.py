"""Who asks and how: the caller of a request, its Idempotency-Key, and its body as it streams in. HTTP only."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from schemas.errors import Code, RequestError
from schemas.ids import derived_id
from schemas.requests import key_hash
from schemas.text import storable_text
from services.auth import Scope, bearer
from services.observability import BYTES_RECEIVED

if TYPE_CHECKING:
    from services.api.resources import Resources

JSON_BYTES_MAX = 64 * 1024
BODY_SILENCE_MAX_S = 60.0
_READING = frozenset({"GET", "HEAD"})
_KEY_CHARACTERS_MAX = 255
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Caller:
    """The user who asks, and the trace the request is part of (W3C Trace Context)."""

    user_id: str
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class RequestKey:
    """An Idempotency-Key in its scope: user, method and path. The same one gives the same ids."""

    user_id: str
    method: str
    path: str
    key: str

    @property
    def hash(self) -> str:
        return key_hash(self.user_id, self.method, self.path, self.key)

    def id(self, *place: int, partition: int) -> str:
        """The id of what this request makes; `place` is the place of a file in the request."""
        return derived_id(self.user_id, self.method, self.path, self.key, *place, partition=partition)


async def caller_of(request: Request) -> Caller:
    """The user of the request's token, who may do this and does not do too much of it.

    Raises RequestError: UNAUTHORIZED, FORBIDDEN_SCOPE, RATE_LIMITED, KEYS_UNAVAILABLE. To be asked before anything of
    the body is read.
    """
    resources: Resources = request.app.state.resources
    token = bearer(request.headers.get("authorization"))
    scope: Scope = "read" if request.method in _READING else "write"
    principal = await resources.authenticator.authenticate(token, scope=scope)
    allowance = request.state.allowance = resources.rates.take(principal.user_id, now_s=time.monotonic())
    if allowance is not None:
        allowance.check()
    trace = request.headers.get("traceparent", "")
    return Caller(principal.user_id, trace if _TRACEPARENT.fullmatch(trace) else None)


def key_of(request: Request, caller: Caller) -> RequestKey | None:
    """The request's Idempotency-Key, if it has one; raises RequestError(INVALID_REQUEST)."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    try:
        storable_text(key)
    except ValueError:
        key = ""
    if not 0 < len(key) <= _KEY_CHARACTERS_MAX:
        raise RequestError(Code.INVALID_REQUEST, f"Idempotency-Key must have 1 to {_KEY_CHARACTERS_MAX} characters")
    return RequestKey(caller.user_id, request.method, request.url.path, key)


async def small_body(request: Request) -> bytes:
    """The whole body of a request that carries no file; raises RequestError(INVALID_REQUEST) over 64 KiB."""
    body = b""
    async for chunk in body_of(request):
        body += chunk
        if len(body) > JSON_BYTES_MAX:
            raise RequestError(Code.INVALID_REQUEST, f"the body is larger than {JSON_BYTES_MAX} bytes")
    return body


async def body_of(request: Request) -> AsyncGenerator[bytes, None]:
    """The body's bytes as they come; raises ClientDisconnect, or RequestError when the sender falls silent."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(BODY_SILENCE_MAX_S):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RequestError(
                Code.INVALID_REQUEST, f"no byte of the body came for {BODY_SILENCE_MAX_S:.0f} s; send it again"
            ) from None
        if chunk:
            BYTES_RECEIVED.inc(len(chunk))
            yield chunk


def content_length(request: Request) -> int | None:
    """How long the body says it is; None where it does not."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def canonical_json(body: object) -> bytes:
    """One way of writing a JSON value, so that the same value has the same fingerprint."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
