"""A lane changes hands: at once when it is given back, soon when its holder is gone, never because of a hiccup.

Times are taken from the log: when the signal was sent, and when the next claim was appended.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from schemas.batch import Batch, Upload
from schemas.events import LaneClaimed, UploadAttemptFailed, UploadFailed
from services.database import Database
from services.lifecycle import cancelled
from services.processor import lock as lock_module
from services.processor.lock import LaneLock
from services.processor.presence import Condition, Presence, Worker
from tests.lanes import WAIT_S, Lane, a_lane

PICTURES = ["cat.png", "coffee.webp", "rocket.jpg", "stream.jpg"]
STOP_S_MAX = 2.0
LOST_S_MAX = 10.0


@pytest.fixture
async def lane(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Lane]:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as made:
        yield made


def ended(batch: Batch, _uploads: dict[str, Upload]) -> bool:
    return batch.ended


async def claims(lane: Lane) -> list[tuple[str, float]]:
    """Who claimed the lane, and when, in seconds since 1970."""
    return [
        (fact.event.worker_id, fact.timestamp_ms / 1000)
        for fact in await lane.facts()
        if isinstance(fact.event, LaneClaimed)
    ]


async def another_stands_by(lane: Lane) -> asyncio.subprocess.Process:
    heard = len([line for line in lane.lines if "standing_by" in line])
    process = await lane.start(SLUICE_PROCESSOR_PORT="0")
    async with asyncio.timeout(WAIT_S):
        while len([line for line in lane.lines if "standing_by" in line]) == heard:
            lane.heard.clear()
            await lane.heard.wait()
    return process


@pytest.mark.alone
async def test_a_standby_takes_over_after_a_stop_a_pause_and_a_kill_within_its_time(lane: Lane) -> None:
    # Given a holder in the middle of a batch, and another processor that stands by.
    batch_id = await lane.queue_pictures(PICTURES * 100)
    first = await lane.start()
    await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 1)
    second = await another_stands_by(lane)

    # When the holder is stopped, the next one paused, and the one after that killed.
    stopped_at = time.time()
    first.send_signal(signal.SIGTERM)
    assert await first.wait() == 0
    done = (await lane.until(batch_id, lambda batch, _uploads: batch.processing > 0)).completed
    await lane.until(batch_id, lambda batch, _uploads: batch.completed > done)
    third = await another_stands_by(lane)
    paused_at = time.time()
    second.send_signal(signal.SIGSTOP)
    await _claimed(lane, 3)
    second.send_signal(signal.SIGCONT)
    left = await asyncio.wait_for(second.wait(), WAIT_S)
    await another_stands_by(lane)
    killed_at = time.time()
    third.send_signal(signal.SIGKILL)
    await third.wait()
    await _claimed(lane, 4)
    batch, uploads = await lane.snapshot_when(batch_id, ended)

    # Then each took over in time, the paused one left when it saw that, and every file has one good outcome.
    times = [at for _worker, at in await claims(lane)]
    assert times[1] - stopped_at <= STOP_S_MAX
    assert times[2] - paused_at <= LOST_S_MAX
    assert times[3] - killed_at <= LOST_S_MAX
    assert left == 1
    await lane.said("claimed the lane at", "was claimed by another processor", "another processor writes this lane")
    assert (batch.status, batch.completed, batch.total) == ("completed", 400, 400)
    facts = await lane.facts()
    assert sum(isinstance(fact.event, UploadAttemptFailed) for fact in facts) <= 2  # of the pause and of the kill
    assert not any(isinstance(fact.event, UploadFailed) for fact in facts)
    assert max(upload.attempts for upload in uploads.values()) <= 2


async def test_a_transaction_that_a_paused_holder_left_open_keeps_nobody_out(lane: Lane, database_url: str) -> None:
    # Given the session of a holder that was paused between two messages of a command: no timeout of Postgres' ends it.
    first = await lane.start()
    await _claimed(lane, 1)
    first.send_signal(signal.SIGTERM)
    assert await first.wait() == 0
    zombie = await asyncpg.connect(database_url, server_settings={"application_name": "sluice-lane-0 zombie"})
    await zombie.execute("BEGIN; SELECT FROM gen_1.positions FOR UPDATE")
    busy = asyncio.create_task(zombie.execute("SELECT pg_sleep(600)"))
    async with asyncio.timeout(WAIT_S), lane.database.connection() as connection:
        age = "SELECT clock_timestamp() - xact_start > interval '3 seconds' FROM pg_stat_activity WHERE pid = $1"
        while not await connection.fetchval(age, zombie.get_server_pid()):  # noqa: ASYNC110  # nobody is told of it
            await asyncio.sleep(0.05)

    # When another processor takes the lane, then it ends that session and goes on.
    second = await lane.start()
    await _claimed(lane, 2)
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError)):
        await busy
    await lane.said("transactions_ended")
    assert second.returncode is None


async def _claimed(lane: Lane, times: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while len(await claims(lane)) < times:  # noqa: ASYNC110  # a claim touches no batch, so nobody is told of it
            await asyncio.sleep(0.2)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url)
    await opened.migrate()
    yield opened
    await opened.close()


def a_worker(name: str, *, machine: str = "elsewhere") -> Worker:
    return Worker(name, machine, 1)


@contextlib.asynccontextmanager
async def telling(database: Database, worker: Worker, state: str = "working") -> AsyncIterator[Presence]:
    """This worker's row, kept up to date."""
    condition = Condition(state, 1, None, (), ())
    async with Presence.open(database, worker, partition=0, look=lambda: condition) as presence:
        await _told(database, worker)
        yield presence


