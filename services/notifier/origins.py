"""Which web pages may connect: those of the same host (the api's and the dashboard's), and those that
`SLUICE_ALLOWED_ORIGINS` names.

Browsers say whose page it is in the header `Origin`; programs send none and are not asked. A WebSocket of another page
is refused at the handshake (RFC 6455, section 10.2); an HTTP answer for one carries no CORS headers, and its preflight
is refused, so that the browser never sends the token.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PREFLIGHT_AGE_S = 600


def is_allowed(origin: str, *, host: str, origins: Sequence[str]) -> bool:
    """Whether pages of this origin may connect. `host`: the request's Host; `origins`: those that are named, or *."""
    return "*" in origins or origin in origins or _host_of(origin) == _host_of(f"http://{host}") != ""


def _host_of(address: str) -> str:
    """The host's name, without the port; all names of this machine to itself are one."""
    try:
        parts = urlsplit(address)
        name = parts.hostname or ""
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https"):
        return ""
    return "localhost" if name in _LOOPBACK else name


class Origins:
    """The ASGI app inside, for pages that may connect."""

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:
            await self._app(scope, receive, send)
            return
        allowed = is_allowed(origin, host=headers.get("host", ""), origins=self._origins)
        if scope["type"] == "websocket" and not allowed:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "pages of this origin may not connect"})
        elif scope["type"] == "http" and _is_preflight(scope["method"], headers):
            await _preflight(origin, allowed=allowed)(scope, receive, send)
        elif scope["type"] == "http" and allowed:
            await self._app(scope, receive, _with_cors(send, origin))
        else:
            await self._app(scope, receive, send)


def _is_preflight(method: str, headers: Headers) -> bool:
    return method == "OPTIONS" and "access-control-request-method" in headers


def _preflight(origin: str, *, allowed: bool) -> PlainTextResponse:
    if not allowed:
        detail = f"Pages of {origin:.200} may not connect: name the origin in SLUICE_ALLOWED_ORIGINS"
        return PlainTextResponse(detail, status_code=403, headers={"Vary": "Origin"})
    granted = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET",
        "Access-Control-Allow-Headers": "Authorization, Last-Event-ID, Cache-Control",
        "Access-Control-Max-Age": str(_PREFLIGHT_AGE_S),
        "Vary": "Origin",
    }
    return PlainTextResponse("", headers=granted)


def _with_cors(send: Send, origin: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        await send(message)

    return sending
