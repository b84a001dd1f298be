"""Replay: the read models rebuilt from the log beside the live ones, and then switched to, while everybody goes on.

The next generation is filled up to the log's end. Then one transaction takes the position rows of the live one in
partition order, so that nobody writes there any more, sees that the new rows include at least as much, moves the
pointer, the public views and the quarantine, and makes the old positions useless to whoever still waits for them. It
holds them never longer than half of what others wait for a lock; what does not fit is tried again. Until it commits the
live generation is as it was; a schema that a crash left behind is taken away by the next replay.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from services.database import PROJECTED_CHANNEL, Database, DatabaseUnavailable, reaching, schema_of
from services.eventlog import LogUnavailable
from services.migrating import script, views
from services.processor.lock import IDLE_TIMEOUT_MS
from services.processor.rebuilding import (
    VERIFICATION_SCHEMA,
    Places,
    Rebuild,
    RebuildLock,
    RebuildRefused,
    Sources,
    ends_of,
    patiently,
)
from services.processor.rows import SHADOW_QUARANTINE

HOLD_MS = IDLE_TIMEOUT_MS // 2
"""How long the live position rows may be held: half of the `lock_timeout` others have."""
SWITCH_ATTEMPTS_MAX = 40
SWITCH_PAUSE_S = 0.25
DROP_ATTEMPTS_MAX = 20
DROP_WAIT_MS = 500
DROP_TIMEOUT_S = 60.0
NEARLY_RECORDS = 2_000
"""So few records behind the log's end, the rest is folded while the live positions are held."""
NOT_NOW: tuple[type[Exception], ...] = (
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    TimeoutError,
    DatabaseUnavailable,
    LogUnavailable,
)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did. `next_offsets`: of the new generation when it became live; `held_ms`: for how long nobody
    could write the live one; `quarantined`: records that say nothing; `old_dropped`: whether the old one is gone."""

    generation: str
    next_offsets: dict[int, int]
    records: int
    seconds: float
    held_ms: int
    quarantined: int
    old_dropped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Sources):
    """One replay of a log of so many partitions. `retried`: records in quarantine that are to count from now on, where
    they can be decoded."""

    partitions: int
    retried: Places = frozenset()

    async def run(self) -> Replayed:
        """Rebuild and switch. Raises RebuildRefused, LogRefused, and DatabaseUnavailable or LogUnavailable where one of
        them stays away; the live generation is as it was then."""
        await patiently(self.database.migrate)
        async with RebuildLock.taken(self.database) as lock:
            live = await self._live_number()
            await self._drop_left_over(live)
            schema = schema_of(live + 1)
            async with Rebuild.open(self, schema=schema, lock=lock, retried=self.retried) as rebuild:
                await self._fill(rebuild)
                held_ms, quarantined = await self._switched(rebuild, live)
            rebuild.say("dropping the old generation")
            old_dropped = await dropped(self.database, schema_of(live))
        return Replayed(
            generation=schema,
            next_offsets=rebuild.positions(),
            records=rebuild.progress.records,
            seconds=rebuild.progress.seconds,
            held_ms=held_ms,
            quarantined=quarantined,
            old_dropped=old_dropped,
        )

    async def _fill(self, rebuild: Rebuild) -> None:
        """Fold to where the log ends, again until that is near."""
        rebuild.say("folding the log")
        while True:
            ends = await ends_of(self.log, range(self.partitions))
            positions = rebuild.positions()
            behind = sum(end - positions.get(number, 0) for number, end in ends.items())
            await rebuild.advance(ends)
            if behind <= NEARLY_RECORDS:
                return
            rebuild.say("catching up")

    # Switching

    async def _switched(self, rebuild: Rebuild, live: int) -> tuple[int, int]:
        """Switch, as often as it takes; for how long it held the live positions, and how much is in quarantine."""
        problem = ""
        for attempt in range(SWITCH_ATTEMPTS_MAX):
            rebuild.say("switching")
            await rebuild.still_alone()
            try:
                return await self._switch(rebuild, live)
            except NOT_NOW as error:
                problem = str(error) or f"it took longer than {HOLD_MS} ms"
            if await self._live_number() == live + 1:  # only the answer to its COMMIT was lost
                return HOLD_MS, await patiently(self._quarantined)
            await asyncio.sleep(SWITCH_PAUSE_S * min(attempt + 1, 10))
            await self._fill(rebuild)
        raise RebuildRefused(
            f"{rebuild.schema} is built, but could not be made live in {SWITCH_ATTEMPTS_MAX} attempts ({problem}): is "
            "somebody reading the public views in a long transaction? End that, then run `sluice replay` again"
        )

    async def _switch(self, rebuild: Rebuild, live: int) -> tuple[int, int]:
        """One attempt, within HOLD_MS. Raises NOT_NOW where it does not fit."""
        connection = await self.database.connect(
            lock_timeout=str(HOLD_MS), idle_in_transaction_session_timeout=str(HOLD_MS)
        )
        try:
            async with asyncio.timeout(HOLD_MS / 1000):
                with reaching():
                    async with connection.transaction():
                        began_s = time.monotonic()
                        held = await hold_positions(connection, schema_of(live), range(self.partitions), self.log_id)
                        await rebuild.advance(await self._needed(rebuild, held))
                        quarantined = await self._point_to(connection, rebuild, live)
        finally:
            connection.terminate()
        return round((time.monotonic() - began_s) * 1000), quarantined

    async def _needed(self, rebuild: Rebuild, held: Mapping[int, tuple[str, int]]) -> dict[int, int]:
        """How far the new rows must reach to include what the live ones do. Live rows of another log, or of an end of
        this one that was lost, are what a replay recovers from."""
        positions = rebuild.positions()
        behind = {
            number: next_offset
            for number, (log_id, next_offset) in held.items()
            if log_id == self.log_id and number in positions and next_offset > positions[number]
        }
        if not behind:
            return {}
        ends = await ends_of(self.log, range(self.partitions))
        return {number: min(next_offset, ends[number]) for number, next_offset in behind.items()}

    async def _point_to(self, connection: Any, rebuild: Rebuild, live: int) -> int:
        """Make the new generation the live one, in the transaction at hand; returns how much is in quarantine now."""
        old, new = schema_of(live), rebuild.schema
        rows = await connection.fetch(f"SELECT partition, next_offset FROM {new}.positions")  # noqa: S608  # ours
        if {row["partition"]: row["next_offset"] for row in rows} != rebuild.positions():
            raise RebuildRefused(f"somebody else wrote {new}: run `sluice replay` again")
        # Who waits for these rows meanwhile must find that they are no longer where they were.
        await connection.execute(f"UPDATE {old}.positions SET next_offset = -1")  # noqa: S608  # ours
        moved = await connection.execute(
            "UPDATE sluice_ops.live_generation SET number = $1 WHERE number = $2", live + 1, live
        )
        if moved != "UPDATE 1":
            raise RebuildRefused(f"{old} is no longer the live generation: run `sluice replay` again")
        await point_views(connection, new)
        await connection.execute("DELETE FROM sluice_ops.quarantine WHERE log_id = $1", self.log_id)
        await connection.execute(f"INSERT INTO sluice_ops.quarantine SELECT * FROM {new}.{SHADOW_QUARANTINE}")  # noqa: S608  # ours
        quarantined: int = await connection.fetchval(f"SELECT count(*) FROM {new}.{SHADOW_QUARANTINE}")  # noqa: S608  # ours
        await connection.execute(f"DROP TABLE {new}.{SHADOW_QUARANTINE}")
        for number, next_offset in rebuild.positions().items():
            await connection.execute("SELECT pg_notify($1, $2)", PROJECTED_CHANNEL, f"{number} {next_offset}")
        return quarantined

    async def _schemas(self) -> list[str]:
        async with self.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT nspname FROM pg_namespace WHERE nspname ~ '^gen_[0-9]+$' OR nspname = $1", VERIFICATION_SCHEMA
            )
        return [row["nspname"] for row in rows]

    async def _live_number(self) -> int:
        return int((await patiently(lambda: self.database.generation(fresh=True))).removeprefix("gen_"))

    async def _quarantined(self) -> int:
        async with self.database.connection() as connection:
            count = "SELECT count(*) FROM sluice_ops.quarantine WHERE log_id = $1"
            return int(await connection.fetchval(count, self.log_id))

    # Taking away

    async def _drop_left_over(self, live: int) -> None:
        """What a replay or a verify left behind that ended in its middle."""
        for schema in sorted(set(await patiently(self._schemas)) - {schema_of(live)}):
            if not await dropped(self.database, schema):
                raise RebuildRefused(
                    f"{schema}, left over from an earlier run, is in use: end what reads it, then try again"
                )


async def hold_positions(
    connection: Any, generation: str, partitions: Iterable[int], log_id: str
) -> dict[int, tuple[str, int]]:
    """Lock the position rows of a generation in partition order until the transaction ends; partition → log id and next
    offset. A partition that nobody projected yet gets a row, so that nobody can begin one meanwhile."""
    await connection.execute(
        f"INSERT INTO {generation}.positions (partition, log_id, next_offset, epoch, time_ms) "  # noqa: S608  # ours
        "SELECT number, $2, 0, NULL, 0 FROM unnest($1::integer[]) AS number ORDER BY number ON CONFLICT DO NOTHING",
        list(partitions),
        log_id,
    )
    rows = await connection.fetch(
        f"SELECT partition, log_id, next_offset FROM {generation}.positions ORDER BY partition FOR UPDATE"  # noqa: S608  # ours
    )
    return {row["partition"]: (row["log_id"], row["next_offset"]) for row in rows}


async def astray_views(connection: Any, generation: str) -> dict[str, str | None]:
    """The public views that do not show this generation, and what each shows instead; None where there is no such."""
    shown = views()
    rows = await connection.fetch(
        "SELECT name, to_regclass('public.' || name) IS NULL AS missing, (SELECT "
        "string_agg(DISTINCT table_of.relnamespace::regnamespace::text || '.' || table_of.relname, ', ') "
        "FROM pg_rewrite JOIN pg_depend ON classid = 'pg_rewrite'::regclass AND objid = pg_rewrite.oid "
        "AND refclassid = 'pg_class'::regclass AND refobjid <> ev_class JOIN pg_class AS table_of "
        "ON table_of.oid = refobjid WHERE ev_class = to_regclass('public.' || name)) AS shows "
        "FROM unnest($1::text[]) AS name ORDER BY name",
        list(shown),
    )
    return {
        row["name"]: None if row["missing"] else row["shows"] or "no table"
        for row in rows
        if row["shows"] != f"{generation}.{shown[row['name']]}"
    }


async def point_views(connection: Any, generation: str) -> None:
    """Let the public views show this generation; whoever may read them still may. Raises RebuildRefused where one of
    their names is something else's."""
    try:
        await connection.execute(script("views.sql").replace("{generation}", generation))
    except (asyncpg.InvalidTableDefinitionError, asyncpg.WrongObjectTypeError) as error:
        raise RebuildRefused(
            f"what has the name of a view in schema public is not the view that Sluice made ({error}): rename or drop "
            "it, then try again"
        ) from error


