"""The world as one process sees it: its way to the log, the tables, the blobs, the lane's lock and the worker.

They have the shapes of the real ones and the same errors. What is sent lands in the broker's own time, whatever becomes
of the sender: late, twice, or after its death. Blobs are the real store, on a folder in memory, without its threads.
"""

import asyncio
import contextlib
import contextvars
import functools
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from schemas.errors import WorkCode
from schemas.records import NewRecord, StoredRecord
from services.blobs import StorageUnavailable
from services.blobs.local import LocalBlobs
from services.database import DatabaseUnavailable
from services.eventlog import LogOutcomeUnknown, LogSettings, LogUnavailable
from services.eventlog.protocol import PartitionBounds, not_there
from services.processor.presence import Worker
from services.processor.work.port import Job, WorkCancelled, WorkError, WorkerUnavailable
from tests.faults.simulation.loop import NODE
from tests.faults.simulation.world import Broker, World

T = TypeVar("T")

BROKER = contextvars.Context()
"""What lands, lands whether or not its sender still lives: these callbacks are of no process."""
LATE_S_MAX = 6.0
HEELS_MAX = 3
LOCK_IDLE_S = 3.0
LOCK_TRY_S = 0.5
LOCK_PIN_S = 1.0
WORK_S = {"good": (0.02, 0.3), "bad": (0.02, 0.2), "broken": (0.01, 0.05), "slow": (1.0, 2.5)}
"""How long the work on a file takes, at least and at most, by the first word of its name."""


class SimulatedLog:
    """A Log."""

    def __init__(self, world: World) -> None:
        self.settings = LogSettings(bootstrap_servers="nowhere:1")
        self._world = world

    def reader(self, partitions: Sequence[int]) -> "SimulatedReader":
        return SimulatedReader(self._world, partitions)

    def writer(self) -> "SimulatedWriter":
        return SimulatedWriter(self._world)

    def publish_progress(self, partition: int, record: NewRecord) -> None:
        """Nobody listens."""


class SimulatedReader:
    """A LogReader; how many records a poll brings, the seed says."""

    silent_ms = 0.0

    def __init__(self, world: World, partitions: Sequence[int]) -> None:
        self.partitions = tuple(partitions)
        self._world = world
        self._brokers = [world.brokers[number] for number in partitions]
        self._next = dict.fromkeys(partitions, -1)

    async def first(self, partition: int) -> StoredRecord | None:
        return next(iter(self._world.brokers[partition].records), None)

    async def seek(self, partition: int, offset: int) -> None:
        async with self._world.calling("log.seek", LogUnavailable):
            bounds = PartitionBounds(0, self._world.brokers[partition].end)
            if refused := not_there(f"log/{partition}", offset, bounds):
                raise refused
            self._next[partition] = offset

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        world = self._world
        if not self._unread():
            await self._arrival(timeout_ms)
        if not (unread := self._unread()):
            return []
        await world.reach("log.read", "before", LogUnavailable)
        most = records_max if world.delays.random() < 0.5 else world.delays.randint(1, 4)
        broker = unread[0] if len(unread) == 1 else world.delays.choice(unread)
        first = self._next[broker.partition]
        records = broker.records[first : first + min(most, records_max)]
        self._next[broker.partition] += len(records)
        return records

    def _unread(self) -> list[Broker]:
        return [broker for broker in self._brokers if self._next[broker.partition] < broker.end]

    async def _arrival(self, timeout_ms: int) -> None:
        """Wait for the next record of any of the partitions."""
        arrival: asyncio.Future[None] = self._world.loop.create_future()
        for broker in self._brokers:
            broker.arrivals[arrival] = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_ms / 1000):
                    await arrival
        finally:
            for broker in self._brokers:
                broker.arrivals.pop(arrival, None)

    async def ends(self) -> dict[int, int]:
        async with self._world.calling("log.ends", LogUnavailable):
            return {broker.partition: broker.end for broker in self._brokers}

    async def close(self) -> None:
        """Nothing to close."""


