"""The services as simulated processes: each the real code from its ports inwards, started again whenever it ends.

An api answers requests with the real routes, a processor is `_work_lanes` whole, a watcher is what the notifier does
for one client: a tail, a snapshot of each batch and every effective fact after it. What they do is recorded.
"""

import asyncio
import contextlib
import contextvars
import functools
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, quote

from fastapi import Request
from starlette.responses import Response

from schemas.batch import Changed
from schemas.events import LaneClaimed, Limits, UploadStarted
from schemas.ids import partition_of
from schemas.views import BatchCounts
from services.api import filing, routes
from services.api.answers import POSITION_HEADER, install_problems
from services.api.asking import Caller
from services.api.reading import Reading
from services.api.writing import Writing
from services.database import DatabaseUnavailable
from services.eventlog import LogError
from services.lifecycle import StartError
from services.processor import main as processor_main
from services.processor.projection import LaneLostError
from services.settings import Settings
from services.tail import Folded, Tail
from tests.faults.simulation.generations import SimulatedDatabase
from tests.faults.simulation.loop import NODE, Node
from tests.faults.simulation.ports import (
    SimulatedBlobs,
    SimulatedLog,
    SimulatedWorker,
)
from tests.faults.simulation.reference import fold
from tests.faults.simulation.world import World

RESTART_S = 1.0
START_S = 0.05


class Process:
    """A service that is started again a while after it ended. `stop` is its SIGTERM; `partition`: whose lane it works,
    if it does."""

    def __init__(
        self, world: World, name: str, main: "Callable[[Process], Awaitable[None]]", *, partition: int = 0
    ) -> None:
        self.world = world
        self.name = name
        self.partition = partition
        self.handle: Callable[[Sent], Awaitable[Answer]] | None = None
        self.pending: dict[asyncio.Future[Answer], None] = {}
        self.stop = asyncio.Event()
        self.starts = 0
        self.wanted = True
        self.node = Node(name)
        self._main = main

    def start(self) -> None:
        if not self.wanted:
            return
        self.starts += 1
        self.stop = asyncio.Event()
        self.node = Node(f"{self.name}.{self.starts}")
        self.world.on_death[self.node] = self._died
        self.world.loop.spawn(self.node, self._live(), name=self.name)

    async def _live(self) -> None:
        try:
            await asyncio.sleep(START_S)
            await self._main(self)
            why = "stopped"
        except StartError as error:
            why = str(error)
            if isinstance(error, LaneLostError):
                self._check_superseded(why)
        except (LogError, DatabaseUnavailable) as error:
            why = repr(error)
        except Exception as error:  # noqa: BLE001  # nothing expected it: that is a finding
            why = repr(error)
            self.world.violations.append(f"{self.name} ended with {error!r}")
        self.world.tell("exit", why)
        self.world.loop.kill(self.node)
        self.world.on_death.pop(self.node, lambda: None)()

    def _check_superseded(self, why: str) -> None:
        """Only a newer claim may put a processor out of a lane that it works and holds the lock of."""
        folding = fold(self.world.brokers[self.partition].records)
        newest = [event.worker_id for event, _ in folding.of(LaneClaimed)][-1:]
        epoch = folding.lane(self.partition).epoch
        worked = [event for event, _ in folding.of(UploadStarted) if event.epoch == epoch]
        holder, _ = self.world.locks.get(self.partition, (None, 0.0))
        if newest == [self.node.name] and worked and holder is self.node:
            self.world.violations.append(f"{self.node.name} was put out of its lane by nobody's claim: {why}")

    def _died(self) -> None:
        self.handle = None
        for answer in self.pending:
            if not answer.done():
                answer.set_exception(ConnectionLost(f"{self.name} is gone"))
        self.pending.clear()
        self.world.loop.call_later(RESTART_S, self.start, context=contextvars.Context())


class ConnectionLost(Exception):  # noqa: N818  # a state, not a mistake
    """No answer came: what was asked for may have been done."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as a client makes it."""

    method: str
    path: str
    user_id: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    query: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Any
    position: str | None

    @property
    def code(self) -> str | None:
        """Of a problem."""
        return self.body["code"] if self.status >= 400 else None


# The api


