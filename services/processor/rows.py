"""The rows of one generation of the read models: what the projection loads and how it writes, in SQL.

One payload is one transaction: the position moves by compare-and-set first, then the rows, set-based, then whoever
listens is told. A COMMIT whose answer was lost is settled by reading the position again: a payload is written once.
What the rows mean is not known here; every value came out of `evolve`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.batch import Batch, Lane, Upload
from services.database import (
    BATCH_COLUMN_NAMES,
    BATCH_FIELDS,
    PROJECTED_CHANNEL,
    UPLOAD_COLUMN_NAMES,
    UPLOAD_COLUMNS,
    Database,
    load_batches,
    load_lanes,
    upload_from_row,
)
from services.observability import logger
from services.processor.projection import LaneLostError, Payload

_log = logger("rows")

_BATCH_TYPES = {
    "id": "uuid", "user_id": "text", "name": "text", "metadata": "json", "request_key_hash": "text",
    "request_body_hash": "text", "requests": "json", "status": "text", "sealed": "boolean", "error_message": "text",
    "partition": "integer", "expected_uploads": "integer", "files_max": "integer", "queued": "integer",
    "processing": "integer", "completed": "integer", "failed": "integer", "cancelled": "integer",
}  # fmt: skip
_UPLOAD_TYPES = {
    "id": "uuid", "batch_id": "uuid", "filename": "text", "content_type": "text", "sha256": "text", "blob": "text",
    "key_hash": "text", "body_hash": "text", "status": "text", "error_code": "text", "error_message": "text",
    "result": "json", "attempts": "integer", "attempts_before": "integer", "queueing": "integer",
}  # fmt: skip


class Rows:
    """The read models of one generation; the projection's store, see `projection.Store`."""

    def __init__(self, database: Database, *, generation: str) -> None:
        self.generation = generation
        self._database = database
        self._statements = _statements(generation)

    @classmethod
    async def live(cls, database: Database) -> "Rows":
        """Those of the generation that is live now; raises DatabaseUnavailable."""
        return cls(database, generation=await database.generation(fresh=True))

    async def lane(self, partition: int, *, log_id: str) -> Lane:
        """Where the rows of a partition stand; one that nobody projected yet begins at offset 0."""
        async with self._database.connection() as connection:
            await connection.execute(
                f"INSERT INTO {self.generation}.positions (partition, log_id, next_offset, epoch, time_ms) "  # noqa: S608  # ours
                "VALUES ($1, $2, 0, NULL, 0) ON CONFLICT DO NOTHING",
                partition,
                log_id,
            )
            return (await load_lanes(connection, self.generation))[partition]

    async def batches(self, ids: Sequence[str]) -> dict[str, Batch]:
        """The batches of these ids that exist, the deleted ones too."""
        async with self._database.connection() as connection:
            return await load_batches(connection, self.generation, ids)

    async def uploads(self, ids: Iterable[str]) -> dict[str, Upload]:
        """The uploads of these ids that exist."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"SELECT {UPLOAD_COLUMNS} FROM {self.generation}.uploads WHERE id = ANY($1)",  # noqa: S608  # ours
                list(ids),
            )
        return {row["id"]: upload_from_row(row) for row in rows}

    async def unended(self, partition: int) -> tuple[list[Batch], list[Upload], dict[str, int]]:
        """What the lane has to work on: unended batches, their queued and processing uploads, and each user's last
        start."""
        generation = self.generation
        async with self._database.connection() as connection:
            ids = await connection.fetch(
                f"SELECT id FROM {generation}.upload_batches "  # noqa: S608  # names are ours
                "WHERE partition = $1 AND status IN ('pending', 'processing')",
                partition,
            )
            batches = await load_batches(connection, generation, [row["id"] for row in ids])
            rows = await connection.fetch(
                f"SELECT {UPLOAD_COLUMNS} FROM {generation}.uploads "  # noqa: S608  # names are ours
                "WHERE batch_id = ANY($1) AND status IN ('queued', 'processing')",
                list(batches),
            )
            starts = await connection.fetch(
                f"SELECT user_id, last_started_offset FROM {generation}.user_starts WHERE partition = $1",  # noqa: S608  # ours
                partition,
            )
        uploads = [upload_from_row(row) for row in rows]
        return list(batches.values()), uploads, {row["user_id"]: row["last_started_offset"] for row in starts}

    async def idle_batches(self, partition: int, *, before_ms: int) -> list[Batch]:
        """Open batches into which nothing was queued since `before_ms`."""
        generation = self.generation
        async with self._database.connection() as connection:
            ids = await connection.fetch(
                f"SELECT id FROM {generation}.upload_batches WHERE partition = $1 AND NOT sealed "  # noqa: S608  # ours
                "AND status IN ('pending', 'processing') AND last_queued_ms < $2 LIMIT 100",
                partition,
                before_ms,
            )
            return list((await load_batches(connection, generation, [row["id"] for row in ids])).values())

    async def write(self, payload: Payload) -> list[str]:
        """Write it and move the position; returns the ids of uploads that are gone now.

        Raises DatabaseUnavailable (the same payload may be written again), LaneLostError.
        """
        async with self._database.connection() as connection:
            async with connection.transaction():
                if await self._move_position(connection, payload):
                    await self._write_rows(connection, payload)
                    await connection.execute(
                        "SELECT pg_notify($1, $2)",
                        PROJECTED_CHANNEL,
                        f"{payload.lane.partition} {payload.lane.next_offset}",
                    )
                    return payload.removed
            await self._settle(connection, payload)
        return payload.removed

    async def _move_position(self, connection: Any, payload: Payload) -> bool:
        lane = payload.lane
        moved = await connection.execute(
            self._statements.move, lane.partition, payload.from_offset, lane.next_offset, lane.epoch, lane.time_ms
        )
        return bool(moved == "UPDATE 1")

    async def _settle(self, connection: Any, payload: Payload) -> None:
        """The position was not where it should be: was this payload committed before, or is somebody else at it?"""
        lanes = await load_lanes(connection, await self._database.generation(fresh=True))
        found = lanes.get(payload.lane.partition, Lane(payload.lane.partition)).next_offset
        if found == payload.lane.next_offset and await self._database.generation() == self.generation:
            _log.info("commit_settled", next_offset=found)
            return
        raise LaneLostError(
            f"the position of partition {payload.lane.partition} is {found}, not {payload.from_offset}: another "
            "processor writes this lane, or the read models were replaced; this process stops, a new one begins there"
        )

    async def _write_rows(self, connection: Any, payload: Payload) -> None:
        statements = self._statements
        if payload.batches:
            users = sorted({row[BATCH_FIELDS.index("user_id")] for row in payload.batches})
            await connection.execute(statements.users, users)
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


def _statements(generation: str) -> _Statements:
    """The projection's SQL for one generation; names are ours, values are always arguments."""
    number = int(generation.removeprefix("gen_"))
    return _Statements(
        move=f"""
            UPDATE {generation}.positions SET next_offset = $3, epoch = $4, time_ms = $5
            WHERE partition = $1 AND next_offset = $2
            AND EXISTS (SELECT 1 FROM sluice_ops.live_generation WHERE number = {number})
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
        quarantine="""
            INSERT INTO sluice_ops.quarantine (log_id, partition, record_offset, time_ms, reason)
            SELECT $1, $2, * FROM unnest($3::bigint[], $4::bigint[], $5::text[]) ON CONFLICT DO NOTHING
            """,
        user_starts=f"""
            INSERT INTO {generation}.user_starts (partition, user_id, last_started_offset)
            SELECT $1, * FROM unnest($2::text[], $3::bigint[])
            ON CONFLICT (partition, user_id) DO UPDATE SET last_started_offset = excluded.last_started_offset
            """,  # noqa: S608
    )


def _upsert(table: str, columns: Sequence[str], types: dict[str, str]) -> str:
    arrays = ", ".join(f"${n}::{types.get(column, 'bigint')}[]" for n, column in enumerate(columns, start=1))
    updates = ", ".join(f"{column} = excluded.{column}" for column in columns if column != "id")
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({arrays}) "  # noqa: S608  # names are ours
        f"ON CONFLICT (id) DO UPDATE SET {updates}"
    )


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
