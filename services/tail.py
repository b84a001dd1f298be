"""The tail: what api and notifier know of the log beyond the read models, and how they read it on.

It reads every partition from the position Postgres holds, folds the facts of batches in use with `evolve`, and keeps
the facts of all others until the read models include them. A batch is loaded when somebody asks: its rows at P′ plus
the kept facts after P′. So nothing after the projected position is ever missing here, whichever of the two is ahead.
Everything runs on one event loop; listeners are called synchronously, in log order within a partition.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, cancel_swept, evolve, step
from schemas.events import Fact, LaneClaimed, LogCreated, Undecodable, decode
from schemas.ids import partition_of
from schemas.position import Position
from schemas.records import StoredRecord
from services.database import Database, DatabaseUnavailable
from services.eventlog import Log, LogReader, LogUnavailable
from services.lifecycle import cancelled
from services.observability import LOG_LAG, TAIL_BATCHES_HELD, TAIL_FACTS_HELD, logger

_log = logger("tail")

READ_RECORDS_MAX = 2_000
READ_TIMEOUT_MS = 200
WATCH_INTERVAL_S = 1.0
LOAD_TIMEOUT_S = 5.0
CREATED_UNUSED_S = 60.0


@dataclass(frozen=True, slots=True)
class Folded:
    """One fact of a batch in use, after it was folded. `batch` and the states in `outcome` are live: copy what you
    keep. `position` is the whole vector, this fact included."""

    fact: Fact
    outcome: Changed | Ignored
    batch: Batch | None
    time_ms: int
    position: Position


@dataclass(slots=True)
class Held:
    """A batch in memory, folded up to the tail's head; `batch` is None for one nobody heard of."""

    id: str
    batch: Batch | None
    uploads: dict[str, Upload]
    folded_to: int
    users: int = 0
    created_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """A fact of a batch that is not in memory, with the lane's epoch and time as of it."""

    fact: Fact
    epoch: int | None
    time_ms: int


@dataclass(slots=True)
class _Partition:
    """`projected`: the next offset of the read models, as last heard; kept facts are complete from there."""

    lane: Lane
    projected: int
    kept_order: deque[tuple[int, str]] = field(default_factory=deque)


