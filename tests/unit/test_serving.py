"""HTTP as every service offers it: what a stranger may make it hold, and what is answered where there is nothing.

Over real sockets on this machine, since what is tested is what the parser tells and what it keeps to itself.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services import serving as served
from services.serving import HEAD_BYTES_MAX, LOST, HttpConnection, health_routes, serving

NEARLY = HEAD_BYTES_MAX - 2_000
ANSWER_TIMEOUT_S = 30


async def echo(request: Request) -> Response:
    """How many bytes came."""
    return JSONResponse({"bytes": len(await request.body()), "query": len(request.url.query)})


@pytest.fixture
def overdue(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a connection found that a head is overdue, which is soon."""
    found = asyncio.Event()
    given = HttpConnection._head_overdue

    def heard(connection: HttpConnection) -> None:
        given(connection)
        found.set()

    monkeypatch.setattr(served, "HEAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(HttpConnection, "_head_overdue", heard)
    return found


@pytest.fixture
async def port() -> AsyncIterator[int]:
    routes = [*health_routes(list), Route("/echo", echo, methods=["POST", "GET"])]
    app = Starlette(routes=routes, exception_handlers=LOST)
    async with serving(app, host="127.0.0.1", port=0, stop_timeout_s=1) as port:
        yield port


@dataclass
class Wire:
    """A connection, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: its status, its headers, its body."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            return int(first.split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def rest(self) -> bytes:
        """What still comes until the connection is closed."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def wired(port: int) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /livez HTTP/1.1\r\nX-A: " + b"a" * HEAD_BYTES_MAX, id="one header without end"),
        pytest.param(b"GET /livez HTTP/1.1\r\n" + b"X-A: a\r\n" * 20_000, id="headers without number"),
        pytest.param(b"GET /" + b"a" * HEAD_BYTES_MAX, id="an address without end"),
        pytest.param(
            b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n", id="all of it at once"
        ),
        pytest.param(
            b"GET /livez HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-A: " + b"a" * HEAD_BYTES_MAX,
            id="a handshake",
        ),
    ],
)
async def test_a_head_that_is_too_large_is_refused_before_it_has_come(port: int, head: bytes) -> None:
    async with wired(port) as wire:
        await wire.send(head)

        status, headers, body = await wire.answer()
        rest = await wire.rest()

    assert (status, headers["content-type"], rest) == (431, "application/problem+json", b"")
    assert json.loads(body)["code"] == "headers_too_large"


async def test_a_head_that_is_nearly_too_large_is_taken_again_and_again(port: int) -> None:
    request = b"POST /echo HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * NEARLY + b"\r\nContent-Length: 100000\r\n\r\n"

    async with wired(port) as wire:
        answers = []
        for _ in range(3):
            await wire.send(request[:20_000], request[20_000:], b"b" * 100_000)
            answers.append(await wire.answer())
        # Sent without waiting for the answers, as a client may, too.
        await wire.send((request + b"b" * 100_000) * 2)
        answers += [await wire.answer(), await wire.answer()]

    assert [status for status, _, _ in answers] == [200] * 5
    assert all(json.loads(body)["bytes"] == 100_000 for _, _, body in answers)


async def test_trailers_count_as_headers(port: int) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    async with wired(port) as wire:
        await wire.send(head, b"3\r\nabc\r\n0\r\nX-A: b\r\n\r\n")
        taken = await wire.answer()
        with contextlib.suppress(ConnectionError):
            await wire.send(head, b"3\r\nabc\r\n0\r\nX-A: ", *[b"a" * 10_000] * 50)
        with contextlib.suppress(ConnectionError):
            assert await wire.rest() == b""

    assert (taken[0], json.loads(taken[2])["bytes"]) == (200, 3)


async def test_a_head_that_does_not_come_to_its_end_is_waited_for_only_so_long(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wired(port) as second:
        await second.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answered = await second.answer()
        monkeypatch.setattr(served, "HEAD_TIMEOUT_S", 0.1)
        await second.send(b"GET /livez HTTP/1.1\r\nHost: x")
        async with wired(port) as silent, wired(port) as half, wired(port) as blank:
            rests = [
                await rest_after(wire, sent)
                for wire, sent in ((silent, b""), (half, b"GET /livez HTTP/1.1\r\nX-A: a"), (blank, b"\r\n\r\n"))
            ]
            rests.append(await second.rest())

    assert answered[0] == 200
    assert rests == [b""] * 4


async def rest_after(wire: Wire, sent: bytes) -> bytes:
    """What still comes after this; the connection may have been closed before it is sent."""
    with contextlib.suppress(ConnectionError):
        await wire.send(sent)
        return await wire.rest()
    return b""


async def test_an_answer_that_takes_longer_than_a_head_may_comes_all_the_same(overdue: asyncio.Event) -> None:
    async def when_overdue(_request: Request) -> Response:
        await overdue.wait()
        return Response("slow")

    app = Starlette(routes=[Route("/", when_overdue)])
    found = None
    async with serving(app, host="127.0.0.1", port=0, stop_timeout_s=1) as port, asyncio.timeout(ANSWER_TIMEOUT_S):
        while found is None:  # where the machine stands still before it is sent, the first head is overdue already
            overdue.clear()
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                async with wired(port) as wire:
                    await wire.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x")
                    status, _, body = await wire.answer()
                    found = (status, body, await wire.rest())

    assert found == (200, b"slow", b"")


async def test_where_there_is_nothing_the_answer_is_a_problem_that_says_what_there_is(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, trust_env=False) as http:
        lost = await http.get("/nowhere")
        other = await http.post("/livez")

    found: list[Any] = [(each.status_code, each.headers["content-type"], each.json()["code"]) for each in (lost, other)]
    assert found == [
        (404, "application/problem+json", "not_found"),
        (405, "application/problem+json", "method_not_allowed"),
    ]
    assert "/readyz" in lost.json()["detail"]
    assert "GET" in other.headers["Allow"]