async def _told(database: Database, worker: Worker) -> None:
    async with asyncio.timeout(WAIT_S), database.connection() as connection:
        query = "SELECT count(*) FROM sluice_ops.processors WHERE worker_id = $1"
        while not await connection.fetchval(query, worker.worker_id):  # noqa: ASYNC110  # nobody is told of it
            await asyncio.sleep(0.02)


async def taking(lock: LaneLock) -> float:
    """Take it; for how many seconds that took."""
    began = time.monotonic()
    async with asyncio.timeout(20):
        await lock.take()
    return time.monotonic() - began


async def silence(presence: Presence) -> None:
    """What is left of a worker that was killed: its row, and nobody who writes it."""
    writing, presence._writing = presence._writing, None
    assert writing is not None
    await cancelled(writing)


@contextlib.asynccontextmanager
async def gone(database: Database, *, heard: str = "heartbeat") -> AsyncIterator[None]:
    """A worker elsewhere that was killed. `heard`: when it last was, in SQL."""
    async with telling(database, a_worker("gone")) as presence:
        await silence(presence)
        async with database.connection() as connection:
            await connection.execute(f"UPDATE sluice_ops.processors SET heartbeat = {heard}")
        yield


async def test_a_holder_whose_connection_was_cut_has_the_lane_back_before_a_standby_may(
    database: Database,
) -> None:
    holder, standby = a_worker("holder"), a_worker("standby")
    async with (
        telling(database, holder),
        LaneLock.open(database, holder, partition=0) as held,
        LaneLock.open(database, standby, partition=0) as wanted,
    ):
        await held.take()
        keeping = asyncio.create_task(held.keep())
        waiting = asyncio.create_task(wanted.take())
        lost = asyncio.Event()
        held.on_change = lost.set
        try:
            async with database.connection() as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
                    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            async with asyncio.timeout(10):
                await lost.wait()
                while not held.held:
                    lost.clear()
                    await lost.wait()
        finally:
            await cancelled(keeping, waiting)

        assert (held.held, wanted.held) == (True, False)


async def test_a_free_lane_is_left_alone_while_its_holder_was_heard_a_moment_ago(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "COMING_BACK_S", 1.5)
    async with gone(database), LaneLock.open(database, a_worker("next"), partition=0) as lock:
        waited_s = await taking(lock)

    assert 1.0 < waited_s < 10


async def test_who_finds_postgres_at_the_same_time_as_the_last_holder_lets_that_one_go_first(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "COMING_BACK_S", 1.5)
    async with gone(database, heard="now() - interval '1 minute'"):
        async with LaneLock.open(database, a_worker("next"), partition=0) as lock:
            waited_s = await taking(lock)
        async with database.connection() as connection:
            await connection.execute("DROP TABLE sluice_ops.processors")
        monkeypatch.setattr(lock_module, "COMING_BACK_S", 60.0)
        async with LaneLock.open(database, a_worker("without rows"), partition=0) as lock:
            waited_without_s = await taking(lock)

    assert 1.0 < waited_s < 10
    assert waited_without_s < 10


async def test_a_holder_that_seems_to_be_heard_in_an_hour_is_waited_for_no_longer_than_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres' clock was set back since."""
    monkeypatch.setattr(lock_module, "COMING_BACK_S", 0.5)
    async with (
        gone(database, heard="now() + interval '1 hour'"),
        LaneLock.open(database, a_worker("next"), partition=0) as lock,
    ):
        assert await taking(lock) < 10


async def test_a_lane_that_was_given_back_or_whose_holder_surely_ended_is_taken_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "COMING_BACK_S", 60.0)
    here = Worker.this_process()
    async with telling(database, a_worker("given back")) as presence:
        await presence.leave()
    ended_process = await asyncio.create_subprocess_exec("true")
    await ended_process.wait()
    async with telling(database, Worker("ended", here.machine, ended_process.pid)) as presence:
        await silence(presence)
    async with (
        telling(database, a_worker("standing by as well"), "standing by"),
        LaneLock.open(database, here, partition=0) as lock,
    ):
        waited_s = await taking(lock)

    assert waited_s < 10
