"""The projection: facts folded into the rows of the read models, the position in the same transaction.

`fold` loads the rows a poll touches, folds in memory and remembers what changed; `flush` writes all of it and moves the
position by compare-and-set, so a position never claims more or less than the rows hold. Folding runs ahead of
flushing. A flush whose COMMIT got no answer is settled by reading the position again: the same payload is written
once. Rows are cached only as long as that is true of them; everything SQL stores came out of `evolve`.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, cancel_swept, evolve, step
from schemas.events import Fact, Undecodable, UploadStarted, decode
from schemas.records import StoredRecord
from services.database import (
    BATCH_COLUMN_NAMES,
    BATCH_FIELDS,
    PROJECTED_CHANNEL,
    UPLOAD_COLUMN_NAMES,
    UPLOAD_COLUMNS,
    UPLOAD_FIELDS,
    Database,
    load_batches,
    load_lanes,
    upload_from_row,
)
from services.lifecycle import StartError
from services.observability import COMMIT_SECONDS, FACTS_FOLDED, PROJECTED_OFFSET, RECORDS_QUARANTINED, logger

_log = logger("projection")

CACHED_ROWS_MAX = 50_000
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


class LaneLostError(StartError):
    """Somebody else moves this lane's position: this process must stop, its memory is worth nothing."""


@dataclass(frozen=True, slots=True)
class Projected:
    """One fact after it was folded; batch and upload are live states of the projection."""

    fact: Fact
    outcome: Changed | Ignored
    batch: Batch | None
    upload: Upload | None


@dataclass(slots=True)
class _Payload:
    """What one transaction writes; the position goes from `lane.next_offset` of the one before to this one's."""

    from_offset: int
    lane: Lane
    batches: list[tuple[Any, ...]] = field(default_factory=list)
    uploads: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[int, str, int, str | None]] = field(default_factory=list)
    quarantined: list[tuple[int, int, str]] = field(default_factory=list)
    user_starts: dict[str, int] = field(default_factory=dict)
    cancelled: list[tuple[str, int, int]] = field(default_factory=list)
    deleted: list[Batch] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


