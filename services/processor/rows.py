"""The rows of one generation of the read models: what the projection loads and how it writes, in SQL.

One payload is one transaction: the position moves by compare-and-set first, then the rows, set-based, then whoever
listens is told. A COMMIT whose answer was lost is settled by reading the position again: a payload is written once.
`Rows` are those that are live, as long as they are; `ShadowRows` are being built and nobody reads them. What the rows
mean is not known here; every value came out of `evolve`.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from schemas.batch import Batch, Lane, Upload
from schemas.position import OFFSET_MAX
from services.database import (
    BATCH_COLUMN_NAMES,
    BATCH_COLUMNS,
    BATCH_FIELDS,
    PROJECTED_CHANNEL,
    UPLOAD_COLUMN_NAMES,
    UPLOAD_COLUMNS,
    Database,
    ReadModelsGone,
    batch_from_row,
    load_batches,
    load_lanes,
    upload_from_row,
)
from services.faults import reach
from services.lifecycle import StartError
from services.migrating import missing_tables
from services.observability import RECORDS_QUARANTINED, logger
from services.processor.projection import (
    UNENDED_ROWS_MAX,
    GenerationChangedError,
    LaneLostError,
    Payload,
    Unended,
)

_log = logger("rows")

SHADOW_QUARANTINE = "undecoded"
"""The table in which a schema that is being built notes its part of the quarantine."""

_BATCH_TYPES = {
    "id": "uuid", "user_id": "text", "name": "text", "metadata": "json", "request_key_hash": "text",
    "request_body_hash": "text", "requests": "json", "retries": "json", "status": "text", "sealed": "boolean",
    "error_message": "text", "partition": "integer", "expected_uploads": "integer", "files_max": "integer",
    "queued": "integer", "processing": "integer", "completed": "integer", "failed": "integer", "cancelled": "integer",
}  # fmt: skip
_UPLOAD_TYPES = {
    "id": "uuid", "batch_id": "uuid", "filename": "text", "content_type": "text", "sha256": "text", "blob": "text",
    "key_hash": "text", "body_hash": "text", "status": "text", "error_code": "text", "error_message": "text",
    "result": "json", "attempts": "integer", "attempts_before": "integer", "queueing": "integer",
}  # fmt: skip


class Rows:
    """The read models that are live; the projection's store, see `projection.Store`. Once another generation is live
    every method raises GenerationChangedError at the latest when these tables are gone, and `write` at once."""

    def __init__(self, database: Database, *, generation: str) -> None:
        self.generation = generation
        self._database = database
        self._left_at: dict[int, int] = {}
        live = f"SELECT 1 FROM sluice_ops.live_generation WHERE number = {int(generation.removeprefix('gen_'))}"  # noqa: S608  # ours
        self._statements = _statements(generation, move_if=f"EXISTS ({live})", quarantine="sluice_ops.quarantine")

    @classmethod
    async def live(cls, database: Database) -> "Rows":
        """Those of the generation that is live now; raises DatabaseUnavailable."""
        return cls(database, generation=await database.generation(fresh=True))

    async def lane(self, partition: int, *, log_id: str) -> Lane:
        """Where the rows of a partition stand; one that nobody projected yet begins at offset 0."""
        async with self._connection() as connection:
            made = await connection.execute(
                f"INSERT INTO {self.generation}.positions (partition, log_id, next_offset, epoch, time_ms) "  # noqa: S608  # ours
                "VALUES ($1, $2, 0, NULL, 0) ON CONFLICT DO NOTHING",
                partition,
                log_id,
            )
            if made == "INSERT 0 1" and await connection.fetchval(_rows_left(self.generation), partition):
                await connection.execute(f"DELETE FROM {self.generation}.positions WHERE partition = $1", partition)  # noqa: S608  # ours
                raise StartError(
                    f"the read models have rows of partition {partition}, but nothing says which position they stand "
                    "for: make them anew with `sluice replay`"
                )
            lane = (await load_lanes(connection, self.generation))[partition]
        self._left_at[partition] = lane.next_offset
        return lane

    async def position(self, partition: int) -> int:
        """The next offset the rows of a partition stand for."""
        async with self._connection() as connection:
            return await self._position(connection, partition, at_least=self._left_at.get(partition, 0))

    async def batches(self, ids: Sequence[str]) -> dict[str, Batch]:
        """The batches of these ids that exist, the deleted ones too."""
        async with self._connection() as connection:
            return await load_batches(connection, self.generation, ids)

    async def uploads(self, ids: Iterable[str]) -> dict[str, Upload]:
        """The uploads of these ids that exist."""
        async with self._connection() as connection:
            rows = await connection.fetch(
                f"SELECT {UPLOAD_COLUMNS} FROM {self.generation}.uploads WHERE id = ANY($1)",  # noqa: S608  # ours
                list(ids),
            )
        return {row["id"]: upload_from_row(row) for row in rows}

    async def unended(self, partition: int, *, rows_max: int = UNENDED_ROWS_MAX) -> AsyncGenerator[Unended]:
        """What the lane has to work on, all as of one moment, in pages of so many rows at most. However much waits, a
        page takes a moment only: the time limit of a statement is one of a page."""
        statements = self._statements
        async with self._connection() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            async for rows in _pages(connection, statements.starts, partition, rows_max=rows_max):
                yield Unended(starts={row["user_id"]: row["last_started_offset"] for row in rows})
            async for rows in _pages(connection, statements.unended_batches, partition, rows_max=rows_max):
                yield Unended(batches=[batch_from_row(row) for row in rows])
            async for rows in _pages(connection, statements.unended_uploads, partition, rows_max=rows_max):
                yield Unended(uploads=[upload_from_row(row) for row in rows])

    async def idle_batches(self, partition: int, *, before_ms: int) -> list[Batch]:
        """Open batches into which nothing was queued since `before_ms`."""
        generation = self.generation
        async with self._connection() as connection:
            await self._check_whole(connection)
            await self._position(connection, partition, at_least=self._left_at.get(partition, 0))
            ids = await connection.fetch(
                f"SELECT id FROM {generation}.upload_batches WHERE partition = $1 AND NOT sealed "  # noqa: S608  # ours
                "AND status IN ('pending', 'processing') AND last_queued_ms < $2 LIMIT 100",
                partition,
                before_ms,
            )
            return list((await load_batches(connection, generation, [row["id"] for row in ids])).values())

    async def write(self, payload: Payload) -> list[str]:
        """Write it and move the position; returns the ids of uploads that are gone now.

        Raises DatabaseUnavailable (the same payload may be written again), LaneLostError, GenerationChangedError.
        """
        async with self._connection() as connection:
            async with connection.transaction():
                written = await self._move_position(connection, payload)
                if written:
                    await self._write_rows(connection, payload)
                    await self._tell(connection, payload)
                    reach("processor.in_commit")
            if not written:
                await self._settle(connection, payload)
        self._left_at[payload.lane.partition] = payload.lane.next_offset
        for offset, _time_ms, reason in payload.quarantined:
            self._say_quarantined(payload.lane.partition, offset, reason)
        return payload.removed

    async def quarantined(self, partition: int, *, log_id: str, first: int, last: int = OFFSET_MAX) -> dict[int, str]:
        """The records between two offsets that are in quarantine, and why: whatever this version makes of them, they
        say nothing until they are retried."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT record_offset, reason FROM sluice_ops.quarantine "
                "WHERE log_id = $1 AND partition = $2 AND record_offset BETWEEN $3 AND $4",
                log_id,
                partition,
                first,
                last,
            )
        return {row["record_offset"]: row["reason"] for row in rows}

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            async with self._database.connection() as connection:
                yield connection
        except ReadModelsGone as gone:
            await self._make_anew(gone)

    async def _make_anew(self, gone: ReadModelsGone) -> NoReturn:
        """These tables are gone: since others are live, or because somebody dropped them, and then they are made."""
        with contextlib.suppress(ReadModelsGone):  # not even that is known any more
            await self._check_live()
        await self._database.migrate()
        raise GenerationChangedError("the read models were gone, and are made anew from the log") from gone

    async def _check_live(self) -> None:
        if (live := await self._database.generation(fresh=True)) != self.generation:
            raise GenerationChangedError(
                f"the read models were rebuilt: {live} is live, and no longer {self.generation}"
            )

    async def _tell(self, connection: Any, payload: Payload) -> None:
        lane = payload.lane
        await connection.execute("SELECT pg_notify($1, $2)", PROJECTED_CHANNEL, f"{lane.partition} {lane.next_offset}")

    def _say_quarantined(self, partition: int, offset: int, reason: str) -> None:
        RECORDS_QUARANTINED.inc()
        _log.warning("record_quarantined", partition=partition, offset=offset, reason=reason)

    async def _move_position(self, connection: Any, payload: Payload) -> bool:
        lane = payload.lane
        moved = await connection.execute(
            self._statements.move, lane.partition, payload.from_offset, lane.next_offset, lane.epoch, lane.time_ms
        )
        return bool(moved == "UPDATE 1")

    async def _settle(self, connection: Any, payload: Payload) -> None:
        """The position was not where it should be: was this payload committed before, or is somebody else at it?"""
        await self._check_live()
        found = await self._position(connection, payload.lane.partition, at_least=payload.from_offset)
        if found == payload.lane.next_offset:
            _log.info("commit_settled", next_offset=found)
            return
        raise LaneLostError(
            f"the position of partition {payload.lane.partition} is {found}, not {payload.from_offset}: another "
            "processor writes this lane; this process stops, a new one begins there"
        )

    async def _check_whole(self, connection: Any) -> None:
        """Raises ReadModelsGone where one of the tables is not there."""
        if missing := await missing_tables(connection):
            raise ReadModelsGone(f"of the read models {', '.join(missing)} are gone from Postgres")

    async def _position(self, connection: Any, partition: int, *, at_least: int) -> int:
        """Where the rows stand; raises GenerationChangedError where somebody put older ones in their place, or none."""
        lanes = await load_lanes(connection, self.generation)
        found = lanes.get(partition, Lane(partition)).next_offset
        if found < at_least:
            await self._check_live()
            raise GenerationChangedError(
                f"the read models include {found} records of partition {partition}, and included {at_least} before: "
                "an older state was put in their place, from which the log leads on"
            )
        return found

    async def _write_rows(self, connection: Any, payload: Payload) -> None:
        statements = self._statements
        if users := _users(payload):
            await connection.execute(statements.users, users)
        if payload.batches:
            await connection.execute(statements.batches, *_columns(payload.batches))
        if payload.uploads:
            await connection.execute(statements.uploads, *_columns(payload.uploads))
        for batch_id, at_ms, offset in payload.cancelled:
            await connection.execute(statements.cancel, batch_id, at_ms, offset)
        for batch in payload.deleted:
            gone = await connection.fetch(statements.delete_uploads, batch.id)
            payload.removed.extend(row["id"] for row in gone)
            await connection.execute(statements.delete_batch, batch.id)
            await connection.execute(statements.tombstone, *_tombstone(batch))
        if payload.events:
            await connection.execute(statements.events, payload.lane.partition, *_columns(payload.events))
        if payload.quarantined:
            await connection.execute(
                statements.quarantine, payload.lane.log_id, payload.lane.partition, *_columns(payload.quarantined)
            )
        if payload.user_starts:
            starts = sorted(payload.user_starts.items())
            await connection.execute(statements.user_starts, payload.lane.partition, *_columns(starts))


