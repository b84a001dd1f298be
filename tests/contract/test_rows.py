"""The read models keep their promises: one suite, run on the rows in memory and on Postgres.

What the projection's store loads and writes, and what a tail and the api's queries are answered from it. The log in
each test is folded by the plainest fold there is (tests/examples.py); the rows must say the same.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.batch import Batch, Lane, Upload
from schemas.events import LogEvent
from schemas.records import NewRecord, StoredRecord
from services.api import queries
from services.api.queries import Page
from services.database import Database, DatabaseUnavailable
from services.processor import decisions
from services.processor.lane import LaneWorker
from services.processor.projection import (
    GenerationChangedError,
    LaneLostError,
    Payload,
    Projection,
    Store,
    Unended,
)
from services.processor.rows import Rows
from tests.examples import (
    BATCH,
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_BATCH,
    OTHER_UPLOAD,
    OTHER_USER,
    UPLOAD,
    USER,
    State,
    a_batch_cancelled,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_finished_batch,
    a_request,
    an_id,
    an_upload_queued,
    an_upload_started,
    fold,
    records_of,
)
from tests.fakes_rows import MemoryDatabase, MemoryRows, Tables

WORKED = (
    *OPENING,
    a_batch_created(metadata={"trip": "Iceland"}, request=a_request()),
    an_upload_queued(request=a_request()),
    an_upload_queued(OTHER_UPLOAD),
    an_upload_started(),
    *a_finished_batch(OTHER_BATCH, [an_id("upload", 3)]),
)


@dataclass
class World:
    """The rows, and what is asked of them: a MemoryDatabase, or a Database with the api's queries."""

    rows: Store
    database: Any

    async def fold(self, records: Sequence[StoredRecord], *, poll: int = 100) -> State:
        """Project these records and return what they come to."""
        projection = await Projection.open(self.rows, partition=0, log_id=LOG_ID)
        for begin in range(0, len(records), poll):
            await projection.fold(records[begin : begin + poll])
            await projection.flush()
        return fold(records)


async def unended(world: World, partition: int) -> tuple[list[Batch], list[Upload], dict[str, int]]:
    """All pages of it."""
    pages = [page async for page in world.rows.unended(partition)]
    batches = [batch for page in pages for batch in page.batches]
    uploads = [upload for page in pages for upload in page.uploads]
    return batches, uploads, {user: at for page in pages for user, at in page.starts.items()}


class AskedPostgres:
    """Postgres, with the queries as methods."""

    def __init__(self, database: Database) -> None:
        self.positions, self.snapshot, self.listen = database.positions, database.snapshot, database.listen
        self._database = database

    def __getattr__(self, name: str) -> Callable[..., Any]:
        query = getattr(queries, name)
        return lambda *args, **kwargs: query(self._database, *args, **kwargs)


@contextlib.asynccontextmanager
async def in_memory(_request: pytest.FixtureRequest) -> AsyncIterator[World]:
    tables = Tables()
    yield World(MemoryRows(tables), MemoryDatabase(tables))


