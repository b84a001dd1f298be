"""A scene: the services as processes, clients and watchers at them, faults among them, and the reckoning.

Each scene has its own topic, database and blob folder on servers that may be the session's, and a processor for each
partition, as `sluice up` starts them. `settle` waits until all that was accepted has been worked; `reckoning` gathers
the evidence and hands it to the checker.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt

from schemas.events import Fact, LaneClaimed
from schemas.records import StoredRecord
from services.embedded.folders import free_ports
from services.eventlog import EventLog, LogSettings
from services.lifecycle import cancelled
from tests.faults.checking import Answer, Evidence, Looked, Settled, Usage, violations
from tests.faults.checking.folded import FoldedLog, fold_again
from tests.faults.checking.history import save
from tests.faults.checking.streams import at_the_end
from tests.faults.real import gathering, table
from tests.faults.real.clients import Client, Journal
from tests.faults.real.clocks import Clocks
from tests.faults.real.listeners import Listener
from tests.faults.real.services import Service
from tests.faults.real.watchers import Follower, Watcher

SECRET = "a secret for scenes of faults that is long enough"
ALL = ("api", "notifier", "processor")
USERS = ("ada", "grace", "mary")
READY_TIMEOUT_S = 60.0
WORKED_TIMEOUT_S = 90.0
EVEN_TIMEOUT_S = 40.0
SAMPLE_PAUSE_S = 0.25
ANSWERS_MAX = 100
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a connection says that was asked just while its server died
)


@dataclass(frozen=True, slots=True)
class Places:
    """Where a scene takes place. `partitions`: how many lanes there are; `services_database_url`: the same database as
    its services reach it, perhaps by way of a proxy; `clocks`: those they go by; `settings`: what is set for them
    besides."""

    kafka: str
    database_url: str
    folder: Path
    unique: str
    partitions: int = 1
    services_database_url: str | None = None
    blobs: Path | None = None
    clocks: Clocks | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Scene:
    """See the module's text. Make it with `a_scene`."""

    places: Places
    chance: random.Random
    pause_s: float
    stack: contextlib.AsyncExitStack
    log: EventLog
    services: dict[str, Service] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    followers: dict[str, list[Follower]] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    struck: list[str] = field(default_factory=list)

    # Who takes part

    async def start(self, *names: str, faults: Mapping[str, Sequence[str]] | None = None) -> None:
        """Start these services, each with the faults of its first starts, and wait until all are ready.

        A name begins with the kind of service; a processor's ends with `-lane` and its partition, if that is not 0.
        """
        for name in names:
            service = self._service(name)
            service.arm((faults or {}).get(name, ()))
            self.services[name] = await self.stack.enter_async_context(service.running())
        await self.ready(*names)

    def _service(self, name: str) -> Service:
        port = free_ports(1)[0]
        kind = name.partition("-")[0]
        places = self.places
        blobs = places.blobs or places.folder / "blobs"
        blobs.mkdir(exist_ok=True)
        environment = {
            "SLUICE_KAFKA_BOOTSTRAP_SERVERS": places.kafka,
            "SLUICE_DATABASE_URL": places.services_database_url or places.database_url,
            "SLUICE_LOG_TOPIC": f"{places.unique}.events",
            "SLUICE_PROGRESS_TOPIC": f"{places.unique}.progress",
            "SLUICE_BLOB_URL": blobs.as_uri(),
            "SLUICE_JWT_SECRET": SECRET,
            "SLUICE_STOP_TIMEOUT_S": "5",
            "SLUICE_READ_BACK_TIMEOUT_S": "4",
            "SLUICE_PARTITIONS": str(places.partitions),
            "SLUICE_PARTITION": str(_lane_of(name)),
            f"SLUICE_{kind.upper()}_PORT": str(port),
            **places.settings,
            **(places.clocks.environment(name) if places.clocks else {}),
        }
        return Service(
            name,
            url=f"http://127.0.0.1:{port}",
            environment=environment,
            log_file=places.folder / f"{name}.log",
            pause_s=self.pause_s,
            on_strike=lambda fault: self.strike(f"{kind}: {fault.replace(f'{kind}.', '')}"),
        )

    def strike(self, fault: str) -> None:
        """A fault struck: for the table."""
        self.struck.append(fault)
        table.injected(fault)

    def set_clock(self, name: str, *, hours_ahead: int) -> None:
        """This service's clock jumps."""
        assert self.places.clocks is not None, "the places of this scene have no clocks"
        self.places.clocks.set(name, ahead_s=hours_ahead * 3600)
        now = {-1: "1 h behind", 0: "right again", 1: "1 h ahead"}[hours_ahead]
        self.strike(f"{self.services[name].kind}: clock {now}")

    async def ready(self, *names: str) -> None:
        """Wait until these services (all, where none is named) say that they are ready."""
        async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
            for name in names or self.services:
                await self._ready(http, self.services[name])

    async def _ready(self, http: httpx.AsyncClient, service: Service) -> None:
        said: object = None
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not (said := await _look(http, service)):  # noqa: ASYNC110  # readiness can only be asked for
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{service.name} never became ready ({said})\n{service.tail()}") from None

    def urls(self, kind: str) -> list[str]:
        return [service.url for service in self.services.values() if service.kind == kind]

    async def join(self, *, users: Sequence[str] = USERS, watched: bool = True) -> list[Client]:
        """Clients, and followers beside each, who hear of all that its user's batches come to."""
        joined = [await self._join(user) for user in users]
        if watched:
            for user in users:
                await self._follow(user)
        self.journal.on_batch = self._on_batch
        return joined

    async def _follow(self, user: str) -> None:
        """Over WebSocket, batch by batch and all at once, and over server-sent events."""
        urls, token, deleted = self.urls("notifier"), token_of(user), self.journal.deleted
        followers: list[Follower] = [
            Watcher(urls=urls, token=token, deleted=deleted, chance=self._own_chance()),
            Watcher(urls=urls, token=token, deleted=deleted, chance=self._own_chance(), all_of=user),
            Listener(urls=urls, token=token, deleted=deleted, chance=self._own_chance(), user=user),
        ]
        self.followers[user] = [await self.stack.enter_async_context(each.watching()) for each in followers]

    async def _join(self, user: str) -> Client:
        client = Client(
            user,
            urls=self.urls("api"),
            token=token_of(user),
            journal=self.journal,
            chance=self._own_chance(),
        )
        self.clients.append(client)
        self.stack.push_async_callback(client.close)
        return client

    def _own_chance(self) -> random.Random:
        return random.Random(self.chance.random())

    def _on_batch(self, batch_id: str, user: str) -> None:
        for follower in self.followers.get(user, []):
            follower.hear_of(batch_id)

    @contextlib.asynccontextmanager
    async def lively(self, *, pause_s: float = 0.1) -> AsyncIterator[None]:
        """All clients go about their business until the block is left, then finish what they began."""
        stop = asyncio.Event()
        living = [asyncio.create_task(client.live(stop, pause_s=pause_s)) for client in self.clients]
        try:
            yield
            stop.set()
            await asyncio.gather(*living)
        finally:
            await cancelled(*living)

    # Looking on

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Sample what each service says of itself, and where the read models stand."""
        tasks = [asyncio.create_task(self._look_at_services()), asyncio.create_task(self._look_at_positions())]
        try:
            yield
        finally:
            ended = [task for task in tasks if task.done()]
            await cancelled(*tasks)
            for task in ended:
                task.result()

    async def _look_at_services(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=1) as http:
            while True:
                for service in list(self.services.values()):
                    at_s = time.monotonic()
                    self.evidence.looks.append(Looked(service.name, at_s, await _look(http, service)))
                await asyncio.sleep(SAMPLE_PAUSE_S)

    async def _look_at_positions(self) -> None:
        while True:
            with contextlib.suppress(*AWAY):
                async with self._asking() as connection:
                    while True:
                        self.evidence.positions += (await gathering.next_offsets_of(connection)).items()
                        await asyncio.sleep(SAMPLE_PAUSE_S / 5)
            await asyncio.sleep(SAMPLE_PAUSE_S)

    async def note_usage(self) -> None:
        """At a quiet moment: what each process holds; the notifier besides its task for each batch that is watched."""
        watched = {batch_id for follower in self._all_followers() for batch_id in follower.streams}
        async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
            for service in self.services.values():
                held = service.usage()
                with contextlib.suppress(httpx.TransportError):
                    tasks = _tasks((await http.get(f"{service.url}/metrics")).text)
                    if held is not None:
                        tasks -= len(watched) if service.kind == "notifier" else 0
                        self.evidence.usage.append(Usage(service.name, service.pid, *held, tasks))

    # The end

    async def even(self) -> None:
        """The last fault is healed: wait until the read models are even with where the log ends now."""
        after = self.struck[-1] if self.struck else "the start"
        healed_s = time.monotonic()
        seconds: float | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVEN_TIMEOUT_S), self._asking() as connection:
                ends = await gathering.ends_of(self.log, self._partitions)
                while not await gathering.includes(connection, ends):  # noqa: ASYNC110  # asked from outside
                    await asyncio.sleep(SAMPLE_PAUSE_S / 5)
                seconds = time.monotonic() - healed_s
        self.evidence.settled.append(Settled(after, seconds))

    async def settle(self) -> None:
        """Nobody asks for anything any more: wait until what was accepted is worked, and all are ready."""
        await self.even()
        with contextlib.suppress(TimeoutError):  # the checker says what is missing
            async with asyncio.timeout(WORKED_TIMEOUT_S), self._asking() as connection:
                while await gathering.unworked(connection, self.log, self._partitions):  # noqa: ASYNC110  # as above
                    await asyncio.sleep(SAMPLE_PAUSE_S / 2)
        await self.ready()

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.places.database_url, timeout=5, command_timeout=10)
        try:
            yield connection
        finally:
            connection.terminate()

    async def records(self) -> list[StoredRecord]:
        """The log as it is now."""
        return await gathering.records_of(self.log, self._partitions)

    @property
    def _partitions(self) -> range:
        return range(self.places.partitions)

    def holder_of(self, folded: FoldedLog) -> str:
        """Which processor claimed lane 0 last."""
        claim = _claims(folded)[-1]
        return next(name for name, service in self.services.items() if claims_of(service, claim))

    async def until_claimed(self, *, since: int) -> list[Fact]:
        """Wait for an effective claim of lane 0 at or after this offset; all claims then."""
        return await self._until_claims(lambda claims: claims[-1].offset >= since)

    async def until_claimed_by(self, name: str) -> list[Fact]:
        """Wait until the newest effective claim is this processor's; all claims then."""
        return await self._until_claims(lambda claims: claims_of(self.services[name], claims[-1]))

    async def _until_claims(self, enough: Callable[[list[Fact]], bool]) -> list[Fact]:
        async with asyncio.timeout(WORKED_TIMEOUT_S):
            while not ((claims := await self._claims()) and enough(claims)):  # noqa: ASYNC110  # as above
                await asyncio.sleep(SAMPLE_PAUSE_S)
        return claims

    async def _claims(self) -> list[Fact]:
        return _claims(fold_again(await self.records()))

    async def reckoning(self) -> list[str]:
        """What does not hold, in sentences; kept in the scene's folder if anything."""
        evidence = self.evidence
        evidence.operations = self.journal.operations
        evidence.records = await self.records()
        folded = fold_again(evidence.records)
        await asyncio.gather(*(follower.caught_up(folded) for follower in self._all_followers()))
        evidence.streams = [stream for follower in self._all_followers() for stream in follower.streams.values()]
        evidence.answers = [answer async for answer in self._answers()]
        evidence.rows = await gathering.rows_of(self.places.database_url)
        evidence.replayed = await gathering.replayed(
            self.places.database_url,
            evidence.records,
            log_id=folded.state.lanes[0].log_id,
            chance=self._own_chance(),
        )
        evidence.verified = await gathering.verified(
            self.log, self.places.database_url, log_id=folded.state.lanes[0].log_id, chance=self._own_chance()
        )
        found = violations(evidence)
        table.violated(set(self.struck), len(found))
        if found:
            save(evidence, self.places.folder / "history", found=found)
        return found

    def _all_followers(self) -> list[Follower]:
        return [follower for followers in self.followers.values() for follower in followers]

    async def _answers(self) -> AsyncIterator[Answer]:
        """Each batch, of very many some, as it was where a client was told to be at last."""
        by_user = {client.user: client for client in self.clients}
        places = {
            (user, batch_id, position)
            for user, followers in self.followers.items()
            for follower in followers
            for stream in follower.streams.values()
            for position, known in [at_the_end(stream)]
            for batch_id in known
            if position is not None and batch_id not in self.journal.deleted
        }
        for user, batch_id, position in self.chance.sample(sorted(places), min(ANSWERS_MAX, len(places))):
            yield Answer(batch_id, position, await by_user[user].batch(batch_id, at=position))


