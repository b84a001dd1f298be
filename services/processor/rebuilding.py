"""The read models built anew from the log, in a schema of their own beside the live ones.

`Rebuild` folds exactly as the processor does, with the same projection, partition after partition, as far as it is
told. Rows and position change in one transaction there too, so whatever is interrupted goes on from its rows. A record
that is in quarantine stays undecoded unless it is being retried: what was decided about the live rows holds until a
person decides anew. Who compares the result is `verifying`, who makes it live is `replay`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from schemas.records import StoredRecord
from services.database import Connection, Database, DatabaseUnavailable, reaching
from services.eventlog import Log, LogReader, LogUnavailable
from services.lifecycle import cancelled
from services.migrating import script
from services.processor.projection import CACHED_ROWS_MAX, GenerationChangedError, LaneLostError, Projection
from services.processor.rows import SHADOW_QUARANTINE, ShadowRows

T = TypeVar("T")

VERIFICATION_SCHEMA = "verification"
RECORDS_MAX = 10_000
UNFLUSHED_RECORDS_MAX = 40_000
READ_TIMEOUT_MS = 1_000
AWAY_MAX_S = 120.0
RETRY_INTERVAL_S = 0.5
_REBUILD_LOCK = (0x51CF, 0)


class RebuildRefused(Exception):  # noqa: N818  # reads as what happened
    """The read models cannot be rebuilt as things are; the live ones are as they were. The message says what to do."""


@dataclass(slots=True)
class Progress:
    """How far a rebuild is. `step`: what it does."""

    step: str = "beginning"
    records: int = 0
    records_in_all: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began_s


OnStep = Callable[[Progress], None]
Places = frozenset[tuple[int, int]]
"""Records by partition and offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a rebuild is made from and told to. `records_max`: of one poll, which changes nothing about the result."""

    log: Log
    log_id: str
    database: Database
    on_step: OnStep
    records_max: int = RECORDS_MAX


class Rebuild:
    """One schema being filled; open it with `Rebuild.open`. `retried`: records in quarantine that are to be decoded all
    the same."""

    def __init__(self, sources: Sources, *, schema: str, lock: "RebuildLock", retried: Places) -> None:
        self.schema = schema
        self.log_id = sources.log_id
        self.progress = Progress()
        self._sources = sources
        self._rows = ShadowRows(sources.database, schema=schema)
        self._lock = lock
        self._retried = retried
        self._lanes: dict[int, _Lane] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, sources: Sources, *, schema: str, lock: "RebuildLock", retried: Places = frozenset()
    ) -> AsyncIterator["Rebuild"]:
        """A schema with empty tables, to be filled until the block is left; nobody takes it away again."""
        rebuild = cls(sources, schema=schema, lock=lock, retried=retried)
        await patiently(lambda: _made(sources.database, schema))
        try:
            yield rebuild
        finally:
            for lane in rebuild._lanes.values():
                await lane.close()

    def say(self, step: str) -> None:
        """What is done now."""
        self.progress.step = step
        self._sources.on_step(self.progress)

    def positions(self) -> dict[int, int]:
        """The next offset of each partition that was begun, as the rows hold it."""
        return {number: lane.projection.committed for number, lane in self._lanes.items()}

    async def advance(self, targets: Mapping[int, int]) -> None:
        """Fold every partition up to its target, no further, and write it. Waits a while where Kafka or Postgres is
        away. Raises LogUnavailable or DatabaseUnavailable after that, LogRefused, RebuildRefused.

        It may be cancelled, and called again.
        """
        for number, target in sorted(targets.items()):
            lane = await self._lane(number)
            self.progress.records_in_all += max(0, target - max(lane.projection.lane.next_offset, lane.counted_to))
            lane.counted_to = max(lane.counted_to, target)
        for number, target in sorted(targets.items()):
            await self._lanes[number].advance(target)

    async def _lane(self, number: int) -> "_Lane":
        if number not in self._lanes:
            projection = await patiently(lambda: Projection.open(self._rows, partition=number, log_id=self.log_id))
            lane = _Lane(self, self._sources.log.reader([number]), projection)
            self._lanes[number] = lane
            await patiently(lambda: lane.reader.seek(number, projection.lane.next_offset))
        return self._lanes[number]

    async def reopened(self, number: int) -> Projection:
        """The projection as its rows are: after a commit that Postgres lost when it crashed."""
        return await patiently(lambda: Projection.open(self._rows, partition=number, log_id=self.log_id))

    async def note_quarantined(self, projection: Projection, records: list[StoredRecord]) -> None:
        """Tell the projection which of these records are not to be decoded."""
        number = projection.lane.partition
        found = await self._rows.quarantined(
            number, log_id=self.log_id, first=records[0].offset, last=records[-1].offset
        )
        projection.quarantined = {
            offset: reason for offset, reason in found.items() if (number, offset) not in self._retried
        }

    async def read(self, reader: LogReader, *, limit: int) -> list[StoredRecord]:
        await self._lock.keep()
        return await reader.read(records_max=min(limit, self._sources.records_max), timeout_ms=READ_TIMEOUT_MS)

    async def still_alone(self) -> None:
        """Raises RebuildRefused where Postgres restarted and another rebuild began before this one went on."""
        await patiently(self._lock.keep)

    def folded(self, records: int) -> None:
        self.progress.records += records
        self._sources.on_step(self.progress)


class _Lane:
    """One partition: what was read is folded while what was folded before is written."""

    def __init__(self, rebuild: Rebuild, reader: LogReader, projection: Projection) -> None:
        self.reader = reader
        self.projection = projection
        self.counted_to = 0
        self._rebuild = rebuild
        self._records: list[StoredRecord] = []
        self._flushing: asyncio.Task[list[str]] | None = None

    async def advance(self, target: int) -> None:
        while self.projection.committed < target:
            try:
                while self.projection.lane.next_offset < target:
                    await self._fold_some(target)
                while self.projection.dirty:
                    await self._flushed()
            except (LaneLostError, GenerationChangedError):  # a commit that did not wait for the disk may be lost
                await self._go_back()

    async def close(self) -> None:
        if self._flushing is not None:
            await cancelled(self._flushing)
        await self.reader.close()

    async def _fold_some(self, target: int) -> None:
        """Read and fold a poll, and see that what was folded before is on its way to Postgres."""
        rebuild, projection = self._rebuild, self.projection
        if not self._records:
            limit = target - projection.lane.next_offset
            self._records = await patiently(lambda: rebuild.read(self.reader, limit=limit))
        if not self._records:
            return
        await patiently(lambda: rebuild.note_quarantined(projection, self._records))
        await patiently(lambda: projection.fold(self._records))
        rebuild.folded(len(self._records))
        self._records = []
        if projection.lane.log_id != rebuild.log_id:
            raise RebuildRefused(
                f"partition {projection.lane.partition} belongs to the log {projection.lane.log_id}, not to "
                f"{rebuild.log_id}: the topic was replaced; look with `sluice doctor`"
            )
        if self._unflushed > UNFLUSHED_RECORDS_MAX or projection.cached > CACHED_ROWS_MAX:
            await self._flushed()
        if self._flushing is None or self._flushing.done():
            await self._flushed()
            self._flushing = asyncio.create_task(patiently(projection.flush), name="rebuild.flush")

    @property
    def _unflushed(self) -> int:
        return self.projection.lane.next_offset - self.projection.committed

    async def _flushed(self) -> None:
        """Wait for the flush that is under way; where there is none, flush. Raises what it raised."""
        task = self._flushing or asyncio.create_task(patiently(self.projection.flush), name="rebuild.flush")
        self._flushing = task
        try:
            await asyncio.shield(task)
        finally:
            if task.done():
                self._flushing = None

    async def _go_back(self) -> None:
        """Forget what is in memory and go on from the rows."""
        if self._flushing is not None:
            await cancelled(self._flushing)
        self._flushing, self._records = None, []
        lane = self.projection.lane
        self.projection = await self._rebuild.reopened(lane.partition)
        self._rebuild.folded(self.projection.lane.next_offset - lane.next_offset)
        await patiently(lambda: self.reader.seek(lane.partition, self.projection.lane.next_offset))


class RebuildLock:
    """One rebuild at a time: an advisory lock on a connection of its own, taken again where Postgres restarted."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def taken(cls, database: Database) -> AsyncIterator["RebuildLock"]:
        """Raises RebuildRefused where somebody else holds it, and DatabaseUnavailable."""
        lock = cls(database)
        try:
            await patiently(lock.keep)
            yield lock
        finally:
            if lock._connection is not None:
                await _unlock(lock._connection)

    async def keep(self) -> None:
        """See that it is still ours. Raises RebuildRefused where another one began meanwhile, DatabaseUnavailable."""
        if self._connection is not None and not self._connection.is_closed():
            return
        connection = await self._database.connect()
        try:
            with reaching():
                await _lock(connection)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection


