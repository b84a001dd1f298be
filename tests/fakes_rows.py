"""The read models in memory: what services.processor.rows writes and services.database and the api's queries read.

One `Tables` is what a database and its disk are. `MemoryRows` is the projection's store on it, `MemoryDatabase` what a
tail and the api's `Reading` ask; each is one process's way there. `gate` stands around every question and every
transaction, where a test makes them fail before or after. tests/contract/test_rows.py runs one suite on this and on
Postgres.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from schemas.batch import Batch, Lane, Upload
from schemas.ids import partition_of
from services.api.queries import Page, uploads_among
from services.database import BATCH_FIELDS, UPLOAD_FIELDS, Snapshot
from services.processor.projection import (
    UNENDED_ROWS_MAX,
    GenerationChangedError,
    LaneLostError,
    Payload,
    Unended,
)

T = TypeVar("T")
Gate = Callable[[str], AbstractAsyncContextManager[Any]]

_STATUS = UPLOAD_FIELDS.index("status")
_BATCH_OF_UPLOAD = UPLOAD_FIELDS.index("batch_id")
_USER = BATCH_FIELDS.index("user_id")
_SWEPT = ("status", "updated_ms", "completed_ms", "offset")
_SWEPT_AT = tuple(UPLOAD_FIELDS.index(name) for name in _SWEPT)


@contextlib.asynccontextmanager
async def open_gate(_name: str) -> AsyncIterator[None]:
    """Nothing fails."""
    yield


@dataclass
class Tables:
    """Rows by primary key, as tuples in the order of the fields. `listeners` are told of each commit, `moves` lists how
    each transaction moved a position: partition, from, to."""

    lanes: dict[int, Lane] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    batches: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    uploads: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    deleted: dict[str, Batch] = field(default_factory=dict)
    events: dict[tuple[int, int], tuple[str, int, str | None]] = field(default_factory=dict)
    quarantine: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)
    user_starts: dict[tuple[int, str], int] = field(default_factory=dict)
    listeners: list["Listening"] = field(default_factory=list)
    moves: list[tuple[int, int, int]] = field(default_factory=list)

    def batch(self, batch_id: str) -> Batch | None:
        row = self.batches.get(batch_id)
        return self.deleted.get(batch_id) if row is None else Batch(**dict(zip(BATCH_FIELDS, row, strict=True)))

    def upload(self, upload_id: str) -> Upload | None:
        row = self.uploads.get(upload_id)
        return None if row is None else Upload(**dict(zip(UPLOAD_FIELDS, row, strict=True)))

    def uploads_of(self, batch_id: str) -> dict[str, Upload]:
        """In the order they were queued."""
        ids = [row[0] for row in self.uploads.values() if row[_BATCH_OF_UPLOAD] == batch_id]
        found = [upload for each in ids if (upload := self.upload(each)) is not None]
        return {upload.id: upload for upload in sorted(found, key=lambda upload: upload.created_offset)}

    def content(self) -> dict[str, Any]:
        """Every row, comparable with that of other tables."""
        return {
            "positions": {
                p: (lane.log_id, lane.next_offset, lane.epoch, lane.time_ms) for p, lane in self.lanes.items()
            },
            "users": sorted(self.users),
            "batches": {key: dict(zip(BATCH_FIELDS, row, strict=True)) for key, row in self.batches.items()},
            "uploads": {key: dict(zip(UPLOAD_FIELDS, row, strict=True)) for key, row in self.uploads.items()},
            "deleted": {key: _tombstone(batch) for key, batch in self.deleted.items()},
            "events": self.events,
            "quarantine": self.quarantine,
            "user_starts": self.user_starts,
        }

    def commit(self, payload: Payload) -> None:
        """What the transaction does to the rows, the position included."""
        lane = payload.lane
        self.moves.append((lane.partition, payload.from_offset, lane.next_offset))
        self.lanes[lane.partition] = Lane(lane.partition, lane.log_id, lane.next_offset, lane.epoch, lane.time_ms)
        self.write_rows(payload)
        for listening in list(self.listeners):
            listening.hear(lane.partition, lane.next_offset)

    def write_rows(self, payload: Payload) -> None:
        self.users.update(row[_USER] for row in payload.batches)
        self.users.update(batch.user_id for batch in payload.deleted)
        self.batches.update({row[0]: row for row in payload.batches})
        for row in payload.uploads:
            self.uploads[row[0]] = row
        for batch_id, at_ms, offset in payload.cancelled:
            self._cancel(batch_id, at_ms, offset)
        for batch in payload.deleted:
            self._delete(batch, payload)
        self._write_index(payload)

    def _write_index(self, payload: Payload) -> None:
        partition = payload.lane.partition
        for offset, batch_id, time_ms, ignored in payload.events:
            assert (partition, offset) not in self.events, f"the fact at {partition}-{offset} is indexed already"
            self.events[partition, offset] = (batch_id, time_ms, ignored)
        for offset, time_ms, reason in payload.quarantined:
            self.quarantine.setdefault((partition, offset), (time_ms, reason))
        for user_id, offset in payload.user_starts.items():
            self.user_starts[partition, user_id] = offset

    def _cancel(self, batch_id: str, at_ms: int, offset: int) -> None:
        for key, row in self.uploads.items():
            if row[_BATCH_OF_UPLOAD] == batch_id and row[_STATUS] in ("queued", "processing"):
                swept = list(row)
                for place, value in zip(_SWEPT_AT, ("cancelled", at_ms, at_ms, offset), strict=True):
                    swept[place] = value
                self.uploads[key] = tuple(swept)

    def _delete(self, batch: Batch, payload: Payload) -> None:
        gone = [key for key, row in self.uploads.items() if row[_BATCH_OF_UPLOAD] == batch.id]
        for key in gone:
            del self.uploads[key]
        payload.removed.extend(gone)
        self.batches.pop(batch.id, None)
        assert batch.id not in self.deleted, f"batch {batch.id} is deleted already"
        self.deleted[batch.id] = _buried(batch)


class Listening:
    """A connection that listens for commits; `terminate` ends it."""

    def __init__(self, tables: Tables, hear: Callable[[int, int], None]) -> None:
        self._tables = tables
        self.hear = hear
        tables.listeners.append(self)

    def terminate(self) -> None:
        with contextlib.suppress(ValueError):
            self._tables.listeners.remove(self)

    async def close(self) -> None:
        self.terminate()


class MemoryRows:
    """The projection's store, see `projection.Store`."""

    def __init__(self, tables: Tables, *, gate: Gate = open_gate) -> None:
        self._tables = tables
        self._gate = gate

    async def lane(self, partition: int, *, log_id: str) -> Lane:
        async with self._gate("rows.lane"):
            lane = self._tables.lanes.setdefault(partition, Lane(partition, log_id))
            return Lane(partition, lane.log_id, lane.next_offset, lane.epoch, lane.time_ms)

    async def position(self, partition: int) -> int:
        async with self._gate("rows.position"):
            return self._tables.lanes.get(partition, Lane(partition)).next_offset

    async def batches(self, ids: Sequence[str]) -> dict[str, Batch]:
        async with self._gate("rows.batches"):
            return {each: batch for each in ids if (batch := self._tables.batch(each)) is not None}

    async def uploads(self, ids: Iterable[str]) -> dict[str, Upload]:
        async with self._gate("rows.uploads"):
            return {each: upload for each in ids if (upload := self._tables.upload(each)) is not None}

    async def unended(self, partition: int, *, rows_max: int = UNENDED_ROWS_MAX) -> AsyncGenerator[Unended]:
        async with self._gate("rows.unended"):
            pages = list(self._unended(partition, rows_max))
        for number, page in enumerate(pages):
            if number:
                async with self._gate("rows.unended"):
                    pass
            yield page

    def _unended(self, partition: int, rows_max: int) -> Iterator[Unended]:
        starts = [(user, at) for (number, user), at in self._tables.user_starts.items() if number == partition]
        batches = [batch for batch in self._of(partition) if not batch.ended]
        ids = {batch.id for batch in batches}
        rows = [row for row in self._tables.uploads.values() if row[_BATCH_OF_UPLOAD] in ids]
        waiting = [row for row in rows if row[_STATUS] in ("queued", "processing")]
        uploads = [Upload(**dict(zip(UPLOAD_FIELDS, row, strict=True))) for row in waiting]
        yield from (Unended(starts=dict(page)) for page in _pages(starts, rows_max))
        yield from (Unended(batches=page) for page in _pages(batches, rows_max))
        yield from (Unended(uploads=page) for page in _pages(uploads, rows_max))

    async def idle_batches(self, partition: int, *, before_ms: int) -> list[Batch]:
        async with self._gate("rows.idle"):
            return [
                batch
                for batch in self._of(partition)
                if not batch.sealed and not batch.ended and batch.last_queued_ms < before_ms
            ]

    async def quarantined(
        self,
        partition: int,
        *,
        log_id: str,  # noqa: ARG002  # there is one log
        first: int,
        last: int = 2**62,
    ) -> dict[int, str]:
        async with self._gate("rows.quarantined"):
            return {
                offset: reason
                for (number, offset), (_, reason) in self._tables.quarantine.items()
                if number == partition and first <= offset <= last
            }

    async def write(self, payload: Payload) -> list[str]:
        async with self._gate("rows.write"):
            found = self._tables.lanes.get(payload.lane.partition, Lane(payload.lane.partition)).next_offset
            if found == payload.from_offset:
                self._tables.commit(payload)
            elif found < payload.from_offset:
                raise GenerationChangedError(f"the rows include {found} records, and included {payload.from_offset}")
            elif found != payload.lane.next_offset:
                raise LaneLostError(f"the position is {found}, not {payload.from_offset}")
            return payload.removed

    def _of(self, partition: int) -> list[Batch]:
        found = [self._tables.batch(key) for key in self._tables.batches]
        return [batch for batch in found if batch is not None and batch.partition == partition]


