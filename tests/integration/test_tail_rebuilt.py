"""The tail beside read models that are rebuilt: it goes on with the new ones, and holds no more than it may."""

from collections.abc import AsyncIterator

import pytest

from schemas.batch import Changed
from services import tail as tails
from services.database import Database
from services.eventlog import LogSettings
from services.tail import Folded, Held, Tail
from tests.examples import (
    BATCH,
    UPLOAD,
    USER,
    a_batch_created,
    a_batch_sealed,
    a_lane_claimed,
    an_id,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
)
from tests.fakes import FakeKafka, FakeLog
from tests.notifiers import SOON_S, until
from tests.rebuilds import Ground

SECOND = an_id("second")


@pytest.fixture
async def ground(database_url: str) -> AsyncIterator[Ground]:
    """A log in memory, and real read models."""
    database = await Database.open(database_url)
    await database.migrate()
    async with FakeLog.open(FakeKafka(), LogSettings(bootstrap_servers="memory")) as log:
        await log.ensure_topics(partitions=1)
        identity = await log.ensure_created(partitions=1, source="test")
        yield Ground(log, identity.log_id, 1, database)
    await database.close()


async def test_a_batch_in_use_is_what_the_rebuilt_rows_say_and_nobody_misses_a_fact_or_hears_one_twice(
    ground: Ground,
) -> None:
    # The processor could not decode the second upload's queueing, at offset 4.
    await ground.append(a_lane_claimed(), a_batch_created(), an_upload_queued(), an_upload_queued(SECOND))
    await ground.project(quarantined={4: "not known to this version"})
    heard: list[Folded] = []
    async with Tail.open(log=ground.log, database=ground.database, log_id=ground.log_id, partitions=1) as tail:
        async with tail.hold(BATCH) as held:
            assert held is not None
            assert list(held.uploads) == [UPLOAD]
            tail.listen(heard.append)
            await ground.append(an_upload_started(), an_upload_started(SECOND))
            await until(lambda: len(heard) == 2)

            await ground.replay(retried=frozenset({(0, 4)}))
            await ground.append(a_batch_sealed())
            await until(lambda: SECOND in held.uploads and len(heard) == 3)
            await ground.append(an_upload_succeeded(), an_upload_succeeded(SECOND))
            await until(lambda: len(heard) == 5)

            await ground.project()
            snapshot = await ground.database.snapshot(BATCH)
            assert (held.batch, held.uploads) == (snapshot.batch, snapshot.uploads)
            assert {upload.status for upload in held.uploads.values()} == {"completed"}
        assert [each.fact.offset for each in heard] == [5, 6, 7, 8, 9]
        await until(lambda: tail.problems() == [])


async def test_nothing_is_missed_of_a_followed_users_batch_that_a_retry_brought_to_life(ground: Ground) -> None:
    async def never(_batch_id: str, _offset: int) -> Held:
        raise AssertionError("the rows are not ahead")

    await ground.append(a_lane_claimed(), a_batch_created(), an_upload_queued())
    await ground.project(quarantined={2: "not known to this version"})
    heard: list[Folded] = []
    async with Tail.open(
        log=ground.log, database=ground.database, log_id=ground.log_id, partitions=1, past=never
    ) as tail:
        tail.follow(USER, pytest.fail)
        tail.listen(heard.append)

        await ground.replay(retried=frozenset({(0, 2)}))
        await until(lambda: tail._generation == "gen_2")
        await ground.append(an_upload_started())

        await until(lambda: [each.fact.offset for each in heard] == [4])
        assert isinstance(heard[0].outcome, Changed)


async def test_a_tail_reads_no_further_than_it_may_hold_until_the_read_models_follow(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "FACTS_OVER_MAX", 20)
    monkeypatch.setattr(tails, "READ_RECORDS_MAX", 10)
    uploads = [an_upload_queued(an_id("one of many", number)) for number in range(300)]
    await ground.append(a_lane_claimed(), a_batch_created(), *uploads)
    async with Tail.open(
        log=ground.log, database=ground.database, log_id=ground.log_id, partitions=1, facts_max=100
    ) as tail:
        await until(lambda: tail.unprojected() >= 120)

        assert not await tail.reached_end(0.3)
        assert (tail.full, tail.unprojected()) == (True, 120)
        waits = "120 facts wait for the read models, so the log is read no further until these move"
        await until(lambda: tail.problems() == [waits])
        assert tail.lag_s() == float("inf")
        await ground.project(poll=100)
        assert await tail.reached_end(SOON_S)
        await until(lambda: tail.unprojected() == 0)
        await until(lambda: tail.problems() == [])
        assert not tail.full