async def api(me: Process) -> None:
    """One replica: the tail, and the real routes below HTTP."""
    world = me.world
    settings = _settings(partitions=len(world.brokers))
    async with AsyncExitStack() as stack:
        database, log = SimulatedDatabase(world), SimulatedLog(world)
        tail = await stack.enter_async_context(_tail(world, database, log, batches_max=2))
        await tail.caught_up()
        writer = log.writer()
        resources: Any = SimpleNamespace(
            settings=settings,
            limits=LIMITS,
            authenticator=_AnyUser(),
            rates=SimpleNamespace(take=lambda *_, **__: None),
            tail=tail,
            database=database,
            blobs=SimulatedBlobs(world),
            writing=Writing(tail=tail, writer=writer, settings=settings),
            reading=Reading(
                tail=tail,
                history=None,  # type: ignore[arg-type]  # nobody asks for the past
                database=database,  # type: ignore[arg-type]
                identity=world.identity,
                settings=settings,
            ),
        )
        app = SimpleNamespace(state=SimpleNamespace(resources=resources))
        me.handle = lambda sent: _handle(sent, app, world)
        await tail.failure()


LIMITS = Limits(files_max=4, batch_bytes_max=1_000_000, file_bytes_max=100_000)


@functools.cache
def _settings(*, partitions: int, partition: int = 0) -> Settings:
    """The defaults, whatever this machine's environment says."""
    return Settings.model_construct(partitions=partitions, partition=partition)


class _AnyUser:
    async def authenticate(self, token: str | None, **_: object) -> Any:
        return SimpleNamespace(user_id=token)


def _tail(world: World, database: Any, log: Any, *, batches_max: int) -> Any:
    partitions = len(world.brokers)
    return Tail.open(log=log, database=database, log_id=world.log_id, partitions=partitions, batches_max=batches_max)


class _Problems(dict[type[Exception], Any]):
    def add_exception_handler(self, kind: type[Exception], handler: Any) -> None:
        self[kind] = handler


_PROBLEMS = _Problems()
install_problems(_PROBLEMS)  # type: ignore[arg-type]


async def _handle(sent: Sent, app: Any, world: World) -> Answer:
    request = _request(sent, app)
    try:
        response = await _route(sent, request, app.state.resources)
    except Exception as error:  # noqa: BLE001  # looked at below
        handler = next((_PROBLEMS[kind] for kind in type(error).__mro__ if kind in _PROBLEMS), None)
        if handler is None:
            world.violations.append(f"{sent.method} {sent.path} ended with {error!r}")
            return Answer(500, {"code": "internal_error"}, None)
        response = await handler(request, error)
    body = json.loads(response.body) if response.body else None
    return Answer(response.status_code, body, response.headers.get(POSITION_HEADER))


def _request(sent: Sent, app: Any) -> Request:
    parts = [*filter(None, sent.path.split("/"))]
    names = {"batches": "batch_id", "uploads": "upload_id" if parts[1] == "uploads" else "filename"}
    scope = {
        "type": "http",
        "method": sent.method,
        "path": sent.path,
        "raw_path": quote(sent.path).encode(),
        "query_string": sent.query.encode(),
        "headers": [
            (name.lower().encode(), value.encode())
            for name, value in (*sent.headers, ("authorization", f"Bearer {sent.user_id}"))
        ],
        "server": ("api", 80),
        "scheme": "http",
        "app": app,
        "path_params": {names[kind]: value for kind, value in zip(parts[1::2], parts[2::2], strict=False)},
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent.body, "more_body": False}

    return Request(scope, receive)


_Route = Callable[..., Awaitable[Response]]
_ROUTES: dict[str, _Route] = {
    "POST batches": lambda request, *_: filing.post_batch(request),
    "POST batches/*/uploads": lambda request, *_: filing.post_uploads(request),
    "PUT batches/*/uploads/*": lambda request, *_: filing.put_upload(request),
    "POST batches/*/seal": lambda _, by, resources, batch_id: routes.seal_batch(by, resources, batch_id),
    "POST batches/*/cancel": lambda _, by, resources, batch_id: routes.cancel_batch(by, resources, batch_id),
    "POST batches/*/retry": routes.retry_batch,
    "POST uploads/*/retry": routes.retry_upload,
    "DELETE batches/*": lambda _, by, resources, batch_id: routes.delete_batch(by, resources, batch_id),
    "GET batches/*": routes.get_batch,
    "GET batches/*/uploads": functools.partial(routes.list_uploads, limit=routes.LIMIT_MAX),
    "GET uploads/*": routes.get_upload,
}
"""What the app's router finds, by method and path."""