class SimulatedWriter:
    """A LogWriter: groups of one partition one after the other, as the real one sends them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._turns = [asyncio.Lock() for _ in world.brokers]
        self._closed = False

    async def append(self, partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        if self._closed:
            raise LogUnavailable("the writer is closed: nothing was sent")
        sent: list[asyncio.Future[int]] = []
        try:
            async with asyncio.timeout(timeout_s), self._turns[partition]:
                return await self._append(self._world.brokers[partition], list(records), sent)
        except TimeoutError:
            if sent:
                raise LogOutcomeUnknown("no answer: it may have landed or may yet land") from None
            raise LogUnavailable("nothing was sent") from None

    async def close(self) -> None:
        self._closed = True

    async def _append(self, broker: Broker, records: list[NewRecord], sent: list[asyncio.Future[int]]) -> int:
        world = self._world
        fault = await world.reach("log.append", "before", LogUnavailable)
        answer: asyncio.Future[int] = world.loop.create_future()
        sent.append(answer)
        if fault == "twice":
            self._land_late(broker, records, None)
        dying = world.in_flight("log.append")
        if fault == "late" or dying:
            self._land_late(broker, records, answer)
        else:
            delay_s = world.delays.uniform(0.0001, 0.002)
            world.loop.call_later(delay_s, self._land, broker, records, answer, context=BROKER)
        if dying:
            await world.die("while an append is in flight")
        if fault == "late" and world.delays.random() < 0.7:
            raise LogOutcomeUnknown("the connection was lost: it may have landed or may yet land")
        offset = await answer
        await world.reach("log.append", "after", LogOutcomeUnknown)
        return offset

    def _land_late(self, broker: Broker, records: list[NewRecord], answer: "asyncio.Future[int] | None") -> None:
        """Some time later; in half the cases hard on the heels of one of the next to land, where it does most harm."""
        world, landed = self._world, False

        def land() -> None:
            nonlocal landed
            if not landed:
                landed = True
                self._land(broker, records, answer)

        if world.delays.random() < 0.5:
            broker.stragglers.append((world.delays.randint(1, HEELS_MAX), land))
        world.loop.call_later(world.delays.uniform(0.0, LATE_S_MAX), land, context=BROKER)

    def _land(self, broker: Broker, records: list[NewRecord], answer: "asyncio.Future[int] | None") -> None:
        offset = broker.land(records, self._world.now_ms())
        for record in records:
            self._world.tell("landed", dict(record.headers)["ce_type"].decode())
        for straggler in broker.due():
            self._world.loop.call_later(self._world.delays.uniform(0.0, 0.004), straggler, context=BROKER)
        if answer is not None and not answer.done():
            answer.set_result(offset)


class SimulatedLock:
    """Takes the place of services.processor.lock.LaneLock: whoever does not pin it for LOCK_IDLE_S has lost it."""

    def __init__(self, world: World, partition: int) -> None:
        self.held = False
        self.on_change: Callable[[], None] = lambda: None
        self.problem: str | None = None
        self._world = world
        self._partition = partition

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, database: Any, *_: object, partition: int) -> AsyncIterator["SimulatedLock"]:
        lock = cls(database.world, partition)
        try:
            yield lock
        finally:
            await lock.give_back()

    async def give_back(self) -> None:
        self.held = False
        if self._holder() is NODE.get():
            del self._world.locks[self._partition]

    async def take(self) -> bool:
        while not await self._try():  # noqa: ASYNC110  # as the real one: a lock tells nobody that it is free
            await asyncio.sleep(LOCK_TRY_S)
        return True

    async def keep(self) -> None:
        while True:
            if await self._pinned():
                await asyncio.sleep(LOCK_PIN_S)
                continue
            self._change(held=False)
            await self.take()

    def _holder(self) -> object:
        node, pinned_s = self._world.locks.get(self._partition, (None, 0.0))
        return None if node is None or node.dead or self._world.loop.now_s - pinned_s > LOCK_IDLE_S else node

    async def _try(self) -> bool:
        try:
            async with self._world.calling("lock.try", DatabaseUnavailable):
                free = self._holder() in (None, NODE.get())
                if free:
                    self._world.locks[self._partition] = (NODE.get(), self._world.loop.now_s)
        except DatabaseUnavailable as error:
            return self._dropped(error)
        self.problem = None
        self._change(held=free)
        return free

    async def _pinned(self) -> bool:
        try:
            async with self._world.calling("lock.pin", DatabaseUnavailable):
                if self._holder() is not NODE.get():
                    return False
                self._world.locks[self._partition] = (NODE.get(), self._world.loop.now_s)
                return True
        except DatabaseUnavailable as error:
            return self._dropped(error)

    def _dropped(self, error: Exception) -> bool:
        """The connection is gone, and with it the lock."""
        self.problem = str(error)
        if self._holder() is NODE.get():
            del self._world.locks[self._partition]
        return False

    def _change(self, *, held: bool) -> None:
        if held != self.held:
            self.held = held
            self.on_change()


class SimulatedPresence:
    """Takes the place of services.processor.presence.Presence: nobody looks."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, *_: object, **__: object) -> AsyncIterator["SimulatedPresence"]:
        yield cls()

    def wake(self) -> None:
        """Nobody sleeps."""

    async def leave(self) -> None:
        """Nobody waits."""


