"""A tail that follows a user tells of every fact of its batches exactly, also where the read models are ahead of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import cast

import pytest

from schemas.batch import Changed, Ignored
from schemas.events import Fact, LogEvent, decode
from schemas.position import Position
from schemas.records import StoredRecord
from services.database import Database, DatabaseUnavailable, Snapshot
from services.eventlog import Log
from services.folding import Held
from services.history import Past
from services.notifier.followings import Followings
from services.notifier.hub import Hub, HubLimits
from services.tail import Folded, Tail
from tests.examples import (
    LOG_ID,
    OPENING,
    OTHER_USER,
    USER,
    State,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    an_id,
    an_upload_failed,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    records_of,
)
from tests.integration.test_tail import FedLog, project
from tests.notifiers import SOON_S, patient, until

FIRST, SECOND, FOREIGN = an_id("first batch"), an_id("second batch"), an_id("a foreign batch")
ONE, TWO = an_id("upload one"), an_id("upload two")
FAILED = {"status": "failed", "successful_uploads": 0, "failed_uploads": 1}
STORY: list[LogEvent] = [
    *OPENING,
    a_batch_created(FIRST),
    a_batch_created(FOREIGN, user_id=OTHER_USER),
    an_upload_queued(ONE, FIRST),
    a_batch_sealed(FIRST),
    an_upload_started(ONE, FIRST),
    an_upload_failed(ONE, FIRST),
    a_batch_completed(FIRST, **FAILED),
    an_upload_started(ONE, FIRST, attempt=2),
    a_lane_claimed(after=1, worker_id="worker-2"),
    a_batch_sealed(FOREIGN),
    a_batch_created(SECOND),
    an_upload_retried(ONE, FIRST),
    an_upload_retried(ONE, FIRST),
    an_upload_started(ONE, FIRST, attempt=2),
    an_upload_started(ONE, FIRST, attempt=2, epoch=10),
    an_upload_succeeded(ONE, FIRST, attempt=2, epoch=10),
    a_batch_completed(FIRST, epoch=10),
    an_upload_queued(TWO, SECOND, user_id=OTHER_USER),
    an_upload_queued(TWO, SECOND),
    a_batch_deleted(FIRST),
    a_batch_deleted(FIRST),
    an_upload_started(TWO, SECOND, epoch=10),
]


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Nobody is lost because this machine stood still for some seconds."""
    with patient():
        yield


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url)
    await opened.migrate()
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def opened(
    records: Sequence[StoredRecord], database: Database, *, batches_max: int = 1
) -> AsyncIterator[tuple[FedLog, Tail]]:
    log, whole = FedLog(list(records)), FedLog(list(records), read_to=len(records))
    past = Past(log=cast("Log", whole), log_id=LOG_ID, database=database)
    async with Tail.open(
        log=cast("Log", log), database=database, log_id=LOG_ID, partitions=1, batches_max=batches_max, past=past.before
    ) as tail:
        yield log, tail


def effects(records: Sequence[StoredRecord]) -> list[tuple[int, bool, str | None]]:
    """Offset, whether effective, and the batch's status after it, of all facts about this user's batches."""
    state, found = State(), []
    for record in records:
        fact = decode(record)
        outcome = state.apply(fact)
        if isinstance(fact, Fact) and fact.batch_id in (FIRST, SECOND):
            found.append((fact.offset, isinstance(outcome, Changed), state.batches[fact.batch_id].status))
    return found