class Projection:
    """One lane's rows. `lane` is where folding stands, `committed` the next offset Postgres holds."""

    def __init__(self, database: Database, *, lane: Lane, generation: str) -> None:
        self.lane = lane
        self.committed = lane.next_offset
        self._database = database
        self._generation = generation
        self._statements = _statements(generation)
        self._rows = asyncio.Lock()
        self._batches: dict[str, Batch | None] = {}
        self._uploads: dict[str, Upload | None] = {}
        self._dirty_batches: dict[str, Batch] = {}
        self._dirty_uploads: dict[str, Upload] = {}
        self._next = _Payload(lane.next_offset, lane)
        self._in_flight: _Payload | None = None
        self.folded = asyncio.Event()

    @classmethod
    async def open(cls, database: Database, *, partition: int, log_id: str) -> "Projection":
        """The projection as Postgres holds it; a lane nobody projected yet begins at offset 0."""
        generation = await database.generation(fresh=True)
        async with database.connection() as connection:
            await connection.execute(
                f"INSERT INTO {generation}.positions (partition, log_id, next_offset, epoch, time_ms) "  # noqa: S608  # ours
                "VALUES ($1, $2, 0, NULL, 0) ON CONFLICT DO NOTHING",
                partition,
                log_id,
            )
            lane = (await load_lanes(connection, generation))[partition]
        return cls(database, lane=lane, generation=generation)

    @property
    def dirty(self) -> bool:
        """Whether anything was folded that Postgres does not hold yet; `folded` is set whenever there is more."""
        return self.committed < self.lane.next_offset

    async def fold(self, records: Sequence[StoredRecord]) -> list[Projected]:
        """Fold the next records, in order. Raises DatabaseUnavailable before anything was folded."""
        decoded = [decode(record) for record in records]
        async with self._rows:
            await self._load([fact for fact in decoded if isinstance(fact, Fact)])
            folded = [projected for fact in decoded if (projected := self._fold_one(fact)) is not None]
        if records:
            self.folded.set()
        return folded

    async def upload(self, upload_id: str) -> Upload | None:
        """The upload as folded so far."""
        async with self._rows:
            await self._load_uploads([upload_id])
            return self._uploads[upload_id]

    async def batch(self, batch_id: str) -> Batch | None:
        """The batch as folded so far; a deleted one has `deleted` set."""
        async with self._rows:
            await self._load_batches([batch_id])
            return self._batches[batch_id]

    async def unended(self) -> tuple[list[Batch], list[Upload], dict[str, int]]:
        """What the lane has to work on: unended batches, their queued and processing uploads, and each user's last
        start. Everything folded must have been flushed."""
        assert not self.dirty
        generation = self._generation
        async with self._database.connection() as connection:
            ids = await connection.fetch(
                f"SELECT id FROM {generation}.upload_batches "  # noqa: S608  # names are ours
                "WHERE partition = $1 AND status IN ('pending', 'processing')",
                self.lane.partition,
            )
            batches = await load_batches(connection, generation, [row["id"] for row in ids])
            rows = await connection.fetch(
                f"SELECT {UPLOAD_COLUMNS} FROM {generation}.uploads "  # noqa: S608  # names are ours
                "WHERE batch_id = ANY($1) AND status IN ('queued', 'processing')",
                list(batches),
            )
            starts = await connection.fetch(
                f"SELECT user_id, last_started_offset FROM {generation}.user_starts WHERE partition = $1",  # noqa: S608  # ours
                self.lane.partition,
            )
        uploads = [upload_from_row(row) for row in rows]
        return list(batches.values()), uploads, {row["user_id"]: row["last_started_offset"] for row in starts}

    async def idle_batches(self, before_ms: int) -> list[Batch]:
        """Open batches into which nothing was queued since `before_ms`."""
        generation = self._generation
        async with self._database.connection() as connection:
            ids = await connection.fetch(
                f"SELECT id FROM {generation}.upload_batches WHERE partition = $1 AND NOT sealed "  # noqa: S608  # ours
                "AND status IN ('pending', 'processing') AND last_queued_ms < $2 LIMIT 100",
                self.lane.partition,
                before_ms,
            )
            return list((await load_batches(connection, generation, [row["id"] for row in ids])).values())

    def _fold_one(self, fact: Fact | Undecodable) -> Projected | None:
        step(self.lane, fact.offset, fact.timestamp_ms)
        if isinstance(fact, Undecodable):
            self._next.quarantined.append((fact.offset, self.lane.time_ms, fact.reason))
            RECORDS_QUARANTINED.inc()
            _log.warning("record_quarantined", partition=fact.partition, offset=fact.offset, reason=fact.reason)
            return None
        batch_id, upload_id = fact.batch_id, fact.upload_id
        batch = self._batches.get(batch_id) if batch_id else None
        upload = self._uploads.get(upload_id) if upload_id else None
        outcome = evolve(self.lane, batch, upload, fact)
        if isinstance(outcome, Changed):
            batch, upload = outcome.batch, outcome.upload
            self._remember(fact, outcome)
        if batch_id:
            reason = None if isinstance(outcome, Changed) else str(outcome)
            self._next.events.append((fact.offset, batch_id, self.lane.time_ms, reason))
        FACTS_FOLDED.labels("effective" if isinstance(outcome, Changed) else "ignored").inc()
        return Projected(fact, outcome, batch, upload)

    def _remember(self, fact: Fact, changed: Changed) -> None:
        batch, upload = changed.batch, changed.upload
        if batch is None:
            return
        self._batches[batch.id] = self._dirty_batches[batch.id] = batch
        if upload is not None:
            self._uploads[upload.id] = self._dirty_uploads[upload.id] = upload
        if isinstance(fact.event, UploadStarted):
            self._next.user_starts[batch.user_id] = fact.offset
        if changed.swept == "cancelled":
            self._next.cancelled.append((batch.id, self.lane.time_ms, fact.offset))
            for each in self._of(batch.id):
                if cancel_swept(each, at_ms=self.lane.time_ms, offset=fact.offset):
                    self._dirty_uploads[each.id] = each
        elif changed.swept == "deleted":
            self._next.deleted.append(batch)
            for each in self._of(batch.id):
                self._uploads[each.id] = None
                self._dirty_uploads.pop(each.id, None)
                self._next.removed.append(each.id)

    def _of(self, batch_id: str) -> list[Upload]:
        return [upload for upload in self._uploads.values() if upload is not None and upload.batch_id == batch_id]

    # Rows

    async def _load(self, facts: Sequence[Fact]) -> None:
        self._drop_clean()
        await self._load_batches({fact.batch_id for fact in facts if fact.batch_id})
        await self._load_uploads({fact.upload_id for fact in facts if fact.upload_id})

    async def _load_batches(self, ids: Iterable[str]) -> None:
        missing = [batch_id for batch_id in ids if batch_id not in self._batches]
        if missing:
            async with self._database.connection() as connection:
                found = await load_batches(connection, self._generation, missing)
            self._batches.update({batch_id: found.get(batch_id) for batch_id in missing})

    async def _load_uploads(self, ids: Iterable[str]) -> None:
        missing = [upload_id for upload_id in ids if upload_id not in self._uploads]
        if missing:
            async with self._database.connection() as connection:
                rows = await connection.fetch(
                    f"SELECT {UPLOAD_COLUMNS} FROM {self._generation}.uploads WHERE id = ANY($1)",  # noqa: S608  # ours
                    missing,
                )
            found = {row["id"]: upload_from_row(row) for row in rows}
            await self._load_batches({upload.batch_id for upload in found.values()})
            for upload in found.values():
                self._sweep_loaded(upload)
            self._uploads.update({upload_id: found.get(upload_id) for upload_id in missing})

    def _sweep_loaded(self, upload: Upload) -> None:
        """A row read before its batch's cancellation was flushed: the fold knows better than the row."""
        batch = self._batches.get(upload.batch_id)
        if batch is not None and batch.status == "cancelled" and batch.completed_ms is not None:
            cancel_swept(upload, at_ms=batch.completed_ms, offset=batch.offset)

    def _drop_clean(self) -> None:
        if self._in_flight is not None or len(self._uploads) + len(self._batches) <= CACHED_ROWS_MAX:
            return
        self._uploads = dict(self._dirty_uploads)
        self._batches = dict(self._dirty_batches)

    # Writing

    async def flush(self) -> list[str]:
        """Write what was folded, if anything; returns the ids of uploads that are gone from Postgres now.

        Raises DatabaseUnavailable (call it again), LaneLostError.
        """
        if self._in_flight is None:
            if not self.dirty:
                return []
            self._in_flight = self._cut()
        payload = self._in_flight
        with COMMIT_SECONDS.time():
            await self._write(payload)
        self._in_flight = None
        self.committed = payload.lane.next_offset
        PROJECTED_OFFSET.labels(self.lane.partition).set(self.committed)
        return payload.removed

    def _cut(self) -> _Payload:
        """Take what is to be written as plain values, so that folding may go on while it is."""
        payload = self._next
        lane = self.lane
        payload.lane = Lane(lane.partition, lane.log_id, lane.next_offset, lane.epoch, lane.time_ms)
        payload.batches = [
            tuple(getattr(batch, name) for name in BATCH_FIELDS)
            for batch in self._dirty_batches.values()
            if not batch.deleted
        ]
        payload.uploads = [
            tuple(getattr(upload, name) for name in UPLOAD_FIELDS) for upload in self._dirty_uploads.values()
        ]
        self._dirty_batches, self._dirty_uploads = {}, {}
        self._next = _Payload(lane.next_offset, lane)
        return payload

    async def _write(self, payload: _Payload) -> None:
        async with self._database.connection() as connection:
            async with connection.transaction():
                if await self._move_position(connection, payload):
                    await self._write_rows(connection, payload)
                    await connection.execute(
                        "SELECT pg_notify($1, $2)",
                        PROJECTED_CHANNEL,
                        f"{payload.lane.partition} {payload.lane.next_offset}",
                    )
                    return
            await self._settle(connection, payload)

    async def _move_position(self, connection: Any, payload: _Payload) -> bool:
        lane = payload.lane
        moved = await connection.execute(
            self._statements.move, lane.partition, payload.from_offset, lane.next_offset, lane.epoch, lane.time_ms
        )
        return bool(moved == "UPDATE 1")

    async def _settle(self, connection: Any, payload: _Payload) -> None:
        """The position was not where it should be: was this payload committed before, or is somebody else at it?"""
        lanes = await load_lanes(connection, await self._database.generation(fresh=True))
        found = lanes.get(self.lane.partition, Lane(self.lane.partition)).next_offset
        if found == payload.lane.next_offset and await self._database.generation() == self._generation:
            _log.info("commit_settled", next_offset=found)
            return
        raise LaneLostError(
            f"the position of partition {self.lane.partition} is {found}, not {payload.from_offset}: another processor "
            "writes this lane, or the read models were replaced; this process stops, a new one begins from there"
        )

    async def _write_rows(self, connection: Any, payload: _Payload) -> None:
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