@contextlib.asynccontextmanager
async def a_scene(places: Places, *, seed: int, pause_s: float = 4.0) -> AsyncIterator[Scene]:
    """A scene without anybody in it. `pause_s`: how long a service stays stopped that a fault stopped."""
    settings = LogSettings(
        bootstrap_servers=places.kafka,
        topic=f"{places.unique}.events",
        progress_topic=f"{places.unique}.progress",
        client_id="scene",
    )
    async with contextlib.AsyncExitStack() as stack:
        log = await stack.enter_async_context(EventLog.open(settings))
        yield Scene(places, random.Random(seed), pause_s, stack, log)


def claims_of(service: Service, claim: Fact) -> bool:
    """Whether this claim is of the process that runs as this service now."""
    return isinstance(claim.event, LaneClaimed) and str(service.pid) in claim.event.worker_id.split("-")


def _claims(folded: FoldedLog) -> list[Fact]:
    return [fact for fact in folded.effective() if isinstance(fact.event, LaneClaimed) and fact.partition == 0]


def _lane_of(name: str) -> int:
    """The partition of a processor with this name."""
    _, is_named, lane = name.partition("-lane")
    return int(lane) if is_named else 0


def everybody(partitions: int) -> list[str]:
    """One of each service, and a processor for each lane."""
    return [*ALL, *(f"processor-lane{lane}" for lane in range(1, partitions))]


def token_of(user: str) -> str:
    """Good for ever, and whatever the clock says of whoever checks it."""
    return jwt.encode({"sub": user}, SECRET, algorithm="HS256")


async def _look(http: httpx.AsyncClient, service: Service) -> bool | None:
    try:
        return (await http.get(f"{service.url}/readyz")).is_success
    except httpx.TransportError:
        return None


def _tasks(metrics: str) -> int:
    """How many asyncio tasks a process says it has."""
    values: Any = [line.rsplit(" ", 1)[1] for line in metrics.splitlines() if line.startswith("sluice_tasks ")]
    return int(float(values[0])) if values else 0


async def play(scene: Scene, faults: Mapping[str, Sequence[str]]) -> list[str]:
    """Clients at work while each service meets its faults, one start after the other; what does not hold then."""
    await scene.start(*everybody(scene.places.partitions), faults=faults)
    await scene.join()
    async with scene.looking():
        async with scene.lively():
            for name, armed in faults.items():
                await scene.services[name].until_struck(sum(len(each.split(",")) for each in armed))
            await scene.ready()
        await scene.settle()
    return await scene.reckoning()