async def _route(sent: Sent, request: Request, resources: Any) -> Response:
    _, *parts = filter(None, sent.path.split("/"))
    shape = "/".join("*" if number % 2 else part for number, part in enumerate(parts))
    query: Mapping[str, Any] = dict(parse_qsl(sent.query))
    return await _ROUTES[f"{sent.method} {shape}"](request, Caller(sent.user_id, None), resources, *parts[1:2], **query)


async def ask(process: Process, sent: Sent) -> Answer:
    """Send a request to a replica and wait for its answer; raises ConnectionLost."""
    world = process.world
    await asyncio.sleep(world.delays.uniform(0.0002, 0.003))
    if process.handle is None:
        raise ConnectionLost(f"{process.name} is not up")
    answer: asyncio.Future[Answer] = world.loop.create_future()
    process.pending[answer] = None

    async def serve(handle: Callable[[Sent], Awaitable[Answer]]) -> None:
        try:
            async with world.calling("answer", ConnectionLost):
                given = await handle(sent)
        except ConnectionLost as error:
            if not answer.done():
                answer.set_exception(error)
            return
        if not answer.done():
            answer.set_result(given)

    world.loop.spawn(process.node, serve(process.handle), name=f"{sent.method} {sent.path}")
    try:
        async with asyncio.timeout(30):
            return await answer
    except TimeoutError:
        raise ConnectionLost("no answer in 30 s") from None
    finally:
        process.pending.pop(answer, None)


# The processor


async def processor(me: Process) -> None:
    """A processor, whole but for its health endpoint; see `ground` for what stands in the place of what."""
    world = me.world
    stores: Any = SimpleNamespace(
        log=SimulatedLog(world), log_id=world.log_id, identity=world.identity, database=SimulatedDatabase(world)
    )
    scratch = world.folder / f"scratch-{me.name}-{me.starts}"
    scratch.mkdir()
    shop = processor_main.Workshop(
        settings=_settings(partitions=len(world.brokers), partition=me.partition),
        stores=stores,
        blobs=SimulatedBlobs(world),
        worker=SimulatedWorker(world),  # type: ignore[arg-type]
        scratch=scratch,
    )
    await processor_main._work_lanes(shop, processor_main.Health(), me.stop)


# Who watches


@dataclass(slots=True)
class Stream:
    """What one client was told of a batch by one connection: a snapshot at an offset, then facts."""

    batch_id: str
    offset: int
    snapshot: dict[str, Any] | None
    facts: list[tuple[int, str, dict[str, Any] | None]] = field(default_factory=list)
    node: Node = field(default_factory=NODE.get)


def watcher(watched: list[str], streams: list[Stream]) -> "Callable[[Process], Awaitable[None]]":
    """A process that subscribes to every batch named in `watched` and records the streams."""

    async def main(me: Process) -> None:
        world = me.world
        subscribed: dict[str, Stream] = {}

        def hear(folded: Folded) -> None:
            stream = subscribed.get(folded.fact.batch_id or "")
            if stream is not None and isinstance(folded.outcome, Changed):
                stream.facts.append((folded.fact.offset, folded.fact.id, _counts(folded.batch)))

        async with AsyncExitStack() as stack:
            database, log = SimulatedDatabase(world), SimulatedLog(world)
            tail = await stack.enter_async_context(_tail(world, database, log, batches_max=3))
            stack.callback(tail.listen(hear))
            while True:
                for batch_id in [each for each in watched if each not in subscribed]:
                    with contextlib.suppress(DatabaseUnavailable):
                        held = await stack.enter_async_context(tail.hold(batch_id))
                        if held is None and not await tail.reached_end(2):
                            continue
                        known = tail.peek(batch_id)
                        if known is not None and known.batch is not None:
                            offset = tail.position().offset(partition_of(batch_id)) or 0
                            stream = Stream(batch_id, offset, _counts(known.batch))
                            subscribed[batch_id] = stream
                            streams.append(stream)
                for task in tail._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.2)

    return main


def _counts(batch: Any) -> dict[str, Any] | None:
    return None if batch is None or batch.deleted else BatchCounts.of(batch).model_dump()
