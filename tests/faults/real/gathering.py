"""What the log and Postgres hold at the end of a run, read without the services: raw records, rows, tables as text, and
the tables of replays from zero into databases of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import urlsplit

import asyncpg

from schemas.batch import Batch
from schemas.records import StoredRecord
from services.database import (
    UPLOAD_COLUMNS,
    Database,
    load_batches,
    load_lanes,
    prepare_connection,
    upload_from_row,
)
from services.eventlog import EventLog, LogUnavailable
from services.processor.projection import Projection
from services.processor.rows import Rows as LiveRows
from services.processor.verifying import Verification
from tests.faults.checking import Rows

READ_TIMEOUT_S = 30.0


async def records_of(log: EventLog, partitions: Sequence[int] = (0,)) -> list[StoredRecord]:
    """Every record of these partitions as it lies in Kafka, one partition after the other."""
    ends = await ends_of(log, partitions)
    return [record for partition in partitions for record in await _records_to(log, partition, ends[partition])]


async def _records_to(log: EventLog, partition: int, end: int) -> list[StoredRecord]:
    reader = log.reader([partition])
    records: list[StoredRecord] = []
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            await reader.seek(partition, 0)
            while len(records) < end:
                records += await reader.read(records_max=5_000, timeout_ms=500)
    finally:
        await reader.close()
    return records


async def ends_of(log: EventLog, partitions: Sequence[int]) -> dict[int, int]:
    """Where the log ends; Kafka is given time to come back."""
    reader = log.reader(partitions)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            while True:
                with contextlib.suppress(LogUnavailable):
                    return await reader.ends()
                await asyncio.sleep(0.2)
    finally:
        await reader.close()


async def rows_of(database_url: str) -> Rows:
    """The live read models, whole."""
    connection = await asyncpg.connect(database_url)
    try:
        await prepare_connection(connection)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            generation = f"gen_{await connection.fetchval('SELECT number FROM sluice_ops.live_generation')}"
            return Rows(
                lanes=await load_lanes(connection, generation),
                batches=await _batches(connection, generation),
                uploads={
                    row["id"]: upload_from_row(row)
                    for row in await connection.fetch(f"SELECT {UPLOAD_COLUMNS} FROM {generation}.uploads")
                },
                verdicts={
                    (row["partition"], row["record_offset"]): row["ignored"]
                    for row in await connection.fetch(
                        f"SELECT partition, record_offset, ignored FROM {generation}.batch_events"
                    )
                },
                quarantined=[
                    (row["partition"], row["record_offset"])
                    for row in await connection.fetch("SELECT partition, record_offset FROM sluice_ops.quarantine")
                ],
                tables=await _tables(connection, generation),
            )
    finally:
        await connection.close()


async def _batches(connection: asyncpg.Connection, generation: str) -> dict[str, Batch]:
    rows = await connection.fetch(
        f"SELECT id FROM {generation}.upload_batches UNION ALL SELECT id FROM {generation}.deleted_batches"
    )
    return await load_batches(connection, generation, [row["id"] for row in rows])


async def _tables(connection: asyncpg.Connection, generation: str) -> dict[str, list[str]]:
    """Every table of a generation, and the quarantine, as Postgres shows them: their bytes."""
    names = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", generation)
    places = {row["tablename"]: f"{generation}.{row['tablename']}" for row in names}
    places["quarantine"] = "sluice_ops.quarantine"
    return {
        name: [row["text"] for row in await connection.fetch(f"SELECT t::text AS text FROM {place} AS t ORDER BY 1")]
        for name, place in places.items()
    }


async def verified(log: EventLog, database_url: str, *, log_id: str, chance: random.Random) -> dict[str, list[str]]:
    """What `sluice verify` finds, reading few records at once."""
    records_max = chance.randint(1, 50)
    database = await Database.open(database_url)
    try:
        verification = Verification(
            log=log, log_id=log_id, database=database, on_step=lambda _progress: None, records_max=records_max
        )
        found = await verification.run()
    finally:
        await database.close()
    differing = [f"{table} differ in {rows} rows" for table, rows in found.differing.items()]
    return {f"polls of {records_max}": [*differing, *map(str, found.shown)]}


async def replayed(
    database_url: str, records: Sequence[StoredRecord], *, log_id: str, chance: random.Random
) -> dict[str, dict[str, list[str]]]:
    """The tables of a replay whose polls and transactions are of any sizes."""
    async with _database_beside(database_url, "replayed") as url:
        await _replay(url, records, log_id=log_id, chance=chance)
        return {"polls of any size": (await rows_of(url)).tables}


async def _replay(url: str, records: Sequence[StoredRecord], *, log_id: str, chance: random.Random) -> None:
    """The lanes take turns as it comes."""
    left: dict[int, list[StoredRecord]] = defaultdict(list)
    for record in records:
        left[record.partition].append(record)
    database = await Database.open(url)
    try:
        await database.migrate()
        projections = {
            partition: await Projection.open(await LiveRows.live(database), partition=partition, log_id=log_id)
            for partition in left
        }
        while left:
            partition = chance.choice(list(left))
            size = chance.choice((1, 1, 2, 10, 300))
            await projections[partition].fold(left[partition][:size])
            left[partition] = left[partition][size:]
            if not left[partition]:
                del left[partition]
            if chance.random() < 0.5:
                await projections[partition].flush()
        for projection in projections.values():
            while projection.dirty:
                await projection.flush()
    finally:
        await database.close()


@contextlib.asynccontextmanager
async def _database_beside(database_url: str, name: str) -> AsyncIterator[str]:
    """An empty database on the same server."""
    parts = urlsplit(database_url)
    beside = f"{parts.path.strip('/')}_{name}"
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(f"CREATE DATABASE {beside}")
        yield parts._replace(path=f"/{beside}").geturl()
        await connection.execute(f"DROP DATABASE {beside} WITH (FORCE)")
    finally:
        await connection.close()


async def unworked(connection: asyncpg.Connection, log: EventLog, partitions: Sequence[int]) -> bool:
    """Whether anything waits, is due, or is not in the read models yet."""
    left = await connection.fetchval(
        "SELECT count(*) FROM public.upload_batches WHERE status IN ('pending', 'processing') AND "
        "(sealed OR id IN (SELECT batch_id FROM public.uploads WHERE status IN ('queued', 'processing')))"
    )
    return bool(left) or not await includes(connection, await ends_of(log, partitions))


async def includes(connection: asyncpg.Connection, ends: Mapping[int, int]) -> bool:
    """Whether the read models include the log up to here, of every partition."""
    found = await next_offsets_of(connection)
    return all(found.get(partition, 0) >= end for partition, end in ends.items())


async def next_offsets_of(connection: asyncpg.Connection) -> dict[int, int]:
    """Where the read models stand."""
    rows = await connection.fetch("SELECT partition, next_offset FROM public.positions")
    return {row["partition"]: row["next_offset"] for row in rows}
