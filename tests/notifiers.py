"""A notifier under test and its clients: real WebSockets, on real Kafka and Postgres.

Nobody projects the log here unless a test says so: the facts are appended as api and processor would, and the
notifier's tail keeps them all. `Scene` is one notifier and the log it reads; `Watcher` one client of it.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from schemas.events import Envelope, LogEvent, UploadProgressed, encode
from schemas.ids import new_id
from schemas.position import Position
from schemas.records import StoredRecord
from services import tail, tailing
from services.auth import make_token
from services.database import Database, DatabaseUnavailable
from services.eventlog import EventLog, Log, LogSettings, LogUnavailable, LogWriter
from services.lifecycle import cancelled
from services.notifier import followings, sessions, subscriptions, watches
from services.processor.projection import Projection
from services.processor.rows import Rows
from services.settings import Settings
from tests.examples import BATCH, USER, a_lane_claimed

SECRET = "a secret of tests, at least thirty-two bytes long"
SOON_S = 45.0
"""What comes at all comes soon; but a busy machine may stand still for some seconds on the way."""


class Watcher:
    """A client: what it was told, message by message."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self._unread: list[dict[str, Any]] = []
        self.frames: list[str] = []

    async def say(self, *messages: dict[str, Any]) -> None:
        await self.socket.send("\n".join(json.dumps(message) for message in messages))

    async def hear(self, *, within_s: float | None = SOON_S) -> dict[str, Any]:
        """The next message."""
        async with asyncio.timeout(within_s):
            while not self._unread:
                frame = await self.socket.recv()
                assert isinstance(frame, str)
                self.frames.append(frame)
                self._unread = [json.loads(line) for line in frame.split("\n")]
        return self._unread.pop(0)

    async def hear_until(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """All messages up to the first one that is wanted."""
        heard = [await self.hear()]
        while not wanted(heard[-1]):
            heard.append(await self.hear())
        return heard

    async def hear_to(self, position: Position) -> list[dict[str, Any]]:
        """All messages up to the fact at this position."""
        return await self.hear_until(lambda message: message.get("position") == str(position))

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        await self.say(message)
        return await self.hear()

    async def subscribe(self, batch_id: str = BATCH, **more: Any) -> dict[str, Any]:
        return await self.ask({"type": "subscribe", "batch_id": batch_id, **more})

    async def subscribe_user(self, **more: Any) -> dict[str, Any]:
        return await self.ask({"type": "subscribe", "user": True, **more})

    async def until_read(self, position: Position, *, user: str = USER) -> None:
        """Wait until the notifier has read the log so far: it says where it is whenever it is shown a token."""
        async with asyncio.timeout(SOON_S):
            while True:
                ready = await self.ask({"type": "auth", "token": a_token(user)})
                assert ready["type"] == "ready"
                if Position.parse(ready["position"]).includes(position):
                    return

    async def silence(self) -> None:
        """Nothing waits for us: the answer to a ping comes first."""
        assert await self.ask({"type": "ping"}) == {"type": "pong"}

    async def closed(self) -> tuple[int, str]:
        """How the connection is closed: code and reason; what comes before is kept in `frames` and not heard."""
        with contextlib.suppress(ConnectionClosed):
            async with asyncio.timeout(SOON_S):
                while True:
                    self.frames.append(str(await self.socket.recv()))
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or ""


class Scene:
    """A log with its first records, and a notifier that reads it on `port`."""

    def __init__(self, settings: Settings, log: Log, writer: LogWriter, log_id: str) -> None:
        self.settings = settings
        self.log = log
        self.log_id = log_id
        self.port = 0
        self._writer = writer

    async def append(self, *events: LogEvent, partition: int = 0) -> Position:
        """Append the events as one group; the position of the last one."""
        records = [encode(event, an_envelope()) for event in events]
        first = await self._writer.append(partition, records, timeout_s=10)
        return Position.of(self.log_id, {partition: first + len(events) - 1})

    def progress(self, event: UploadProgressed) -> None:
        self.log.publish_progress(0, encode(event, an_envelope()))

    async def progress_arrives(self, event: UploadProgressed, hear: Callable[[], Awaitable[Any]]) -> None:
        """Say it again and again until something is heard: what is said before the notifier has found the end of that
        topic is lost, as it may be. Copies of it may be heard later."""
        hearing = asyncio.ensure_future(hear())
        while not hearing.done():
            self.progress(event)
            await asyncio.wait({hearing}, timeout=0.05)
        await hearing

    @contextlib.asynccontextmanager
    async def connected(self, user: str | None = USER, **options: Any) -> AsyncIterator[Watcher]:
        """A client that is authenticated as the user, or not at all for None."""
        async with connect(f"ws://127.0.0.1:{self.port}/v1/ws", **options) as socket:
            watcher = Watcher(socket)
            if user is not None:
                ready = await watcher.ask({"type": "auth", "token": a_token(user)})
                assert ready["type"] == "ready"
            yield watcher


def an_envelope() -> Envelope:
    return Envelope(id=new_id(now_ms=0, random=os.urandom(9)), source="/sluice/tests", time="2026-01-01T12:00:00Z")


def a_token(user: str = USER, *, ttl_s: float | None = 3600, secret: str = SECRET) -> str:
    return make_token(user, secret, ttl_s=ttl_s)


def end_tokens_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have connections end a second after they were shown a token made now for an hour. A token for a second might be
    over before it is shown."""
    almost_s = int(time.time()) + 3600 + Settings().jwt_leeway_s - 1
    monkeypatch.setattr(sessions, "time", SimpleNamespace(time=lambda: almost_s))


def settings_for(*, kafka: str, database_url: str, unique: str) -> Settings:
    """Of a notifier with a log and a database of its own."""
    return Settings(
        kafka_bootstrap_servers=kafka,
        database_url=database_url,
        log_topic=f"{unique}.events",
        progress_topic=f"{unique}.progress",
        jwt_secret=SECRET,
        notifier_port=0,
        client_bytes_max=1_000_000,
        clients_per_user_max=20,
        stop_timeout_s=5,
    )


@contextlib.asynccontextmanager
async def a_quiet_scene(settings: Settings) -> AsyncIterator[Scene]:
    """A log with claimed lanes, and no notifier yet."""
    with patient():
        async with _a_log(settings) as scene:
            yield scene


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Notifiers of this process wait for a log or a database that is slow, where they would else say that they cannot
    tell, or tell in another way: the machine may stand still for as long."""
    with contextlib.ExitStack() as stack:
        for place, name in PATIENCE:
            stack.enter_context(mock.patch.object(place, name, SOON_S))
        yield


PATIENCE: tuple[tuple[ModuleType, str], ...] = (
    (tailing, "CAUGHT_UP_WAIT_S"),
    (tail, "LOAD_TIMEOUT_S"),
    (tail, "FOLLOWED_LOAD_TIMEOUT_S"),
    (watches, "END_TIMEOUT_S"),
    (subscriptions, "SINCE_TIMEOUT_S"),
    (followings, "REACHED_TIMEOUT_S"),
)


@contextlib.asynccontextmanager
async def _a_log(settings: Settings) -> AsyncIterator[Scene]:
    log_settings = LogSettings(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        topic=settings.log_topic,
        progress_topic=settings.progress_topic,
    )
    async with EventLog.open(log_settings) as log:
        await log.ensure_topics(partitions=settings.partitions)
        identity = await log.ensure_created(partitions=settings.partitions, source="/sluice/tests")
        scene = Scene(settings, log, log.writer(), identity.log_id)
        for partition in range(settings.partitions):
            claimed = await scene.append(a_lane_claimed(), partition=partition)
            assert claimed.offset(partition) == 1
        yield scene


def offset_of(message: dict[str, Any]) -> int:
    return Position.parse(message["position"]).offsets[0][1]


def types_of(heard: list[dict[str, Any]]) -> list[str]:
    return [message["event"]["type"].split(".")[1] for message in heard if message["type"] == "event"]


@contextlib.asynccontextmanager
async def following_projection(scene: Scene, *, partition: int = 0) -> AsyncIterator[None]:
    """The read models follow the log, a few records at a time."""
    database = await Database.open(scene.settings.database_url.get_secret_value())
    await database.migrate()
    projection = await Projection.open(await Rows.live(database), partition=partition, log_id=scene.log_id)
    reader = scene.log.reader([partition])
    await reader.seek(partition, projection.lane.next_offset)

    async def project() -> None:
        records: list[StoredRecord] = []
        while True:
            with contextlib.suppress(LogUnavailable, DatabaseUnavailable):  # as a processor: it comes back
                records = records or await reader.read(records_max=50, timeout_ms=50)
                await projection.fold(records)
                records = []
                await projection.flush()

    projecting = asyncio.create_task(project())
    try:
        yield
    finally:
        await until(lambda: projecting.done() or projection.committed > 1)
        assert not projecting.done()
        await cancelled(projecting)
        await reader.close()
        await database.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody tells us."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.01)