class ShadowRows(Rows):
    """Rows of a schema that is being built beside the live ones: nobody is told of them, what cannot be decoded is
    noted in the schema itself, and nothing waits for the disk (who switches to them does)."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self.generation = schema
        self._database = database
        self._left_at = {}
        self._statements = _statements(schema, move_if="true", quarantine=f"{schema}.{SHADOW_QUARANTINE}")

    async def _move_position(self, connection: Any, payload: Payload) -> bool:
        await connection.execute("SET LOCAL synchronous_commit = off")
        return await super()._move_position(connection, payload)

    async def _check_live(self) -> None:
        """It never was."""

    async def _make_anew(self, gone: ReadModelsGone) -> NoReturn:
        raise StartError(f"somebody took {self.generation} away while it was being built: begin again") from gone

    async def _tell(self, connection: Any, payload: Payload) -> None:
        """Nobody listens."""

    def _say_quarantined(self, partition: int, offset: int, reason: str) -> None:
        """It is no news."""


async def _pages(connection: Any, query: str, partition: int, *, rows_max: int) -> AsyncGenerator[list[Any]]:
    """The rows of a query, inside a transaction; the server keeps them until they are asked for."""
    cursor = await connection.cursor(query, partition)
    while rows := await cursor.fetch(rows_max):
        yield rows


def _rows_left(generation: str) -> str:
    """Whether any row of a partition is there."""
    tables = ("batch_events", "upload_batches", "deleted_batches", "user_starts")
    left = (f"EXISTS (SELECT 1 FROM {generation}.{table} WHERE partition = $1)" for table in tables)  # noqa: S608  # ours
    return f"SELECT {' OR '.join(left)}"


@dataclass(frozen=True, slots=True)
class _Statements:
    move: str
    users: str
    batches: str
    uploads: str
    cancel: str
    delete_uploads: str
    delete_batch: str
    tombstone: str
    events: str
    quarantine: str
    user_starts: str
    starts: str
    unended_batches: str
    unended_uploads: str


def _statements(generation: str, *, move_if: str, quarantine: str) -> _Statements:
    """The projection's SQL for one generation; names are ours, values are always arguments."""
    return _Statements(
        move=f"""
            UPDATE {generation}.positions SET next_offset = $3, epoch = $4, time_ms = $5
            WHERE partition = $1 AND next_offset = $2 AND {move_if}
            """,  # noqa: S608  # see above
        users=f"INSERT INTO {generation}.users (id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING",
        batches=_upsert(f"{generation}.upload_batches", BATCH_COLUMN_NAMES, _BATCH_TYPES),
        uploads=_upsert(f"{generation}.uploads", UPLOAD_COLUMN_NAMES, _UPLOAD_TYPES),
        cancel=f"""
            UPDATE {generation}.uploads SET status = 'cancelled', updated_ms = $2, completed_ms = $2, last_offset = $3
            WHERE batch_id = $1 AND status IN ('queued', 'processing')
            """,  # noqa: S608
        delete_uploads=f"DELETE FROM {generation}.uploads WHERE batch_id = $1 RETURNING id",  # noqa: S608
        delete_batch=f"DELETE FROM {generation}.upload_batches WHERE id = $1",  # noqa: S608
        tombstone=f"""
            INSERT INTO {generation}.deleted_batches (
                id, partition, user_id, request_key_hash, request_body_hash,
                created_ms, created_offset, deleted_ms, deleted_offset
            ) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
            """,  # noqa: S608
        events=f"""
            INSERT INTO {generation}.batch_events (partition, record_offset, batch_id, time_ms, ignored)
            SELECT $1, * FROM unnest($2::bigint[], $3::uuid[], $4::bigint[], $5::text[])
            """,  # noqa: S608
        quarantine=f"""
            INSERT INTO {quarantine} (log_id, partition, record_offset, time_ms, reason)
            SELECT $1, $2, * FROM unnest($3::bigint[], $4::bigint[], $5::text[]) ON CONFLICT DO NOTHING
            """,  # noqa: S608
        user_starts=f"""
            INSERT INTO {generation}.user_starts (partition, user_id, last_started_offset)
            SELECT $1, * FROM unnest($2::text[], $3::bigint[])
            ON CONFLICT (partition, user_id) DO UPDATE SET last_started_offset = excluded.last_started_offset
            """,  # noqa: S608
        starts=f"SELECT user_id, last_started_offset FROM {generation}.user_starts WHERE partition = $1",  # noqa: S608
        unended_batches=f"""
            SELECT {BATCH_COLUMNS} FROM {generation}.upload_batches
            WHERE partition = $1 AND status IN ('pending', 'processing')
            """,  # noqa: S608
        unended_uploads=f"""
            SELECT {UPLOAD_COLUMNS} FROM {generation}.uploads
            WHERE status IN ('queued', 'processing') AND batch_id IN (
                SELECT id FROM {generation}.upload_batches
                WHERE partition = $1 AND status IN ('pending', 'processing')
            )
            """,  # noqa: S608
    )


def _upsert(table: str, columns: Sequence[str], types: dict[str, str]) -> str:
    arrays = ", ".join(f"${n}::{types.get(column, 'bigint')}[]" for n, column in enumerate(columns, start=1))
    updates = ", ".join(f"{column} = excluded.{column}" for column in columns if column != "id")
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({arrays}) "  # noqa: S608  # names are ours
        f"ON CONFLICT (id) DO UPDATE SET {updates}"
    )


def _users(payload: Payload) -> list[str]:
    """Who made batches, one that was deleted in the same payload too: rows do not tell where payloads ended."""
    made = {row[BATCH_FIELDS.index("user_id")] for row in payload.batches}
    return sorted(made | {batch.user_id for batch in payload.deleted})


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _tombstone(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.id,
        batch.partition,
        batch.user_id,
        batch.request_key_hash,
        batch.request_body_hash,
        batch.created_ms,
        batch.created_offset,
        batch.updated_ms,
        batch.offset,
    )