async def mended_views(database: Database) -> list[str]:
    """Let the public views show the live generation where they do not; what was changed. Raises RebuildRefused,
    DatabaseUnavailable."""
    async with database.connection() as connection, connection.transaction():
        if not await connection.fetchval("SELECT to_regclass('sluice_ops.live_generation') IS NOT NULL"):
            return []
        # Held, so that no replay switches meanwhile.
        number = await connection.fetchval("SELECT number FROM sluice_ops.live_generation FOR SHARE")
        live = schema_of(number)
        astray = await astray_views(connection, live)
        if astray:
            await point_views(connection, live)
    return [f"public.{name} showed {shown or 'nothing'}, and shows {live} now" for name, shown in astray.items()]


async def dropped(database: Database, schema: str) -> bool:
    """Whether it could be dropped: those who read it are let finish, and must not wait for us either."""
    for attempt in range(DROP_ATTEMPTS_MAX):
        with contextlib.suppress(*NOT_NOW):
            await _drop(database, schema)
            return True
        await asyncio.sleep(SWITCH_PAUSE_S * min(attempt + 1, 8))
    return False


async def _drop(database: Database, schema: str) -> None:
    connection = await database.connect(lock_timeout=str(DROP_WAIT_MS))
    try:
        with reaching():
            await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE", timeout=DROP_TIMEOUT_S)
    finally:
        connection.terminate()
