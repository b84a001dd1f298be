"""The projection: facts folded into the rows of the read models, the position in the same transaction.

`fold` loads the rows a poll touches, folds in memory and remembers what changed; `flush` writes all of it and moves the
position by compare-and-set, so a position never claims more or less than the rows hold. Folding runs ahead of
flushing. A flush whose COMMIT got no answer is settled by reading the position again: the same payload is written
once. Rows are cached only as long as that is true of them; everything SQL stores came out of `evolve`.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, cancel_swept, evolve, step
from schemas.events import Fact, Undecodable, UploadStarted, decode
from schemas.records import StoredRecord
from services.database import BATCH_FIELDS, UPLOAD_FIELDS
from services.faults import reach
from services.lifecycle import StartError
from services.observability import COMMIT_SECONDS, FACTS_FOLDED, PROJECTED_OFFSET

CACHED_ROWS_MAX = 50_000
UNENDED_ROWS_MAX = 5_000
_EFFECTIVE, _IGNORED = FACTS_FOLDED.labels("effective"), FACTS_FOLDED.labels("ignored")


class LaneLostError(StartError):
    """Somebody else moves this lane's position: this process must stop, its memory is worth nothing."""


class GenerationChangedError(StartError):
    """Other rows are live now, rebuilt from the same log: forget what is in memory, and go on from those."""


@dataclass(frozen=True, slots=True)
class Projected:
    """One fact after it was folded; batch and upload are live states of the projection."""

    fact: Fact
    outcome: Changed | Ignored
    batch: Batch | None
    upload: Upload | None


@dataclass(slots=True)
class Payload:
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


@dataclass(frozen=True, slots=True)
class Unended:
    """A page of what a lane has to work on: last starts by user, unended batches, or queued and processing uploads. The
    batch of an upload stands on an earlier page."""

    starts: Mapping[str, int] = field(default_factory=dict)
    batches: Sequence[Batch] = ()
    uploads: Sequence[Upload] = ()


class Store(Protocol):
    """Where the rows are: Postgres (`rows.Rows`), or the memory of a test. All of it raises DatabaseUnavailable."""

    async def lane(self, partition: int, *, log_id: str) -> Lane:
        """Where the rows of a partition stand; one that nobody projected yet begins at offset 0."""
        ...

    async def position(self, partition: int) -> int:
        """The next offset the rows of a partition stand for."""
        ...

    async def batches(self, ids: Sequence[str]) -> dict[str, Batch]:
        """The batches of these ids that exist, the deleted ones too."""
        ...

    async def uploads(self, ids: Sequence[str]) -> dict[str, Upload]:
        """The uploads of these ids that exist."""
        ...

    def unended(self, partition: int, *, rows_max: int = UNENDED_ROWS_MAX) -> AsyncGenerator[Unended]:
        """What the lane has to work on, all as of one moment, in pages of so many rows at most."""
        ...

    async def idle_batches(self, partition: int, *, before_ms: int) -> list[Batch]:
        """Open batches into which nothing was queued since `before_ms`."""
        ...

    async def write(self, payload: Payload) -> list[str]:
        """Write it and move the position, whole or not at all; returns the ids of uploads that are gone now.

        Raises LaneLostError where the position is neither before this payload nor after it, GenerationChangedError
        (any method may) where these rows are live no more.
        """
        ...


