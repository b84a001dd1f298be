"""Following a batch over a connection that breaks: nothing is missed, and what cannot be mended is said at once."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from services.cli.errors import Refused, Unreachable
from services.cli.watching import Watch, web_socket_url
from tests.examples import BATCH

Script = Callable[[ServerConnection, dict[str, Any]], Awaitable[None]]


class Notifier:
    """A notifier that follows a script: one entry a connection, told what the client subscribed with."""

    def __init__(self, *scripts: Script) -> None:
        self.subscriptions: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self._scripts = list(scripts)
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Notifier"]:
        async with serve(self._serve, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def _serve(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        self.tokens.append(socket.request.headers.get("Authorization"))
        script = self._scripts.pop(0)
        wanted = json.loads(await socket.recv())
        self.subscriptions.append(wanted)
        await script(socket, wanted)


def said(*messages: dict[str, Any]) -> str:
    return "\n".join(json.dumps(message, ensure_ascii=False) for message in messages)


def an_event(offset: int, **members: Any) -> dict[str, Any]:
    return {"type": "event", "position": f"1f3a9c02.0-{offset}", **members}


READY = {"type": "ready", "user_id": "me", "heartbeat_s": 20, "position": "1f3a9c02.0-0"}


async def take(watch: Watch, count: int) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    async with asyncio.timeout(30), contextlib.aclosing(watch.messages()) as messages:
        async for message in messages:
            taken.append(message)
            if len(taken) == count:
                break
    return taken


async def test_a_lost_connection_goes_on_after_the_last_position() -> None:
    async def first(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(said(READY))
        await socket.send(said(an_event(7), an_event(8, filename="line\u2028separator.jpg")))
        await socket.close(1012, "restarting")

    async def second(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(said(READY, an_event(9)))
        await socket.wait_closed()

    async with Notifier(first, second).running() as notifier:
        messages = await take(Watch(notifier.url, "secret", BATCH), 4)

    assert [message["type"] for message in messages] == ["event", "event", "lost", "event"]
    assert "1012 restarting" in messages[2]["reason"]
    assert [wanted.get("since") for wanted in notifier.subscriptions] == [None, "1f3a9c02.0-8"]
    assert notifier.tokens == ["Bearer secret", "Bearer secret"]


async def test_a_position_the_notifier_does_not_take_is_given_up_for_a_snapshot() -> None:
    async def first(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(said(READY, an_event(7)))
        await socket.close(1012)

    async def second(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(said(READY, {"type": "error", "code": "position_of_another_log", "detail": "another log"}))
        await socket.wait_closed()

    async def third(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(
            said(READY, {"type": "subscribed", "position": "2f3a9c02.0-1", "batch_id": BATCH, "batch": {}})
        )
        await socket.wait_closed()

    async with Notifier(first, second, third).running() as notifier:
        messages = await take(Watch(notifier.url, "secret", BATCH), 4)

    assert [message["type"] for message in messages] == ["event", "lost", "lost", "subscribed"]
    assert [wanted.get("since") for wanted in notifier.subscriptions] == [None, "1f3a9c02.0-7", None]


async def test_an_unknown_batch_is_said_at_once() -> None:
    async def script(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(said(READY, {"type": "error", "code": "not_found", "detail": "no such batch"}))
        await socket.wait_closed()

    async with Notifier(script).running() as notifier:
        with pytest.raises(Refused, match=BATCH):
            await take(Watch(notifier.url, "secret", BATCH), 1)


async def test_a_token_that_is_not_accepted_is_said_at_once() -> None:
    async def script(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.close(4001, "no")

    async with Notifier(script).running() as notifier:
        with pytest.raises(Refused, match="does not accept the token"):
            await take(Watch(notifier.url, "secret", BATCH), 1)


async def test_where_nobody_ever_answered_there_is_no_waiting() -> None:
    async with Notifier().running() as notifier:
        nobody = notifier.url

    with pytest.raises(Unreachable, match="No answer from the notifier"):
        await take(Watch(nobody, "secret", BATCH), 1)


async def test_a_notifier_that_stays_away_is_given_up() -> None:
    async def script(socket: ServerConnection, _wanted: dict[str, Any]) -> None:
        await socket.send(said(READY, an_event(7)))

    async with Notifier(script).running() as notifier:
        watch = Watch(notifier.url, "secret", BATCH, give_up_after_s=0)
        with pytest.raises(Unreachable):
            await take(watch, 4)


@pytest.mark.parametrize(
    ("notifier_url", "expected"),
    [
        ("http://127.0.0.1:8081", "ws://127.0.0.1:8081/v1/ws"),
        ("https://example.org/sluice/", "wss://example.org/sluice/v1/ws"),
    ],
)
def test_the_web_socket_stands_below_the_notifiers_address(notifier_url: str, expected: str) -> None:
    assert expected == web_socket_url(notifier_url)