@pytest.mark.parametrize("chunk", [1, 3, len(STORY)])
@pytest.mark.parametrize("begin", [2, 9, 13, 17])
async def test_every_effective_fact_of_a_followed_user_is_told_where_rows_are_ahead(
    database: Database, begin: int, chunk: int
) -> None:
    records = records_of(*STORY)
    await project(database, records[:begin])
    heard: list[tuple[int, bool, str | None]] = []

    def listen(folded: Folded) -> None:
        status = folded.batch.status if folded.batch is not None else None
        if folded.fact.batch_id in (FIRST, SECOND):
            heard.append((folded.fact.offset, isinstance(folded.outcome, Changed), status))

    async with opened(records, database) as (log, tail):
        log.next_offset = begin
        assert tail.follow(USER, pytest.fail) == frozenset()
        for batch_id in (FIRST, SECOND):
            async with tail.hold(batch_id):
                pass
        tail.listen(listen)
        await project(database, records)
        await until(lambda: tail.projected().includes(Position.of(LOG_ID, {0: len(records) - 1})))
        for end in range(begin, len(records) + chunk, chunk):
            log.feed(min(end, len(records)))
            assert await tail.reached(Position.of(LOG_ID, {0: min(end, len(records)) - 1}), SOON_S)

    told = [each for each in heard if each[1]]
    assert told == [each for each in effects(records) if each[1] and each[0] >= begin]


@pytest.mark.parametrize("begin", range(6, 9))
async def test_every_fact_after_where_a_user_is_followed_from_is_told_where_rows_are_ahead(
    database: Database, monkeypatch: pytest.MonkeyPatch, begin: int
) -> None:
    # Given a batch that has ended in the read models, and not yet where the tail is
    records = records_of(*STORY[:9])
    await project(database, records[:begin])
    waited, reached = asyncio.Event(), Tail.reached

    async def reached_noted(self: Tail, position: Position, timeout_s: float) -> bool:
        waited.set()
        return await reached(self, position, timeout_s)

    heard: list[int] = []
    hub = WatchedHub()
    async with (
        opened(records, database) as (log, tail),
        Followings.open(tail=tail, hub=hub, database=database) as followings,
    ):
        log.next_offset = begin
        tail.listen(lambda folded: heard.append(folded.fact.offset))
        await project(database, records)
        await until(lambda: tail.projected().includes(Position.of(LOG_ID, {0: len(records) - 1})))
        monkeypatch.setattr(Tail, "reached", reached_noted)

        # When its user is followed just then, and the tail reads on
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(found(followings))
            await until(lambda: waited.is_set() or hub.floor is not None)
            log.feed(len(records))
        assert await tail.reached_end(SOON_S)

    # Then what comes after the place it is followed from was told
    assert hub.floor is not None
    assert [offset for offset in range(hub.floor + 1, len(records)) if offset not in heard] == []


class WatchedHub(Hub):
    """A hub that shows after which offset a user is watched."""

    def __init__(self) -> None:
        super().__init__(HubLimits(1, 1, 1, 1, 1))
        self.floor: int | None = None

    def watch_user(self, user_id: str, *, floor: Mapping[int, int]) -> None:
        self.floor = floor[0]
        super().watch_user(user_id, floor=floor)


async def found(followings: Followings) -> None:
    """As a client that subscribes and goes away."""
    async with followings.find(USER):
        pass


async def test_what_a_followed_user_did_beyond_the_read_models_is_named(database: Database) -> None:
    records = records_of(*STORY)
    await project(database, records[:9])

    async with opened(records, database) as (log, tail):
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)
        touched = tail.follow(USER, pytest.fail)

    assert touched == {FIRST, SECOND, FOREIGN}, "another user's batch too, where this one tried"


async def test_unfinished_batches_of_a_followed_user_stay_in_memory_and_others_do_not(database: Database) -> None:
    created = [a_batch_created(an_id("open", number)) for number in range(5)]
    foreign = [a_batch_created(an_id("foreign", number), user_id=OTHER_USER) for number in range(5)]
    records = records_of(*OPENING, *created, *foreign)
    async with opened(records, database) as (log, tail):
        tail.follow(USER, pytest.fail)
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)
        for batch in foreign:
            async with tail.hold(batch.batch_id):
                pass
        await project(database, records)
        await until(lambda: not tail.held_of(OTHER_USER))
        followed = len(tail.held_of(USER))
        tail.unfollow(USER)
        await until(lambda: len(tail.held_of(USER)) <= 1)

    assert followed == 5


