"""The tail on a real Postgres: rows at P plus the facts after P are the whole truth, whichever of the two is ahead."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from schemas.batch import Changed, Ignored
from schemas.events import LogEvent
from schemas.ids import new_id
from schemas.position import Position
from schemas.records import StoredRecord
from services.database import Database, DatabaseUnavailable
from services.eventlog import Log, LogSettings, LogUnavailable
from services.processor.projection import Projection
from services.processor.rows import Rows
from services.tail import Folded, Tail
from tests.examples import (
    BATCH,
    a_batch_cancelled,
    a_batch_created,
    a_batch_deleted,
    a_finished_batch,
    a_lane_claimed,
    a_log_created,
    an_id,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
    fold,
    records_of,
)
from tests.notifiers import SOON_S, until

LOG_ID = a_log_created().log_id
OTHER = an_id("another batch")
FIRST, SECOND = an_id("first upload"), an_id("second upload")
STORY: list[LogEvent] = [
    a_log_created(),
    a_lane_claimed(),
    a_batch_created(),
    an_upload_queued(FIRST),
    a_batch_created(OTHER),
    an_upload_started(FIRST, epoch=1),
    an_upload_queued(SECOND),
    a_lane_claimed(after=1, worker_id="worker-2"),
    an_upload_succeeded(FIRST, epoch=1),
    an_upload_succeeded(FIRST, epoch=7),
    an_upload_started(SECOND, epoch=7),
    a_batch_cancelled(),
]


@dataclass
class FedLog:
    """A log of which a tail reads just as far as the test lets it: the reader's protocol over a list."""

    records: list[StoredRecord] = field(default_factory=list)
    read_to: int = 0
    next_offset: int = 0
    away: bool = False
    more: asyncio.Event = field(default_factory=asyncio.Event)
    missed: asyncio.Event = field(default_factory=asyncio.Event)
    settings: LogSettings = field(default_factory=lambda: LogSettings(bootstrap_servers="a list"))
    partitions: tuple[int, ...] = (0,)

    def feed(self, to: int) -> None:
        self.read_to = to
        self.more.set()

    def reader(self, _partitions: Sequence[int]) -> "FedLog":
        return self

    async def first(self, _partition: int) -> StoredRecord:
        return self.records[0]

    async def seek(self, _partition: int, offset: int) -> None:
        self.next_offset = offset

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        if self.away:
            self.missed.set()
            raise LogUnavailable("the broker is away")
        self.more.clear()
        if self.next_offset >= self.read_to:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.more.wait(), timeout_ms / 1000)
        records = self.records[self.next_offset : self.read_to][:records_max]
        self.next_offset += len(records)
        return records

    async def ends(self) -> dict[int, int]:
        return {0: len(self.records)}

    async def close(self) -> None:
        pass


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url)
    await opened.migrate()
    yield opened
    await opened.close()


async def project(database: Database, records: Sequence[StoredRecord]) -> None:
    projection = await Projection.open(await Rows.live(database), partition=0, log_id=LOG_ID)
    await projection.fold(records[projection.lane.next_offset :])
    await projection.flush()


def opened(log: FedLog, database: Database, **bounds: int) -> Any:
    return Tail.open(log=cast("Log", log), database=database, log_id=LOG_ID, partitions=1, **bounds)


@pytest.mark.parametrize("projected_at_start", [0, 4, 9, len(STORY)])
@pytest.mark.parametrize("projected_at_load", [4, 8, len(STORY)])
@pytest.mark.parametrize("read_at_load", [4, 8, len(STORY)])
async def test_a_batch_loaded_at_any_moment_ends_in_the_state_of_the_whole_log(
    database: Database, projected_at_start: int, projected_at_load: int, read_at_load: int
) -> None:
    records = records_of(*STORY)
    await project(database, records[:projected_at_start])
    log = FedLog(records)

    async with opened(log, database) as tail, contextlib.AsyncExitStack() as stack:
        log.feed(read_at_load)
        assert await tail.reached(Position.of(LOG_ID, {0: max(read_at_load, projected_at_start) - 1}), SOON_S)
        await project(database, records[: max(projected_at_start, projected_at_load)])
        loading = asyncio.create_task(stack.enter_async_context(tail.hold(BATCH)))
        log.feed(len(records))
        held = await loading
        assert await tail.reached_end(SOON_S)

        expected = fold(records)
        assert held is not None
        assert held.batch == expected.batches[BATCH]
        assert held.uploads == {each.id: each for each in expected.uploads_of(BATCH)}


