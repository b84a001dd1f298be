"""HTTP as each service offers it: uvicorn as a library, problems (RFC 9457), and the routes for health and metrics.

Signals are the service's own business (`lifecycle.stop_signals`); a taken port ends the start with a sentence. What a
stranger may make us hold before anybody asked for a token is bounded, in bytes and in seconds (`HttpConnection`).
"""

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from schemas.errors import MEANINGS, Code, RequestError, problem
from services.lifecycle import StartError, first_of, stopwatch
from services.observability import TASKS
from services.settings import host_in_url

_BACKLOG = 2_048
_PORTS_FAULT = (errno.EADDRINUSE, errno.EACCES)
HEAD_BYTES_MAX = 64 * 1024
HEAD_TIMEOUT_S = 30.0
LINGER_S = 1.0
_PROBLEM_TYPE = "application/problem+json"


class _HeadTooLargeError(Exception):
    """Ends the parsing of a request whose head is larger than it may be."""


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection, with bounds for what comes before a request is known: `HEAD_BYTES_MAX` for the request
    line and the headers (and the trailers), else 431, and `HEAD_TIMEOUT_S` for them to be complete, else it is closed.

    Two counts, since the parser tells a header only once it has all of it: what it told of this message, and what came
    since it last had a whole head or a piece of a body, which it may hold. An idle connection has uvicorn's timeout.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told_bytes = 0
        self._held_bytes = 0
        self._in_head = True
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._expect_head()
        self._held_bytes += len(data)
        super().data_received(data)
        if self._held_bytes > HEAD_BYTES_MAX and not self._refused:
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._told_bytes = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._told(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._told(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._held_bytes = False, 0
        self._forget_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._held_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called for everything that the parser does not take, our own refusals among it."""
        if self._told_bytes > HEAD_BYTES_MAX:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _told(self, *parts: bytes) -> None:
        self._told_bytes += sum(map(len, parts))
        if self._told_bytes > HEAD_BYTES_MAX:
            raise _HeadTooLargeError

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_overdue)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        self._head_timer = None
        if self._answering():
            self._expect_head()  # it may be we who read no further: requests wait behind the one under way
        else:
            # Without a word: a browser that connected ahead of need would take an answer for that of its next request.
            self.transport.close()

    def _refuse(self) -> None:
        """Answer 431 and close, once the sender saw it; where another answer is under way, only cut the connection."""
        self._refused = True
        self._forget_head()
        if self._answering():
            self.transport.abort()
            return
        detail = f"the request line and the headers have more than {HEAD_BYTES_MAX} bytes; send fewer"
        error = RequestError(Code.HEADERS_TOO_LARGE, detail)
        body = json.dumps(problem(error)).encode()
        head = f"content-type: {_PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[MEANINGS[error.code].status] + head.encode() + body)
        # Closing while bytes come in would reset the connection, and the answer might be lost: pass them over a while.
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _answering(self) -> bool:
        # uvicorn declares the cycle as never absent, yet begins with None.
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: Any, *, host: str, port: int, stop_timeout_s: float, **options: Any) -> AsyncIterator[int]:
    """Serve the ASGI app until the block is left, then let requests under way end; yields the port.

    `options` are uvicorn's. Raises StartError where the port is taken.
    """
    listening = _listen(host, port)
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(stop_timeout_s)),
            **{"http": HttpConnection, **options},
        )
    )
    async with stopwatch(f"listening on {host}:{listening.getsockname()[1]}"):
        task = asyncio.create_task(server.serve(sockets=[listening]), name="serving")
        await first_of(task, asyncio.create_task(server.listening.wait()))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listening.close()


def problem_answer(error: RequestError, *, headers: Mapping[str, str] | None = None) -> Response:
    """An error as problem details (RFC 9457), with the headers that belong to its code."""
    meaning = MEANINGS[error.code]
    own = {} if meaning.retry_after_s is None else {"Retry-After": str(meaning.retry_after_s)}
    if error.code is Code.UNAUTHORIZED:
        own["WWW-Authenticate"] = "Bearer"
    return JSONResponse(
        problem(error), status_code=meaning.status, headers={**own, **(headers or {})}, media_type=_PROBLEM_TYPE
    )


async def _lost(request: Request, error: Exception) -> Response:
    """The answer to a request that meets no route, or one of another method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path:.200}"
    if error.status_code == 405:  # noqa: PLR2004  # the status itself
        refusal = RequestError(Code.METHOD_NOT_ALLOWED, f"{where} is not offered; `Allow` says what is")
        return problem_answer(refusal, headers=error.headers)
    there = ", ".join(route.path for route in request.app.routes)
    return problem_answer(RequestError(Code.NOT_FOUND, f"{where} leads nowhere; there are {there}"))


LOST: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {404: _lost, 405: _lost}
"""What a Starlette app of a few routes answers with where it has none."""


def health_routes(
    problems: Callable[[], list[str]], degraded: Callable[[], Sequence[str]] | None = None
) -> list[Route]:
    """`/livez` (the process runs), `/readyz` (503 with what `problems` says; what it goes on without is `degraded`, and
    it is ready all the same) and `/metrics`."""

    async def live(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> Response:
        found = problems()
        without = {} if degraded is None else {"degraded": list(degraded())}
        return JSONResponse(
            {"status": "failing" if found else "ok", "problems": found, **without}, status_code=503 if found else 200
        )

    async def metrics(_request: Request) -> Response:
        TASKS.set(len(asyncio.all_tasks()))
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/livez", live), Route("/readyz", ready), Route("/metrics", metrics)]


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet; raises OSError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, so that asyncio sets TCP_NODELAY: else a kept-alive answer waits 40 ms for a delayed ACK.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except BaseException:
        listening.close()
        raise
    return listening


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = bound(host, port)
    except OSError as error:
        mend = "choose another port" if error.errno in _PORTS_FAULT else "choose another SLUICE_HOST"
        raise StartError(f"cannot listen on {host_in_url(host)}:{port}: {error.strerror}; {mend}") from error
    listening.listen(_BACKLOG)
    listening.settimeout(0)
    return listening