class ReadBack:
    """The facts of one write, awaited from the log. Made before they are appended, so none can be missed."""

    def __init__(self, waiting: dict[str, "asyncio.Future[Folded]"], event_ids: Sequence[str]) -> None:
        self._waiting = waiting
        loop = asyncio.get_running_loop()
        self._futures = {event_id: loop.create_future() for event_id in event_ids}
        waiting.update(self._futures)

    async def wait(self, timeout_s: float) -> list[Folded]:
        """What became of each fact, in the order they were named; raises TimeoutError."""
        try:
            async with asyncio.timeout(timeout_s):
                return [await future for future in self._futures.values()]
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Wait no longer."""
        for event_id, future in self._futures.items():
            self._waiting.pop(event_id, None)
            future.cancel()


class Tail:
    """Reads the log on; see the module's text. Open it with `Tail.open`."""

    def __init__(
        self,
        *,
        reader: LogReader,
        database: Database,
        log_id: str,
        lanes: Mapping[int, Lane],
        facts_max: int,
        batches_max: int,
    ) -> None:
        self.log_id = log_id
        self._reader = reader
        self._database = database
        self._facts_max = facts_max
        self._batches_max = batches_max
        self._partitions = {number: _Partition(lane, lane.next_offset) for number, lane in lanes.items()}
        self._held: dict[str, Held] = {}
        self._kept: dict[str, list[_Kept]] = {}
        self._loading: dict[str, asyncio.Task[Held]] = {}
        self._waiting: dict[str, asyncio.Future[Folded]] = {}
        self._listeners: list[Callable[[Folded], None]] = []
        self._conditions: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._ends: dict[int, int] = {}
        self._caught_up_at_s: float | None = None
        self._log_problem: str | None = None
        self._database_problem: str | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        *,
        log: Log,
        database: Database,
        log_id: str,
        partitions: int,
        facts_max: int = 200_000,
        batches_max: int = 2_000,
    ) -> AsyncIterator[Self]:
        """A tail that reads on from the projected position until the block is left.

        Raises DatabaseUnavailable, LogUnavailable, LogRefused where the log does not reach that position.
        """
        projected = await database.positions()
        lanes = {number: projected.get(number) or Lane(number, log_id) for number in range(partitions)}
        reader = log.reader(range(partitions))
        tail = cls(
            reader=reader,
            database=database,
            log_id=log_id,
            lanes=lanes,
            facts_max=facts_max,
            batches_max=batches_max,
        )
        try:
            for number, lane in lanes.items():
                await reader.seek(number, lane.next_offset)
            tasks = [
                asyncio.create_task(work(), name=f"tail.{work.__name__}")
                for work in (tail._read, tail._measure, tail._watch_projection)
            ]
            try:
                tail._tasks = tasks
                yield tail
            finally:
                await cancelled(*tasks, *tail._loading.values())
        finally:
            await reader.close()

    _tasks: list[asyncio.Task[None]]

    # What is known

    def position(self) -> Position:
        """The last record read, of every partition."""
        return Position.of(self.log_id, {n: p.lane.next_offset - 1 for n, p in self._partitions.items()})

    def projected(self) -> Position:
        """What the read models include, as last heard; partitions of which they include nothing are left out."""
        return Position.of(self.log_id, {n: p.projected - 1 for n, p in self._partitions.items() if p.projected})

    def unprojected(self) -> int:
        """How many records were read that the read models do not include yet."""
        return sum(max(0, p.lane.next_offset - p.projected) for p in self._partitions.values())

    @property
    def full(self) -> bool:
        """Whether so many facts wait for the read models that new ones are not taken."""
        return self.unprojected() >= self._facts_max

    def lag_s(self) -> float:
        """Seconds since everything that was in the log had been read; infinite before the first time."""
        return float("inf") if self._caught_up_at_s is None else time.monotonic() - self._caught_up_at_s

    def problems(self) -> list[str]:
        """What keeps the tail from being up to date, in sentences; empty when it is."""
        ended = [str(task.exception()) for task in self._tasks if task.done() and not task.cancelled()]
        return [*ended, *(problem for problem in (self._log_problem, self._database_problem) if problem)]

    @property
    def log_problem(self) -> str | None:
        """Why the log cannot be read just now; None when it can."""
        return self._log_problem

    async def failure(self) -> None:
        """Return never, but raise what ended one of the tail's tasks; nobody can go on without them."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    # What others wait for

    async def caught_up(self) -> None:
        """Wait until everything that was in the log at one moment after the call has been read."""
        began = time.monotonic()
        await self._until(lambda: self._caught_up_at_s is not None and self._caught_up_at_s >= began)

    async def reached(self, position: Position, timeout_s: float) -> bool:
        """Whether the tail has read so far within `timeout_s`."""
        return await self._within(lambda: self.position().includes(position), timeout_s)

    async def reached_end(self, timeout_s: float) -> bool:
        """Whether the tail has read, within `timeout_s`, to where the log ended at the call."""
        try:
            async with asyncio.timeout(timeout_s):
                ends = await self._reader.ends()
        except (TimeoutError, LogUnavailable):
            return False
        return await self._within(lambda: self._read_to(ends), timeout_s)

    async def projected_past(self, position: Position, timeout_s: float) -> bool:
        """Whether the read models include the position within `timeout_s`."""
        return await self._within(lambda: self.projected().includes(position), timeout_s)

    def read_back(self, event_ids: Sequence[str]) -> ReadBack:
        """Await these facts, which are appended next; their batch must be held or created here meanwhile."""
        return ReadBack(self._waiting, event_ids)

    def listen(self, callback: Callable[[Folded], None]) -> Callable[[], None]:
        """Call back for every fact of every batch in memory, effective or ignored; the result ends it."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    # Batches in use

    def create(self, batch_id: str) -> None:
        """Fold this batch from its first fact on: the caller made its id just now, so nobody else knows it."""
        self._held[batch_id] = Held(batch_id, None, {}, folded_to=0, created_at_s=time.monotonic())

    @contextlib.asynccontextmanager
    async def hold(self, batch_id: str) -> AsyncIterator[Held | None]:
        """The batch as of the tail's head, kept up to date as long as the block lasts; None where nobody heard of it
        (facts that come meanwhile are folded all the same).

        Raises DatabaseUnavailable where the batch is not in memory and its rows cannot be had.
        """
        if partition_of(batch_id) not in self._partitions:
            yield None
            return
        held = await self._load(batch_id)
        while self._held.get(batch_id) is not held:  # it was let go of before we could say that we use it
            held = await self._load(batch_id)
        held.users += 1
        try:
            yield held if held.batch is not None else None
        finally:
            held.users -= 1

    async def _load(self, batch_id: str) -> Held:
        if held := self._held.get(batch_id):
            return held
        loading = self._loading.get(batch_id)
        if loading is None:
            loading = asyncio.create_task(self._load_rows(batch_id), name="tail.load")
            loading.add_done_callback(lambda _: self._loading.pop(batch_id, None))
            self._loading[batch_id] = loading
        return await asyncio.shield(loading)

    async def _load_rows(self, batch_id: str) -> Held:
        partition = self._partitions[partition_of(batch_id)]
        complete_from = partition.projected
        snapshot = await self._database.snapshot(batch_id)
        included = snapshot.lane.next_offset
        if included < complete_from:
            raise DatabaseUnavailable(
                f"the read models are being rebuilt: they include {included} records of partition "
                f"{partition.lane.partition}, of {complete_from} they included before"
            )
        if not await self._within(lambda: partition.lane.next_offset >= included, LOAD_TIMEOUT_S):
            raise DatabaseUnavailable("the log is read more slowly than the read models are written; try again")
        held = Held(batch_id, snapshot.batch, snapshot.uploads, folded_to=included)
        self._held[batch_id] = held
        for kept in self._kept.pop(batch_id, ()):
            self._fold(held, partition, kept)
        return held

    # Reading on

    async def _read(self) -> None:
        while True:
            try:
                records = await self._reader.read(records_max=READ_RECORDS_MAX, timeout_ms=READ_TIMEOUT_MS)
            except LogUnavailable as error:
                self._say_log_problem(str(error))
                await asyncio.sleep(WATCH_INTERVAL_S / 2)
                continue
            self._say_log_problem(None)
            for record in records:
                self._take(record)
            self._wake()

    def _take(self, record: StoredRecord) -> None:
        partition = self._partitions[record.partition]
        step(partition.lane, record.offset, record.timestamp_ms)
        fact = decode(record)
        if isinstance(fact, Undecodable):
            return
        batch_id = fact.batch_id
        if isinstance(fact.event, LogCreated | LaneClaimed) or batch_id is None:
            evolve(partition.lane, None, None, fact)
            return
        kept = _Kept(fact, partition.lane.epoch, partition.lane.time_ms)
        if held := self._held.get(batch_id):
            self._fold(held, partition, kept)
        elif record.offset >= partition.projected or batch_id in self._loading:
            self._kept.setdefault(batch_id, []).append(kept)
            partition.kept_order.append((record.offset, batch_id))

    def _fold(self, held: Held, partition: _Partition, kept: _Kept) -> None:
        fact = kept.fact
        if fact.offset < held.folded_to:
            return
        held.folded_to = fact.offset + 1
        lane = Lane(fact.partition, self.log_id, fact.offset + 1, kept.epoch, kept.time_ms)
        outcome = evolve(lane, held.batch, held.uploads.get(fact.upload_id or ""), fact)
        if isinstance(outcome, Changed):
            _apply(held, outcome, lane)
        position = self.position().at(partition.lane.partition, fact.offset)
        folded = Folded(fact, outcome, held.batch, kept.time_ms, position)
        if (reader := self._waiting.pop(fact.id, None)) and not reader.done():
            reader.set_result(folded)
        for listener in self._listeners:
            listener(folded)

    # How far the log and the read models are

    async def _measure(self) -> None:
        while True:
            asked_at_s = time.monotonic()
            try:
                self._ends = await self._reader.ends()
                await self._within(lambda: self._read_to(self._ends), WATCH_INTERVAL_S)
                if self._read_to(self._ends):
                    self._caught_up_at_s = asked_at_s
                    self._wake()
            except LogUnavailable:
                pass  # `_read` meets and says the same, and the lag grows meanwhile
            for number, partition in self._partitions.items():
                LOG_LAG.labels(number).set(max(0, self._ends.get(number, 0) - partition.lane.next_offset))
            await asyncio.sleep(WATCH_INTERVAL_S / 2)

    def _read_to(self, ends: Mapping[int, int]) -> bool:
        return all(self._partitions[number].lane.next_offset >= end for number, end in ends.items())

    async def _watch_projection(self) -> None:
        while True:
            lost = asyncio.Event()
            try:
                connection = await self._database.listen(self._heard_projected, lost)
                try:
                    while not lost.is_set():
                        await self._ask_projected()
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(lost.wait(), WATCH_INTERVAL_S)
                finally:
                    connection.terminate()
            except DatabaseUnavailable as error:
                self._say_database_problem(str(error))
                await asyncio.sleep(WATCH_INTERVAL_S)

    async def _ask_projected(self) -> None:
        for number, lane in (await self._database.positions()).items():
            self._move_projected(number, lane.next_offset)
        self._say_database_problem(None)
        self._evict()
        self._wake()

    def _heard_projected(self, partition: int, next_offset: int) -> None:
        self._move_projected(partition, next_offset)
        self._wake()

    def _move_projected(self, number: int, next_offset: int) -> None:
        if (partition := self._partitions.get(number)) is not None:
            partition.projected = max(partition.projected, next_offset)

    def _evict(self) -> None:
        for partition in self._partitions.values():
            self._drop_kept(partition)
        now_s = time.monotonic()
        for held in list(self._held.values()):
            if len(self._held) <= self._batches_max:
                break
            if held.users == 0 and self._is_projected(held, now_s):
                del self._held[held.id]
        TAIL_BATCHES_HELD.set(len(self._held))
        TAIL_FACTS_HELD.set(self.unprojected())

    def _is_projected(self, held: Held, now_s: float) -> bool:
        if held.batch is None:
            return now_s - held.created_at_s > CREATED_UNUSED_S
        return held.batch.offset < self._partitions[held.batch.partition].projected

    def _drop_kept(self, partition: _Partition) -> None:
        order = partition.kept_order
        while order and order[0][0] < partition.projected:
            if order[0][1] in self._loading:
                break
            offset, batch_id = order.popleft()
            kept = self._kept.get(batch_id)
            if kept and kept[0].fact.offset == offset:
                kept.pop(0)
                if not kept:
                    del self._kept[batch_id]

    # Waiting

    def _wake(self) -> None:
        for future, condition in list(self._conditions.items()):
            if not future.done() and condition():
                future.set_result(None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        if condition():
            return
        future = asyncio.get_running_loop().create_future()
        self._conditions[future] = condition
        try:
            await future
        finally:
            del self._conditions[future]

    async def _within(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._until(condition)
        return condition()

    def _say_log_problem(self, problem: str | None) -> None:
        _say_change("log", self._log_problem, problem)
        self._log_problem = problem

    def _say_database_problem(self, problem: str | None) -> None:
        _say_change("database", self._database_problem, problem)
        self._database_problem = problem


def _apply(held: Held, changed: Changed, lane: Lane) -> None:
    held.batch = changed.batch
    if changed.upload is not None:
        held.uploads[changed.upload.id] = changed.upload
    if changed.swept == "cancelled":
        for upload in held.uploads.values():
            cancel_swept(upload, at_ms=lane.time_ms, offset=lane.next_offset - 1)
    elif changed.swept == "deleted":
        held.uploads.clear()


def _say_change(part: str, before: str | None, now: str | None) -> None:
    if now and not before:
        _log.warning("part_lost", part=part, reason=now)
    elif before and not now:
        _log.info("part_back", part=part)