class SimulatedSelf:
    """Takes the place of services.processor.presence.Worker: who a process is must not differ between runs."""

    @staticmethod
    def this_process() -> Worker:
        return Worker(NODE.get().name, "nowhere", 1)


class SimulatedBlobs(LocalBlobs):
    """The local store, each use of its folder a call that may fail."""

    def __init__(self, world: World) -> None:
        super().__init__(world.folder, fsync=False)
        self._world = world

    async def run(self, work: Callable[[], T]) -> T:
        async with self._world.calling("blobs", StorageUnavailable):
            return work()


class SimulatedWorker:
    """A WorkerProcess whose files say by their names what becomes of them."""

    content_types = frozenset({"image/jpeg"})
    degraded: tuple[str, ...] = ()

    def __init__(self, world: World) -> None:
        self._world = world
        self._cancelling: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, job: Job, *, on_progress: Callable[[str, int], None], **_: object) -> dict[str, Any]:
        """No work takes as long as it may."""
        assert self._cancelling is None, "the worker works one file at a time"
        self._cancelling = self._world.loop.create_future()
        self._idle.clear()
        try:
            async with self._world.calling("work", WorkerUnavailable):
                on_progress("decode", 10)
                await self._work(job)
                job.thumbnail_path.write_bytes(b"thumbnail")
        finally:
            self._cancelling = None
            self._idle.set()
        return {"kind": "image", "format": "jpeg", "sha256": job.sha256}

    async def warm(self) -> None:
        async with self._world.calling("work", WorkerUnavailable):
            """There is one."""

    async def cancel(self) -> None:
        if self._cancelling is not None and not self._cancelling.done():
            self._cancelling.set_result(None)
        await self._idle.wait()

    async def _work(self, job: Job) -> None:
        kind = job.filename.partition("-")[0]
        assert self._cancelling is not None
        done, _ = await asyncio.wait({self._cancelling}, timeout=self._world.delays.uniform(*WORK_S[kind]))
        if done:
            raise WorkCancelled
        if not _has(job.path, job.sha256):
            raise WorkError(WorkCode.BLOB_MISSING, "The stored file is gone.")
        if kind == "broken" or (kind == "bad" and not self._world.mended):
            raise WorkError(WorkCode.CORRUPT_MEDIA, "It is no picture.", final=kind == "broken")


@functools.cache
def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path.read_bytes()) == sha256