@contextlib.asynccontextmanager
async def in_postgres(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    database = await Database.open(request.getfixturevalue("database_url"))
    try:
        await database.migrate()
        yield World(await Rows.live(database), AskedPostgres(database))
    finally:
        await database.close()


@pytest.fixture(params=[in_memory, in_postgres], ids=["memory", "postgres"])
def place(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[World]:
    if request.param is in_postgres:
        request.getfixturevalue("database_url")
    opened: AbstractAsyncContextManager[World] = request.param(request)
    return opened


@pytest.fixture
async def world(place: AbstractAsyncContextManager[World]) -> AsyncIterator[World]:
    async with place as opened:
        yield opened


async def test_a_lane_begins_at_its_first_record(world: World) -> None:
    assert await world.rows.lane(0, log_id=LOG_ID) == Lane(0, LOG_ID)
    assert await world.database.positions() == {0: Lane(0, LOG_ID)}


@pytest.mark.parametrize("poll", [1, 3, 100])
async def test_rows_are_what_the_log_folds_to(world: World, poll: int) -> None:
    state = await world.fold(records_of(*WORKED), poll=poll)

    assert await world.rows.lane(0, log_id=LOG_ID) == state.lane
    assert await world.rows.position(0) == state.lane.next_offset
    assert await world.rows.batches([BATCH, OTHER_BATCH, an_id("none")]) == state.batches
    assert await world.rows.uploads([*state.uploads, an_id("none")]) == state.uploads


async def test_what_is_unended_is_found_again(world: World) -> None:
    state = await world.fold(records_of(*WORKED))

    batches, uploads, starts = await unended(world, 0)

    assert batches == [state.batches[BATCH]]
    assert {upload.id: upload for upload in uploads} == {each: state.uploads[each] for each in (UPLOAD, OTHER_UPLOAD)}
    assert starts == {USER: max(upload.offset for upload in state.uploads.values()) - 1}
    assert await unended(world, 1) == ([], [], {})


async def test_what_is_unended_comes_in_pages_as_of_one_moment(world: World) -> None:
    others = [(an_id("one of many", number), an_id("upload of", number)) for number in range(5)]
    queued: list[LogEvent] = []
    for batch_id, upload_id in others:
        queued += [a_batch_created(batch_id), an_upload_queued(upload_id, batch_id)]
    state = await world.fold(records_of(*WORKED, *queued))
    unwritten = await Projection.open(world.rows, partition=0, log_id=LOG_ID)
    cancelled = [a_batch_cancelled(batch_id) for batch_id, _ in others]
    await unwritten.fold(records_of(*cancelled, first_offset=state.lane.next_offset))

    pages = []
    async with aclosing(world.rows.unended(0, rows_max=2)) as coming:
        async for page in coming:
            pages.append(page)
            await unwritten.flush()  # after the first one; the others show nothing of it

    assert [len(page.starts) + len(page.batches) + len(page.uploads) for page in pages] == [1, 2, 2, 2, 2, 2, 2, 1]
    assert {batch.id for page in pages for batch in page.batches} == {BATCH, *(batch for batch, _ in others)}
    found = {upload.id: upload for page in pages for upload in page.uploads}
    assert found == {each: state.uploads[each] for each in (UPLOAD, OTHER_UPLOAD, *(upload for _, upload in others))}
    assert [batch.id for batch in (await unended(world, 0))[0]] == [BATCH]


async def test_a_lane_loads_a_long_queue_page_by_page_and_others_have_their_turns(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_max, files, users = 500, 20_000, 20
    batches = [an_id("one of many", number) for number in range(users)]
    created = [a_batch_created(batch_id, user_id=f"user {n}") for n, batch_id in enumerate(batches)]
    queued = [an_upload_queued(an_id("file", n), batches[n % users], user_id=f"user {n % users}") for n in range(files)]
    started = an_upload_started(an_id("file", 7), batches[7])
    state = await world.fold(records_of(*OPENING, *created, *queued, started), poll=5_000)
    projection = await Projection.open(world.rows, partition=0, log_id=LOG_ID)
    hand = a_hand(projection)
    pages_until_lost, turns = 42, 0

    async def coming(store: Store, partition: int) -> AsyncGenerator[Unended]:
        nonlocal pages_until_lost
        async with aclosing(store.unended(partition, rows_max=rows_max)) as pages:
            async for page in pages:
                pages_until_lost -= 1
                if pages_until_lost == 0:
                    raise DatabaseUnavailable("away in the midst of it")
                yield page

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    paged = SimpleNamespace(unended=partial(coming, world.rows), position=world.rows.position)
    monkeypatch.setattr(projection, "_store", paged)
    with pytest.raises(DatabaseUnavailable):
        await hand.load(nobody_late)
    turning = asyncio.create_task(others())
    await hand.load(nobody_late)
    turning.cancel()

    expected = decisions.Queue()
    expected.started("user 7", state.lane.next_offset - 1)
    for upload in state.uploads.values():
        if upload.status == "queued":
            batch = state.batches[upload.batch_id]
            expected.put(
                user_id=batch.user_id,
                batch_id=batch.id,
                batch_created=batch.created_offset,
                upload_id=upload.id,
                place=upload.place,
            )
    assert list(drained(hand._queue)) == list(drained(expected))
    assert hand._left_over == [decisions.crashed(state.uploads[started.upload_id], epoch=EPOCH)]
    assert turns >= files / rows_max


async def nobody_late(_in_work: Mapping[str, int]) -> tuple[str, ...]:
    return ()


def a_hand(projection: Projection, *, writer: Any = None) -> LaneWorker:
    """One that works on no file."""
    unused: Any = None
    return LaneWorker(
        epoch=EPOCH, log=unused, writer=writer, projection=projection, bench=unused, may_start=lambda: False
    )


class Writer:
    """What the hand appends through: `records` stand in the log from an offset on."""

    def __init__(self, first_offset: int) -> None:
        self.records: list[StoredRecord] = []
        self._first_offset = first_offset

    async def append(self, partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        del timeout_s
        first = self._first_offset + len(self.records)
        self.records += [
            StoredRecord(partition, first + number, 0, record.key, record.value, record.headers)
            for number, record in enumerate(records)
        ]
        return first


def drained(queue: decisions.Queue) -> Iterator[str]:
    while (upload_id := queue.next()) is not None:
        yield upload_id
        queue.remove(upload_id)


async def test_open_batches_grow_idle(world: World) -> None:
    state = await world.fold(records_of(*OPENING, a_batch_created(), a_batch_created(OTHER_BATCH), a_batch_sealed()))
    queued_ms = state.batches[OTHER_BATCH].last_queued_ms

    assert await world.rows.idle_batches(0, before_ms=queued_ms) == []
    assert await world.rows.idle_batches(0, before_ms=queued_ms + 1) == [state.batches[OTHER_BATCH]]


async def test_an_idle_batch_is_sealed_once_though_nothing_can_be_written(world: World) -> None:
    state = await world.fold(records_of(*OPENING, a_batch_created(), a_batch_created(OTHER_BATCH), a_batch_sealed()))
    projection = await Projection.open(world.rows, partition=0, log_id=LOG_ID)
    writer = Writer(projection.lane.next_offset)
    hand, later_ms = a_hand(projection, writer=writer), state.batches[OTHER_BATCH].last_queued_ms + 1

    await hand.seal_idle(later_ms)
    await hand.seal_idle(later_ms)  # it was not read back yet
    for projected in await projection.fold(writer.records):
        hand.see(projected)
    await hand.seal_idle(later_ms)  # and now it was, but the rows do not have it

    (sealed,) = writer.records
    assert sealed.key == OTHER_BATCH.encode()
    assert await projection.idle_batches(later_ms) == []
    assert await world.rows.idle_batches(0, before_ms=later_ms) == [state.batches[OTHER_BATCH]]


async def test_a_batch_is_not_idle_into_which_a_file_came_that_the_rows_do_not_have(world: World) -> None:
    state = await world.fold(records_of(*OPENING, a_batch_created()))
    projection = await Projection.open(world.rows, partition=0, log_id=LOG_ID)
    later_ms = state.batches[BATCH].last_queued_ms + 1
    assert await projection.idle_batches(later_ms) == [state.batches[BATCH]]

    await projection.fold(records_of(an_upload_queued(), first_offset=state.lane.next_offset, first_ms=later_ms))

    assert await projection.idle_batches(later_ms) == []


@pytest.mark.parametrize("poll", [1, 100])
async def test_a_cancelled_batch_takes_its_uploads_along(world: World, poll: int) -> None:
    state = await world.fold(records_of(*WORKED, a_batch_cancelled()), poll=poll)

    assert await world.rows.uploads(list(state.uploads)) == state.uploads
    assert (await unended(world, 0))[:2] == ([], [])


@pytest.mark.parametrize("poll", [1, 100])
async def test_a_deleted_batch_leaves_its_tombstone(world: World, poll: int) -> None:
    state = await world.fold(records_of(*WORKED, a_batch_deleted()), poll=poll)

    (left,) = (await world.rows.batches([BATCH])).values()
    assert (left.deleted, left.user_id, left.request_key_hash) == (True, USER, state.batches[BATCH].request_key_hash)
    assert (left.created_offset, left.offset) == (state.batches[BATCH].created_offset, state.batches[BATCH].offset)
    assert await world.rows.uploads([UPLOAD, OTHER_UPLOAD]) == {}
    assert (await world.database.snapshot(BATCH)).batch == left
    assert await world.database.batch_of(BATCH, user_id=USER) is None


async def test_a_deletion_names_the_uploads_that_are_gone(world: World) -> None:
    projection = await Projection.open(world.rows, partition=0, log_id=LOG_ID)
    await projection.fold(records_of(*WORKED))
    await projection.flush()
    afresh = await Projection.open(world.rows, partition=0, log_id=LOG_ID)

    await afresh.fold(records_of(a_batch_deleted(), first_offset=len(WORKED)))

    assert set(await afresh.flush()) == {UPLOAD, OTHER_UPLOAD}


async def test_a_payload_is_written_once(world: World) -> None:
    await world.fold(records_of(*OPENING))
    payload = Payload(2, Lane(0, LOG_ID, 3, EPOCH, 5), user_starts={USER: 2})

    assert await world.rows.write(payload) == []
    assert await world.rows.write(payload) == []
    assert (await world.rows.lane(0, log_id=LOG_ID)).next_offset == 3


@pytest.mark.parametrize(("ahead", "error"), [(-1, LaneLostError), (1, GenerationChangedError)])
async def test_a_payload_from_elsewhere_is_refused_whole(world: World, ahead: int, error: type[Exception]) -> None:
    state = await world.fold(records_of(*WORKED))
    start = state.lane.next_offset + ahead
    stray = Payload(start, replace(state.lane, next_offset=99), user_starts={OTHER_USER: 98})

    with pytest.raises(error):
        await world.rows.write(stray)

    assert await world.rows.lane(0, log_id=LOG_ID) == state.lane
    assert OTHER_USER not in (await unended(world, 0))[2]


async def test_a_batch_deleted_with_its_creation_leaves_its_user(world: World) -> None:
    created_and_deleted = [a_batch_created(), an_upload_queued(), a_batch_deleted()]

    state = await world.fold(records_of(*OPENING, *created_and_deleted))

    (left,) = (await world.rows.batches([BATCH])).values()
    assert left.offset == state.batches[BATCH].offset
    assert await world.rows.uploads([UPLOAD]) == {}


async def test_a_snapshot_is_a_batch_its_uploads_and_the_position(world: World) -> None:
    state = await world.fold(records_of(*WORKED))

    snapshot = await world.database.snapshot(BATCH)
    unknown = await world.database.snapshot(an_id("none"))

    assert snapshot.batch == state.batches[BATCH]
    assert snapshot.uploads == {each: state.uploads[each] for each in (UPLOAD, OTHER_UPLOAD)}
    assert list(snapshot.uploads) == [UPLOAD, OTHER_UPLOAD]
    assert snapshot.lane == unknown.lane == state.lane
    assert (unknown.batch, unknown.uploads) == (None, {})


async def test_whoever_listens_hears_of_a_commit(world: World) -> None:
    heard: list[tuple[int, int]] = []
    came = asyncio.Event()

    def hear(partition: int, next_offset: int) -> None:
        heard.append((partition, next_offset))
        came.set()

    listening = await world.database.listen(hear, asyncio.Event())
    await world.fold(records_of(*OPENING))
    await asyncio.wait_for(came.wait(), 10)
    listening.terminate()

    assert heard == [(0, 2)]


async def test_questions_are_answered_to_the_owner_alone(world: World) -> None:
    state = await world.fold(records_of(*WORKED))
    ask = world.database

    assert await ask.batch_of(BATCH, user_id=USER) == state.batches[BATCH]
    assert await ask.upload_of(UPLOAD, user_id=USER) == state.uploads[UPLOAD]
    assert await ask.batch_of(BATCH, user_id=OTHER_USER) is None
    assert await ask.upload_of(UPLOAD, user_id=OTHER_USER) is None


async def test_pages_follow_each_other(world: World) -> None:
    state = await world.fold(records_of(*WORKED))
    ask = world.database

    first, cursor = await ask.uploads_of(BATCH, page=Page(1, None, None))
    second, end = await ask.uploads_of(BATCH, page=Page(1, cursor, None))
    queued, _ = await ask.uploads_of(BATCH, page=Page(50, None, "queued"))

    assert [*first, *second] == [state.uploads[UPLOAD], state.uploads[OTHER_UPLOAD]]
    assert end is None
    assert queued == [state.uploads[OTHER_UPLOAD]]
