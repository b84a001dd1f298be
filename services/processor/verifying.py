"""Verify: the read models rebuilt from the log into a schema of its own, and compared with the live ones row by row.

Both are compared as of the same position in a live system: the rebuilt rows follow the live positions, the last step
while these are held for a moment, in which a snapshot is taken that sees both. The comparison then takes its time in
that snapshot and holds up nobody. Rows are compared as Postgres writes them, so that nothing is equal that is not the
same bytes. The result does not depend on how many records are read at once.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from schemas.position import Position
from services.database import Connection, reaching
from services.migrating import tables
from services.processor.rebuilding import VERIFICATION_SCHEMA as SCHEMA
from services.processor.rebuilding import (
    Rebuild,
    RebuildLock,
    RebuildRefused,
    Sources,
    ends_of,
    patiently,
)
from services.processor.replay import (
    HOLD_MS,
    NOT_NOW,
    SWITCH_ATTEMPTS_MAX,
    SWITCH_PAUSE_S,
    astray_views,
    dropped,
    hold_positions,
)
from services.processor.rows import SHADOW_QUARANTINE

SHOWN_MAX = 100
COMPARE_TIMEOUT_S = 4 * 3600.0
NEARLY_RECORDS = 500


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that is not what the log says. `column` is None where a whole row is missing on one side; values are as
    Postgres writes them."""

    table: str
    key: str
    column: str | None
    live: str | None
    rebuilt: str | None


@dataclass(slots=True)
class Verified:
    """What a verification found. `rows`: how many were compared, by table; `differing`: how many rows differ, by table;
    `shown`: the first of the differences."""

    generation: str
    next_offsets: dict[int, int]
    records: int = 0
    seconds: float = 0.0
    rows: dict[str, int] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)
    shown: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differing


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification(Sources):
    """One verification of the live read models against the log they are of."""

    async def run(self) -> Verified:
        """Rebuild and compare. Raises RebuildRefused, LogRefused, and DatabaseUnavailable or LogUnavailable where one
        of them stays away."""
        async with RebuildLock.taken(self.database) as lock:
            try:
                async with Rebuild.open(self, schema=SCHEMA, lock=lock) as rebuild:
                    found = await self._compared(rebuild)
            finally:
                await dropped(self.database, SCHEMA)
        found.records, found.seconds = rebuild.progress.records, rebuild.progress.seconds
        return found

    async def _compared(self, rebuild: Rebuild) -> Verified:
        rebuild.say("folding the log")
        await self._follow(rebuild)
        async with self._snapshot(rebuild) as (connection, generation):
            found = Verified(generation, rebuild.positions())
            for table in tables():
                rebuild.say(f"comparing {table}")
                await _compare(connection, found, table)
            rebuild.say("comparing the views")
            await _compare_views(connection, found)
            rebuild.say("comparing the quarantine")
            await _compare_quarantine(connection, found, self.log_id)
        return found

    async def _follow(self, rebuild: Rebuild) -> None:
        """Fold to where the live rows are, again until that is near: never further than they are."""
        while True:
            targets = await self._live_positions()
            positions = rebuild.positions()
            behind = sum(next_offset - positions.get(number, 0) for number, next_offset in targets.items())
            await rebuild.advance(targets)
            if behind <= NEARLY_RECORDS:
                return

    async def _live_positions(self) -> dict[int, int]:
        lanes = await patiently(self.database.positions)
        ends = await ends_of(self.log, lanes) if lanes else {}
        for number, lane in lanes.items():
            if lane.log_id != self.log_id:
                raise RebuildRefused(
                    f"the read models are of the log {Position.of(lane.log_id, {}).log}, and Kafka holds the log "
                    f"{Position.of(self.log_id, {}).log}: rebuild them from it with `sluice replay`"
                )
            if lane.next_offset > ends[number]:
                raise RebuildRefused(
                    f"the read models include {lane.next_offset} records of partition {number}, and the log holds "
                    f"{ends[number]}: bring it back with `sluice log import`, or rebuild the read models from the log "
                    "as it is with `sluice replay`"
                )
        return {number: lane.next_offset for number, lane in lanes.items()}

    @contextlib.asynccontextmanager
    async def _snapshot(self, rebuild: Rebuild) -> AsyncIterator[tuple[Connection, str]]:
        """A connection in a transaction that sees live and rebuilt rows at equal positions, and the live schema."""
        problem = ""
        for attempt in range(SWITCH_ATTEMPTS_MAX):
            connection = await patiently(self.database.connect)
            try:
                try:
                    generation = await self._begin_equal(connection, rebuild)
                except NOT_NOW as error:
                    problem = str(error) or f"it took longer than {HOLD_MS} ms"
                else:
                    yield connection, generation
                    return
            finally:
                connection.terminate()
            await asyncio.sleep(SWITCH_PAUSE_S * min(attempt + 1, 10))
            await self._follow(rebuild)
        raise RebuildRefused(
            f"the rebuilt rows did not reach the live ones in {SWITCH_ATTEMPTS_MAX} attempts ({problem}): try again "
            "when less is written"
        )

    async def _begin_equal(self, reading: Connection, rebuild: Rebuild) -> str:
        """Begin the transaction that is read in, while the live positions are held and the rebuilt ones are equal."""
        generation = await self.database.generation(fresh=True)
        holding = await self.database.connect(
            lock_timeout=str(HOLD_MS), idle_in_transaction_session_timeout=str(HOLD_MS)
        )
        try:
            async with asyncio.timeout(HOLD_MS / 1000):
                with reaching():
                    await holding.execute("BEGIN")
                    held = await hold_positions(holding, generation, [], self.log_id)
                    await rebuild.advance({number: next_offset for number, (_, next_offset) in held.items()})
                    await reading.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    await reading.execute(f"SELECT next_offset FROM {generation}.positions")  # noqa: S608  # ours
        finally:
            holding.terminate()
        return generation


