"""The read models as a simulated Postgres holds them: generations of tables, of which one is live, and a replay.

The replay is the real one, and so is the rebuild beneath it; in the place of its SQL stand the tables in memory. While
it holds the live positions nobody writes there, and who dies or sleeps holds them no longer. What is switched to must
include all that the rows did that were live before.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schemas.batch import Batch, Lane
from services.database import DatabaseUnavailable, schema_of
from services.processor.lock import IDLE_TIMEOUT_MS
from services.processor.projection import GenerationChangedError
from services.processor.rebuilding import Rebuild, RebuildRefused, patiently
from services.processor.replay import HOLD_MS, Replay
from tests.fakes_rows import Gate, MemoryDatabase, MemoryRows, Tables
from tests.faults.simulation.loop import NODE
from tests.faults.simulation.ports import SimulatedLog
from tests.faults.simulation.world import World

if TYPE_CHECKING:
    from tests.faults.simulation.processes import Process

WRITING = frozenset({"rows.lane", "rows.write"})
"""What waits while the positions are held."""
LOOK_S = 0.01


def gate(world: World, tables: Tables | None = None) -> Gate:
    """What stands around every question to the tables; those of one generation are there until they are dropped."""

    @contextlib.asynccontextmanager
    async def around(name: str) -> AsyncIterator[None]:
        async with world.calling(name, DatabaseUnavailable):
            if tables is world.tables and name in WRITING:
                await _until_free(world)
            if tables is not None and all(tables is not each for each in world.generations.values()):
                raise GenerationChangedError("these tables are gone")
            yield

    return around


class SimulatedDatabase(MemoryDatabase):
    """One process's way to the generation that is live."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._gate = gate(world)

    @property
    def tables(self) -> Tables:  # type: ignore[override]  # another one after each switch
        return self.world.tables

    async def generation(self, *, fresh: bool = False) -> str:
        if fresh:
            async with self._gate("database.generation"):
                return self.world.live
        return self.world.live

    async def migrate(self) -> None:
        """The tables are there."""


class SimulatedRows(MemoryRows):
    """Takes the place of services.processor.rows.Rows: the tables of the generation that was live when it was made."""

    @classmethod
    async def live(cls, database: SimulatedDatabase) -> "SimulatedRows":
        await database.generation(fresh=True)
        return cls(database.tables, gate=gate(database.world, database.tables))

    async def position(self, partition: int) -> int:
        if (found := await super().position(partition)) < 0:
            raise GenerationChangedError("other read models are live")
        return found

    async def idle_batches(self, partition: int, *, before_ms: int) -> list[Batch]:
        found = await super().idle_batches(partition, before_ms=before_ms)
        if self._tables.lanes[partition].next_offset < 0:
            raise GenerationChangedError("other read models are live")
        return found


class SimulatedShadowRows(MemoryRows):
    """Takes the place of services.processor.rows.ShadowRows."""

    def __init__(self, database: SimulatedDatabase, *, schema: str) -> None:
        self._database = database
        self._schema = schema
        self._gate = gate(database.world)

    @property
    def _tables(self) -> Tables:  # type: ignore[override]  # made after this
        return self._database.world.generations[self._schema]


class SimulatedRebuildLock:
    """Takes the place of services.processor.rebuilding.RebuildLock."""

    def __init__(self, world: World) -> None:
        self._world = world

    @classmethod
    @contextlib.asynccontextmanager
    async def taken(cls, database: SimulatedDatabase) -> AsyncIterator["SimulatedRebuildLock"]:
        lock = cls(database.world)
        await patiently(lock.keep)
        yield lock

    async def keep(self) -> None:
        holder = self._world.rebuilder
        if holder is not None and not holder.dead and holder is not NODE.get():
            raise RebuildRefused("another one is at it")
        self._world.rebuilder = NODE.get()


async def made(database: SimulatedDatabase, schema: str) -> None:
    """Takes the place of services.processor.rebuilding._made."""
    async with database.world.calling("replay.make", DatabaseUnavailable):
        database.world.generations[schema] = Tables()


async def drop(database: SimulatedDatabase, schema: str) -> None:
    """Takes the place of services.processor.replay._drop: gone it is, also where that was done before."""
    async with database.world.calling("replay.drop", DatabaseUnavailable):
        assert schema != database.world.live, f"{schema} is live, and was to be dropped"
        database.world.generations.pop(schema, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedReplay(Replay):
    """The real replay, but for the transaction that switches."""

    world: World

    async def _switch(self, rebuild: Rebuild, live: int) -> tuple[int, int]:
        async with asyncio.timeout(HOLD_MS / 1000), self.world.calling("replay.switch", DatabaseUnavailable):
            with _held(self.world) as held:
                await rebuild.advance(await self._needed(rebuild, held))
                await self.world.reach("replay.commit", "before", DatabaseUnavailable)
                if not _is_held(self.world):
                    raise DatabaseUnavailable("idle in a transaction for too long")
                _point_to(self.world, old=schema_of(live), new=rebuild.schema)
        return 0, 0

    async def _schemas(self) -> list[str]:
        async with self.world.calling("replay.schemas", DatabaseUnavailable):
            return list(self.world.generations)

    async def _quarantined(self) -> int:
        return 0


async def replayer(me: "Process") -> None:
    """`sluice replay`, begun again where it was killed, until it is done."""
    world = me.world
    database: Any = SimulatedDatabase(world)
    log: Any = SimulatedLog(world)
    replay = SimulatedReplay(
        log=log,
        log_id=world.log_id,
        database=database,
        on_step=lambda _: None,
        partitions=len(world.brokers),
        records_max=world.choices.choice((1, 5, 1_000)),
        world=world,
    )
    world.tell("replayed", (await replay.run()).generation)
    me.wanted = False


@contextlib.contextmanager
def _held(world: World) -> Iterator[dict[int, tuple[str, int]]]:
    """The live positions, which nobody moves meanwhile."""
    world.positions_held = NODE.get(), world.loop.now_s
    try:
        lanes = {broker.partition: world.lane_of_rows(broker.partition) for broker in world.brokers}
        yield {number: (lane.log_id, lane.next_offset) for number, lane in lanes.items()}
    finally:
        world.positions_held = None


def _is_held(world: World) -> bool:
    if world.positions_held is None:
        return False
    holder, since_s = world.positions_held
    return not holder.dead and world.loop.now_s - since_s <= HOLD_MS / 1000


async def _until_free(world: World) -> None:
    """Wait for who holds the positions, as long as others wait for a lock."""
    deadline_s = world.loop.now_s + IDLE_TIMEOUT_MS / 1000
    while _is_held(world):
        if world.loop.now_s > deadline_s:
            raise DatabaseUnavailable("the positions are held")
        await asyncio.sleep(LOOK_S)


def _point_to(world: World, *, old: str, new: str) -> None:
    """What the transaction does that switches."""
    left, taken = world.generations[old], world.generations[new]
    assert world.live == old, f"{world.live} is live, and {old} was to be left"
    for number, lane in left.lanes.items():
        reached = taken.lanes.get(number, Lane(number)).next_offset
        if reached < lane.next_offset:
            world.violations.append(f"{new} includes {reached} records of partition {number}, {old} {lane.next_offset}")
        lane.next_offset = -1
    world.live, taken.listeners = new, left.listeners
    world.tell("switched", new)
    for listening in list(taken.listeners):
        for number, lane in taken.lanes.items():
            listening.hear(number, lane.next_offset)