class MemoryDatabase:
    """What a tail asks (as services.database.Database answers), and what the api's queries ask."""

    def __init__(self, tables: Tables, *, gate: Gate = open_gate) -> None:
        self.tables = tables
        self._gate = gate

    async def positions(self) -> dict[int, Lane]:
        async with self._gate("database.positions"):
            return {n: Lane(n, p.log_id, p.next_offset, p.epoch, p.time_ms) for n, p in self.tables.lanes.items()}

    async def generation(self) -> str:
        return "gen_1"

    async def snapshot(self, batch_id: str) -> Snapshot:
        async with self._gate("database.snapshot"):
            lane = self.tables.lanes.get(partition_of(batch_id), Lane(partition_of(batch_id)))
            lane = Lane(lane.partition, lane.log_id, lane.next_offset, lane.epoch, lane.time_ms)
            return Snapshot(self.tables.batch(batch_id), self.tables.uploads_of(batch_id), lane)

    async def listen(self, on_projected: Callable[[int, int], None], _lost: object) -> Listening:
        async with self._gate("database.listen"):
            return Listening(self.tables, on_projected)

    async def batch_of(self, batch_id: str, *, user_id: str) -> Batch | None:
        async with self._gate("database.batch_of"):
            batch = self.tables.batch(batch_id)
            return batch if batch is not None and batch.user_id == user_id and not batch.deleted else None

    async def upload_of(self, upload_id: str, *, user_id: str) -> Upload | None:
        async with self._gate("database.upload_of"):
            upload = self.tables.upload(upload_id)
            batch = self.tables.batch(upload.batch_id) if upload is not None else None
            return upload if batch is not None and batch.user_id == user_id else None

    async def uploads_of(self, batch_id: str, *, page: Page) -> tuple[list[Upload], str | None]:
        async with self._gate("database.uploads_of"):
            return uploads_among(self.tables.uploads_of(batch_id), page=page)


def _pages(rows: list[T], rows_max: int) -> list[list[T]]:
    return [rows[begin : begin + rows_max] for begin in range(0, len(rows), rows_max)]


def _buried(batch: Batch) -> Batch:
    """What is left of a deleted batch, as services.database reads it from its tombstone."""
    return Batch(
        id=batch.id,
        partition=batch.partition,
        user_id=batch.user_id,
        name=None,
        metadata={},
        expected_uploads=None,
        files_max=0,
        batch_bytes_max=0,
        file_bytes_max=0,
        request_key_hash=batch.request_key_hash,
        request_body_hash=batch.request_body_hash,
        created_ms=batch.created_ms,
        created_offset=batch.created_offset,
        updated_ms=batch.updated_ms,
        offset=batch.offset,
        last_queued_ms=batch.created_ms,
        deleted=True,
    )


def _tombstone(batch: Batch) -> tuple[Any, ...]:
    return (batch.user_id, batch.request_key_hash, batch.created_ms, batch.created_offset, batch.offset)