async def test_a_user_is_lost_where_a_batch_cannot_be_looked_up_and_reading_goes_on(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_database: Database, _batch_id: str) -> Held:
        raise DatabaseUnavailable("it is away")

    records = records_of(*STORY)
    lost: list[str] = []
    async with opened(records, database) as (log, tail):
        tail.follow(USER, lost.append)
        monkeypatch.setattr(Database, "snapshot", away)
        log.feed(len(records))
        reached = await tail.reached_end(SOON_S)
        monkeypatch.undo()
        async with tail.hold(SECOND) as held:
            status = held.batch.status if held is not None and held.batch is not None else None

    assert (reached, lost, status) == (True, ["it is away"], "processing")


async def test_what_the_tail_has_beyond_the_read_models_is_kept_for_the_history_with_its_effect(
    database: Database,
) -> None:
    records = records_of(*STORY)
    await project(database, records[:15])

    async with opened(records, database) as (log, tail):
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)
        async with tail.hold(FIRST):
            kept = [(each.fact.offset, each.ignored) for each in tail.unprojected_of(FIRST)]

    assert kept == [
        (15, Ignored.STALE_EPOCH), (16, None), (17, None), (18, None), (21, None), (22, Ignored.REPETITION),
    ]  # fmt: skip


async def test_a_user_followed_while_facts_of_its_own_wait_for_another_misses_none_of_them(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a read that brings facts of two users, and has to look up a batch of the one who is followed
    begin = [*OPENING, a_batch_created(FOREIGN, user_id=OTHER_USER)]
    poll = [a_batch_created(FIRST), an_upload_queued(ONE, FIRST), a_batch_sealed(FOREIGN, user_id=OTHER_USER)]
    records = records_of(*begin, *poll, an_upload_started(ONE, FIRST))
    await project(database, records[: len(begin)])
    asked, answered = asyncio.Event(), asyncio.Event()
    snapshot = Database.snapshot

    async def slowly(self: Database, batch_id: str) -> Snapshot:
        asked.set()
        await answered.wait()
        return await snapshot(self, batch_id)

    monkeypatch.setattr(Database, "snapshot", slowly)
    heard: list[int] = []
    async with opened(records, database) as (log, tail):
        tail.listen(lambda folded: heard.append(folded.fact.offset))
        tail.follow(OTHER_USER, pytest.fail)
        log.feed(len(begin) + len(poll))
        await asked.wait()

        # When the other user is followed just then
        touched = tail.follow(USER, pytest.fail)
        holding = [asyncio.create_task(held(tail, batch_id)) for batch_id in touched]
        answered.set()
        await asyncio.gather(*holding)
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)

    # Then every fact of its batch is told, the worker's too, which do not name the user
    assert touched == {FIRST}
    assert [offset for offset in heard if decode(records[offset]).batch_id == FIRST] == [3, 4, 6]


async def held(tail: Tail, batch_id: str) -> None:
    """As one who begins to follow holds each batch once."""
    async with tail.hold(batch_id):
        pass


async def test_a_batch_that_was_brought_is_not_let_go_of_before_its_fact_was_taken(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_of(*STORY)
    await project(database, records[:9])
    snapshot = Database.snapshot

    async def snapshot_and_evict(self: Database, batch_id: str) -> Snapshot:
        found = await snapshot(self, batch_id)
        tail._batches_max, batches_max = 0, tail._batches_max
        tail._evict()
        tail._batches_max = batches_max
        return found

    heard: list[int] = []
    async with opened(records, database) as (log, tail):
        tail.follow(USER, pytest.fail)
        tail.listen(lambda folded: heard.append(folded.fact.offset))
        await project(database, records)
        await until(lambda: tail.projected().includes(Position.of(LOG_ID, {0: len(records) - 1})))
        monkeypatch.setattr(Database, "snapshot", snapshot_and_evict)
        log.feed(len(records))
        assert await tail.reached_end(SOON_S)

    assert [each[0] for each in effects(records) if each[1] and each[0] >= 9] == [
        offset for offset in heard if offset not in IGNORED
    ]


IGNORED = {9, 11, 14, 15, 19, 22}