async def _made(database: Database, schema: str) -> None:
    """Empty tables, whatever was there before."""
    async with database.connection() as connection, connection.transaction():
        await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        await connection.execute(script("generation.sql").replace("{generation}", schema))
        await connection.execute(
            f"CREATE TABLE {schema}.{SHADOW_QUARANTINE} (LIKE sluice_ops.quarantine INCLUDING ALL)"
        )


async def _lock(connection: Connection) -> None:
    if await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", *_REBUILD_LOCK):
        return
    holder = await connection.fetchrow(
        "SELECT pid, backend_start FROM pg_locks JOIN pg_stat_activity USING (pid) "
        "WHERE locktype = 'advisory' AND classid = $1 AND granted LIMIT 1",
        _REBUILD_LOCK[0],
    )
    raise RebuildRefused(_held_by(holder))


async def _unlock(connection: Connection) -> None:
    """Give it back now: the end of a connection is noticed a moment later, and the next one may come before."""
    try:
        with reaching():
            await connection.execute("SELECT pg_advisory_unlock($1, $2)", *_REBUILD_LOCK, timeout=2)
    except DatabaseUnavailable:
        pass  # then it is gone with the connection
    finally:
        connection.terminate()


def _held_by(holder: Any) -> str:
    since = f" since {holder['backend_start']:%H:%M:%S} UTC (Postgres process {holder['pid']})" if holder else ""
    return f"another replay or verify works on this database{since}: wait until it has ended, then try again"


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until Kafka and Postgres are there, for AWAY_MAX_S at most; raises what kept it from being done then."""
    deadline = time.monotonic() + AWAY_MAX_S
    while True:
        try:
            return await attempt()
        except (DatabaseUnavailable, LogUnavailable):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY_INTERVAL_S)


async def ends_of(log: Log, partitions: Iterable[int]) -> dict[int, int]:
    """Where the log ends now, patiently."""
    reader = log.reader(list(partitions))
    try:
        return await patiently(reader.ends)
    finally:
        await reader.close()