async def _compare(connection: Connection, found: Verified, table: str) -> None:
    """Count the rows of a table that differ, and tell the first of them."""
    columns = await _columns(connection, found.generation, table)
    keys = await _keys(connection, found.generation, table)
    live, rebuilt = f"{found.generation}.{table}", f"{SCHEMA}.{table}"
    with reaching():
        found.rows[table] = await connection.fetchval(f"SELECT count(*) FROM {live}", timeout=COMPARE_TIMEOUT_S)  # noqa: S608  # ours
        rows = await connection.fetch(
            f"SELECT count(*) OVER () AS differing, {_texts('live', keys)} AS live_key, "  # noqa: S608  # ours
            f"{_texts('rebuilt', keys)} AS rebuilt_key, {_texts('live', columns)} AS live_row, "
            f"{_texts('rebuilt', columns)} AS rebuilt_row "
            f"FROM {live} AS live FULL JOIN {rebuilt} AS rebuilt USING ({', '.join(keys)}) "
            "WHERE live::text IS DISTINCT FROM rebuilt::text "
            f"ORDER BY {', '.join(keys)} LIMIT {SHOWN_MAX}",
            timeout=COMPARE_TIMEOUT_S,
        )
    if rows:
        found.differing[table] = rows[0]["differing"]
    for row in rows:
        _tell(found, table, columns, row)


def _tell(found: Verified, table: str, columns: list[str], row: Any) -> None:
    live, rebuilt = row["live_row"], row["rebuilt_row"]
    here, there = (
        any(each is not None for each in row["live_key"]),
        any(each is not None for each in row["rebuilt_key"]),
    )
    key = ", ".join(row["live_key"] if here else row["rebuilt_key"])
    if not (here and there):
        whole = ", ".join(f"{name}={value}" for name, value in zip(columns, live if here else rebuilt, strict=True))
        found.shown.append(Difference(table, key, None, whole if here else None, None if here else whole))
    else:
        found.shown += [
            Difference(table, key, name, one, other)
            for name, one, other in zip(columns, live, rebuilt, strict=True)
            if one != other
        ]
    del found.shown[SHOWN_MAX:]


async def _compare_views(connection: Connection, found: Verified) -> None:
    """What others query must be the live rows, not those of a generation that was."""
    with reaching():
        astray = await astray_views(connection, found.generation)
    if astray:
        found.differing["views"] = len(astray)
    found.shown += [
        Difference("views", f"public.{name}", None if shown is None else "shows", shown, f"{found.generation}.{name}")
        for name, shown in astray.items()
    ]
    del found.shown[SHOWN_MAX:]


async def _compare_quarantine(connection: Connection, found: Verified, log_id: str) -> None:
    """What could not be decoded must stand in quarantine, up to the same position, and nothing else."""
    with reaching():
        rows = await connection.fetch(
            "SELECT coalesce(live.partition, rebuilt.partition) || '-' || "  # noqa: S608  # ours
            "coalesce(live.record_offset, rebuilt.record_offset) AS place, "
            "live.reason AS live, rebuilt.reason AS rebuilt "
            "FROM (SELECT * FROM sluice_ops.quarantine WHERE log_id = $1) AS live "
            f"FULL JOIN {SCHEMA}.{SHADOW_QUARANTINE} AS rebuilt USING (partition, record_offset) "
            "WHERE live.reason IS NULL OR rebuilt.reason IS NULL ORDER BY 1",
            log_id,
        )
    if rows:
        found.differing["quarantine"] = len(rows)
    found.shown += [Difference("quarantine", row["place"], None, row["live"], row["rebuilt"]) for row in rows]
    del found.shown[SHOWN_MAX:]


async def _columns(connection: Connection, generation: str, table: str) -> list[str]:
    with reaching():
        rows = await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped "
            "ORDER BY attnum",
            f"{generation}.{table}",
        )
    return [row["attname"] for row in rows]


async def _keys(connection: Connection, generation: str, table: str) -> list[str]:
    with reaching():
        rows = await connection.fetch(
            "SELECT attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey) "
            "WHERE indrelid = to_regclass($1) AND indisprimary ORDER BY attnum",
            f"{generation}.{table}",
        )
    return [row["attname"] for row in rows]


def _texts(side: str, columns: list[str]) -> str:
    return f"ARRAY[{', '.join(f'{side}.{column}::text' for column in columns)}]"