async def test_every_fact_of_a_held_batch_is_heard_once_in_order_with_its_outcome(database: Database) -> None:
    records = records_of(*STORY)
    log = FedLog(records)
    heard: list[Folded] = []

    async with opened(log, database) as tail:
        log.feed(3)
        assert await tail.reached(Position.of(LOG_ID, {0: 2}), SOON_S)
        async with tail.hold(BATCH):
            heard.clear()
            tail.listen(heard.append)
            log.feed(len(records))
            assert await tail.reached_end(SOON_S)

    assert [(folded.fact.offset, isinstance(folded.outcome, Changed)) for folded in heard] == [
        (3, True), (5, True), (6, True), (8, False), (9, True), (10, True), (11, True),
    ]  # fmt: skip
    assert heard[3].outcome == Ignored.STALE_EPOCH
    assert [str(folded.position) for folded in heard] == [
        str(Position.of(LOG_ID, {0: folded.fact.offset})) for folded in heard
    ]


async def test_a_write_is_read_back_in_the_order_it_was_asked_for(database: Database) -> None:
    records = records_of(*STORY)
    ids = [an_id("event", 0, offset) for offset in (8, 6)]
    log = FedLog(records)

    async with opened(log, database) as tail:
        log.feed(3)
        assert await tail.reached(Position.of(LOG_ID, {0: 2}), SOON_S)
        async with tail.hold(BATCH):
            read_back = tail.read_back(ids)
            log.feed(len(records))
            folded = await read_back.wait(SOON_S)

    assert [(each.fact.offset, isinstance(each.outcome, Changed)) for each in folded] == [(8, False), (6, True)]


async def test_a_write_that_never_comes_back_times_out(database: Database) -> None:
    log = FedLog(records_of(*STORY))

    async with opened(log, database) as tail:
        with pytest.raises(TimeoutError):
            await tail.read_back([an_id("event", 0, 8)]).wait(0.05)


async def test_a_batch_made_here_is_folded_without_asking_the_database(database: Database) -> None:
    batch_id = new_id(now_ms=1, random=b"123456789")
    records = records_of(a_log_created(), a_batch_created(batch_id))
    log = FedLog(records)

    async with opened(log, database) as tail:
        await database.close()
        tail.create(batch_id)
        log.feed(len(records))
        assert await tail.reached(Position.of(LOG_ID, {0: 1}), SOON_S)
        async with tail.hold(batch_id) as held:
            assert held is not None
            assert held.batch is not None
            assert held.batch.id == batch_id
        with pytest.raises(DatabaseUnavailable):
            await tail.hold(BATCH).__aenter__()


async def test_an_unknown_batch_is_none_until_its_first_fact_comes(database: Database) -> None:
    records = records_of(*STORY)
    log = FedLog(records)

    async with opened(log, database) as tail:
        async with tail.hold(BATCH) as held:
            assert held is None
            log.feed(len(records))
            assert await tail.reached_end(SOON_S)
        async with tail.hold(BATCH) as held:
            assert held is not None


async def test_a_deleted_batch_stays_known_as_deleted(database: Database) -> None:
    records = records_of(a_log_created(), a_lane_claimed(), *a_finished_batch(), a_batch_deleted())
    await project(database, records)
    log = FedLog(records)

    async with opened(log, database) as tail, tail.hold(BATCH) as held:
        assert held.batch.deleted
        assert held.uploads == {}


async def test_facts_that_are_projected_are_dropped_and_the_others_never(database: Database) -> None:
    records = records_of(*STORY)
    log = FedLog(records)

    async with opened(log, database, facts_max=10) as tail:
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)
        assert (tail.full, tail.unprojected()) == (True, len(records))

        await project(database, records[:9])
        assert await tail.projected_past(Position.of(LOG_ID, {0: 8}), SOON_S)

        assert (tail.full, tail.unprojected()) == (False, len(records) - 9)
        async with tail.hold(BATCH) as held:
            assert held.batch == fold(records).batches[BATCH]


async def test_read_models_that_went_back_are_not_mixed_with_newer_facts(database: Database) -> None:
    records = records_of(*STORY)
    await project(database, records[:9])
    log = FedLog(records)

    async with opened(log, database) as tail:
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)
        async with database.connection() as connection:
            await connection.execute("UPDATE gen_1.positions SET next_offset = 4")

        with pytest.raises(DatabaseUnavailable, match="being rebuilt"):
            await tail.hold(BATCH).__aenter__()


async def test_a_log_that_is_away_is_said_and_the_tail_goes_on_when_it_is_back(database: Database) -> None:
    records = records_of(*STORY)
    log = FedLog(records, away=True)

    async with opened(log, database) as tail:
        await asyncio.wait_for(log.missed.wait(), SOON_S)
        (problem,) = tail.problems()
        assert problem.startswith("the broker is away (since 2")
        log.away = False
        log.feed(len(records))
        await asyncio.wait_for(tail.caught_up(), SOON_S)

        await until(lambda: tail.problems() == [])
        assert tail.lag_s() < SOON_S
