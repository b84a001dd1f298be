"""HTTP as each service offers it: uvicorn as a library, and the routes for health and metrics.

Signals are the service's own business (`lifecycle.stop_signals`); a taken port ends the start with a sentence.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.lifecycle import StartError, first_of, stopwatch

_BACKLOG = 2_048


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
    listening = _bind(host, port)
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(stop_timeout_s)),
            **options,
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


def health_routes(problems: Callable[[], list[str]]) -> list[Route]:
    """`/livez` (the process runs), `/readyz` (503 with what `problems` says) and `/metrics`."""

    async def live(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> Response:
        found = problems()
        return JSONResponse(
            {"status": "failing" if found else "ok", "problems": found}, status_code=503 if found else 200
        )

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/livez", live), Route("/readyz", ready), Route("/metrics", metrics)]


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, so that asyncio sets TCP_NODELAY: else a kept-alive answer waits 40 ms for a delayed ACK.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    listening.listen(_BACKLOG)
    listening.settimeout(0)
    return listening