class Projection:
    """One lane's rows. `lane` is where folding stands, `committed` the next offset Postgres holds, `quarantined` the
    reasons of records that say nothing, whatever this version makes of them, until they are retried. `epoch`: under
    which its lane is worked, once that is so; nothing is written that was folded under a newer one."""

    def __init__(self, store: Store, *, lane: Lane, quarantined: Mapping[int, str] | None = None) -> None:
        self.lane = lane
        self.quarantined = dict(quarantined or {})
        self.committed = lane.next_offset
        self.epoch: int | None = None
        self._store = store
        self._rows = asyncio.Lock()
        self._batches: dict[str, Batch | None] = {}
        self._uploads: dict[str, Upload | None] = {}
        self._members: dict[str, dict[str, Upload]] = {}
        self._dirty_batches: dict[str, Batch] = {}
        self._dirty_uploads: dict[str, Upload] = {}
        self._next = Payload(lane.next_offset, lane)
        self._in_flight: Payload | None = None
        self.folded = asyncio.Event()

    @classmethod
    async def open(
        cls, store: Store, *, partition: int, log_id: str, quarantined: Mapping[int, str] | None = None
    ) -> "Projection":
        """The projection as the store holds it; a lane nobody projected yet begins at offset 0."""
        return cls(store, lane=await store.lane(partition, log_id=log_id), quarantined=quarantined)

    @property
    def dirty(self) -> bool:
        """Whether anything was folded that Postgres does not hold yet; `folded` is set whenever there is more."""
        return self.committed < self.lane.next_offset

    @property
    def cached(self) -> int:
        """How many rows are in memory; they are let go of at a fold while no flush is under way."""
        return len(self._uploads) + len(self._batches)

    async def fold(self, records: Sequence[StoredRecord]) -> list[Projected]:
        """Fold the next records, in order. Raises DatabaseUnavailable before anything was folded."""
        decoded = [self._decode(record) for record in records]
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

    async def unended(self) -> AsyncGenerator[Unended]:
        """What the lane has to work on, page by page. Everything folded must have been flushed. What came is good once
        the last page came: then nobody else wrote meanwhile."""
        assert not self.dirty
        async with aclosing(self._store.unended(self.lane.partition)) as pages:
            async for page in pages:
                yield page
        await self._check_alone()

    async def idle_batches(self, before_ms: int) -> list[Batch]:
        """Open batches into which nothing was queued since `before_ms`, as folded so far: rows may be older."""
        found = await self._store.idle_batches(self.lane.partition, before_ms=before_ms)
        async with self._rows:
            await self._load_batches([batch.id for batch in found])
            folded = [self._batches[batch.id] for batch in found]
        return [batch for batch in folded if batch is not None and _is_idle(batch, before_ms)]

    def _decode(self, record: StoredRecord) -> Fact | Undecodable:
        if self.quarantined and (reason := self.quarantined.get(record.offset)) is not None:
            return Undecodable(record.partition, record.offset, record.timestamp_ms, reason)
        return decode(record)

    def _fold_one(self, fact: Fact | Undecodable) -> Projected | None:
        step(self.lane, fact.offset, fact.timestamp_ms)
        if isinstance(fact, Undecodable):
            self._next.quarantined.append((fact.offset, self.lane.time_ms, fact.reason))
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
        (_EFFECTIVE if isinstance(outcome, Changed) else _IGNORED).inc()
        return Projected(fact, outcome, batch, upload)

    def _remember(self, fact: Fact, changed: Changed) -> None:
        batch, upload = changed.batch, changed.upload
        if batch is None:
            return
        self._batches[batch.id] = self._dirty_batches[batch.id] = batch
        if upload is not None:
            self._dirty_uploads[upload.id] = upload
            self._know(upload)
        if isinstance(fact.event, UploadStarted):
            self._next.user_starts[batch.user_id] = fact.offset
        if changed.swept == "cancelled":
            self._next.cancelled.append((batch.id, self.lane.time_ms, fact.offset))
            for each in self._of(batch.id):
                if cancel_swept(each, at_ms=self.lane.time_ms, offset=fact.offset):
                    self._dirty_uploads[each.id] = each
        elif changed.swept == "deleted":
            self._next.deleted.append(batch)
            for each in self._members.pop(batch.id, {}).values():
                self._uploads[each.id] = None
                self._dirty_uploads.pop(each.id, None)
                self._next.removed.append(each.id)

    def _of(self, batch_id: str) -> list[Upload]:
        return list(self._members.get(batch_id, {}).values())

    def _know(self, upload: Upload) -> None:
        self._uploads[upload.id] = upload
        self._members.setdefault(upload.batch_id, {})[upload.id] = upload

    # Rows

    async def _load(self, facts: Sequence[Fact]) -> None:
        self._drop_clean()
        await self._load_batches({fact.batch_id for fact in facts if fact.batch_id})
        await self._load_uploads({fact.upload_id for fact in facts if fact.upload_id})

    async def _load_batches(self, ids: Iterable[str]) -> None:
        missing = [batch_id for batch_id in ids if batch_id not in self._batches]
        if missing:
            found = await self._store.batches(missing)
            await self._check_alone()
            self._batches.update({batch_id: found.get(batch_id) for batch_id in missing})

    async def _load_uploads(self, ids: Iterable[str]) -> None:
        missing = [upload_id for upload_id in ids if upload_id not in self._uploads]
        if missing:
            found = await self._store.uploads(missing)
            await self._check_alone()
            await self._load_batches({upload.batch_id for upload in found.values()})
            self._uploads.update(dict.fromkeys(missing))
            for upload in found.values():
                self._sweep_loaded(upload)
                self._know(upload)

    async def _check_alone(self) -> None:
        """Raises LaneLostError where the rows just loaded may hold what was not folded here yet: then whoever had the
        lane before still writes, and folding onto its rows would count twice. Asked after them; a position only grows.
        """
        if (found := await self._store.position(self.lane.partition)) > self.lane.next_offset:
            raise LaneLostError(
                f"the rows of partition {self.lane.partition} stand for {found} records, {self.lane.next_offset} were "
                "folded here: another processor writes this lane; this process stops, a new one begins there"
            )

    def _sweep_loaded(self, upload: Upload) -> None:
        """A row read before its batch's cancellation was flushed: the fold knows better than the row."""
        batch = self._batches.get(upload.batch_id)
        if batch is not None and batch.status == "cancelled" and batch.completed_ms is not None:
            cancel_swept(upload, at_ms=batch.completed_ms, offset=batch.offset)

    def _drop_clean(self) -> None:
        if self._in_flight is not None or self.cached <= CACHED_ROWS_MAX:
            return
        self._uploads, self._members = {}, {}
        for upload in self._dirty_uploads.values():
            self._know(upload)
        self._batches = dict(self._dirty_batches)

    # Writing

    async def flush(self) -> list[str]:
        """Write what was folded, if anything; returns the ids of uploads that are gone from Postgres now.

        Raises DatabaseUnavailable (call it again), LaneLostError.
        """
        if self._in_flight is None:
            if not self.dirty:
                return []
            self._check_fence()
            self._in_flight = self._cut()
        payload = self._in_flight
        reach("processor.before_commit")
        with COMMIT_SECONDS.time():
            removed = await self._store.write(payload)
        reach("processor.after_commit")
        self._in_flight = None
        self.committed = payload.lane.next_offset
        PROJECTED_OFFSET.labels(self.lane.partition).set(self.committed)
        return removed

    def _check_fence(self) -> None:
        """Whoever has the lane now writes what comes after their claim; moving the position under them would throw them
        out."""
        if self.epoch is not None and self.lane.epoch != self.epoch:
            raise LaneLostError(
                f"partition {self.lane.partition} was claimed by another processor at {self.lane.epoch}; this process "
                "stops"
            )

    def _cut(self) -> Payload:
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
        self._next = Payload(lane.next_offset, lane)
        return payload


def _is_idle(batch: Batch, before_ms: int) -> bool:
    return not (batch.sealed or batch.ended or batch.deleted) and batch.last_queued_ms < before_ms
