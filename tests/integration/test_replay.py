"""Replay and verify on real servers: the log alone makes the same rows again, whatever runs, ends or is in the way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from schemas.events import LaneClaimed, UploadAttemptFailed, UploadQueued
from schemas.records import StoredRecord
from schemas.views import BatchView, UploadView
from services.database import Database, DatabaseUnavailable, ReadModelsGone
from services.eventlog import LogError, LogSettings
from services.processor.projection import GenerationChangedError, Projection
from services.processor.rebuilding import Progress, RebuildLock, RebuildRefused
from services.processor.replay import HOLD_MS, Replay, astray_views, mended_views
from services.processor.rows import Rows
from services.processor.verifying import Difference
from tests.examples import (
    BATCH,
    UPLOAD,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    an_id,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
)
from tests.fakes import FakeKafka, FakeLog
from tests.lanes import WAIT_S, a_lane
from tests.rebuilds import POISON, Ground, a_ground, a_story
from tests.unit.test_golden import expected, recorded

FACTS = 160


@pytest.fixture
async def ground(kafka: str, database_url: str, unique: str) -> AsyncIterator[Ground]:
    async with a_ground(kafka=kafka, database_url=database_url, topic=unique) as made:
        yield made


@contextlib.asynccontextmanager
async def ground_in_memory(
    database_url: str, records: Sequence[StoredRecord] = ()
) -> AsyncIterator[tuple[Ground, FakeKafka]]:
    """A log whose every record is the test's to change, and a real database."""
    kafka, database = FakeKafka(), await Database.open(database_url)
    async with FakeLog.open(kafka, LogSettings(bootstrap_servers="memory")) as log:
        await log.ensure_topics(partitions=1)
        kafka.topics[log.settings.topic].partitions[0].records += records
        identity = await log.ensure_created(partitions=1, source="test")
        await database.migrate()
        yield Ground(log, identity.log_id, 1, database), kafka
    await database.close()


async def test_a_replay_makes_the_same_rows_byte_for_byte_however_much_is_read_at_once(
    kafka: str, database_url: str, unique: str
) -> None:
    stories = [[*a_story(seed, facts=FACTS, partition=seed)] for seed in (0, 1)]
    async with a_ground(kafka=kafka, database_url=database_url, topic=unique, partitions=2, stories=stories) as ground:
        await ground.append(POISON, partition=1)
        await ground.project(poll=7)
        live = await ground.rows()
        assert all(live.values()), "every table has rows"

        for number, records_max in enumerate((3, 50, 10_000), start=2):
            done = await ground.replay(records_max=records_max)

            assert await ground.live() == done.generation == f"gen_{number}"
            assert await ground.rows() == live
            assert await ground.quarantine() == [(1, FACTS + 1)]
            assert await ground.schemas() == [done.generation]
            assert (done.records, done.quarantined) == (2 * FACTS + 3, 1)
        found = await ground.verify(records_max=11)
        assert (found.equal, found.shown) == (True, [])
        assert found.rows == {table: len(rows) for table, rows in live.items()}


async def test_a_batch_made_and_deleted_leaves_the_same_whether_in_one_transaction_or_two(ground: Ground) -> None:
    await ground.append(a_lane_claimed(), a_batch_created(), an_upload_queued(), a_batch_deleted())
    await ground.project(poll=1)
    one_by_one = await ground.rows()

    await ground.replay()

    assert await ground.rows() == one_by_one
    assert one_by_one["users"] == ["(ada)"]


async def test_verify_names_the_row_and_the_column_that_were_tampered_with_and_replay_mends_it(ground: Ground) -> None:
    await ground.append(*a_story(2, facts=FACTS))
    await ground.append(a_batch_created(), an_upload_queued())
    await ground.project()
    truth = await ground.rows()
    live = await ground.live()
    await ground.execute(f"UPDATE {live}.uploads SET filename = 'other.jpg' WHERE id = '{UPLOAD}'")
    await ground.execute(f"DELETE FROM {live}.batch_events WHERE record_offset = 5")

    found = await ground.verify()

    assert found.differing == {"uploads": 1, "batch_events": 1}
    told = {(each.table, each.key, each.column): (each.live, each.rebuilt) for each in found.shown}
    assert told["uploads", UPLOAD, "filename"] == ("other.jpg", f"{UPLOAD[:8]}.jpg")
    ((_, key, column), (here, there)) = next(item for item in told.items() if item[0][0] == "batch_events")
    assert (key, column, here) == ("0, 5", None, None)
    assert there is not None
    assert "record_offset=5" in there
    assert await ground.schemas() == [live]
    await ground.replay()
    assert await ground.rows() == truth
    assert (await ground.verify()).equal


async def test_views_that_do_not_show_the_live_tables_are_differences_and_a_replay_points_them(ground: Ground) -> None:
    await ground.append(*a_story(2, facts=FACTS))
    await ground.project()
    await ground.execute("CREATE SCHEMA gen_0; CREATE TABLE gen_0.users (id text)")
    await ground.execute("CREATE OR REPLACE VIEW public.users AS SELECT id FROM gen_0.users")
    await ground.execute("DROP VIEW public.positions")

    found = await ground.verify()

    assert found.differing == {"views": 2}
    assert found.shown == [
        Difference("views", "public.positions", None, None, "gen_1.positions"),
        Difference("views", "public.users", "shows", "gen_0.users", "gen_1.users"),
    ]
    await ground.replay()
    assert (await ground.verify()).equal


async def test_views_are_pointed_at_the_live_tables_and_whoever_may_read_them_still_may(ground: Ground) -> None:
    await ground.execute("CREATE SCHEMA gen_0; CREATE TABLE gen_0.users (id text)")
    await ground.execute("CREATE OR REPLACE VIEW public.users AS SELECT id FROM gen_0.users")
    await ground.execute("GRANT SELECT ON public.users TO PUBLIC")

    changed = [await mended_views(ground.database) for _ in range(2)]

    assert changed == [["public.users showed gen_0.users, and shows gen_1 now"], []]
    async with ground.database.connection() as connection:
        assert await astray_views(connection, "gen_1") == {}
        assert await connection.fetchval("SELECT has_table_privilege('pg_monitor', 'public.users', 'SELECT')")


async def test_what_has_the_name_of_a_view_and_is_none_is_left_alone_with_a_word(ground: Ground) -> None:
    await ground.execute("DROP VIEW public.users; CREATE TABLE public.users (id text)")

    with pytest.raises(RebuildRefused, match=r"not the view that Sluice made \(.*users.*rename or drop it"):
        await mended_views(ground.database)

    async with ground.database.connection() as connection:
        assert await astray_views(connection, "gen_1") == {"users": "no table"}


async def test_verify_counts_all_rows_that_differ_and_shows_the_first_hundred_values(ground: Ground) -> None:
    queued = [an_upload_queued(an_id("one of many", number)) for number in range(120)]
    await ground.append(a_lane_claimed(), a_batch_created(), *queued)
    await ground.project(poll=1_000)
    await ground.execute(f"UPDATE {await ground.live()}.uploads SET size_bytes = 1")

    found = await ground.verify()

    assert found.differing == {"uploads": 120}
    assert len(found.shown) == 100


async def test_a_lane_that_writes_all_the_time_is_switched_over_without_losing_or_doubling_a_fact(
    ground: Ground,
) -> None:
    await ground.append(a_lane_claimed(), a_batch_created())
    writing = asyncio.create_task(_work_for_ever(ground))

    for _ in range(3):
        done = await ground.replay(records_max=50)
        assert done.held_ms <= HOLD_MS
    written = (await ground.database.positions())[0].next_offset
    async with asyncio.timeout(WAIT_S):
        while (await ground.database.positions())[0].next_offset == written:  # noqa: ASYNC110  # by the lane, not by us
            await asyncio.sleep(0.01)
    found = await ground.verify()

    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    assert await ground.live() == "gen_4"
    assert (found.equal, found.shown) == (True, [])


async def _work_for_ever(ground: Ground) -> None:
    """A lane: facts are appended, folded and written a few at a time; taken anew where it is told to."""
    reader = ground.log.reader([0])
    number = 0
    while True:
        with contextlib.suppress(GenerationChangedError, DatabaseUnavailable, LogError):
            projection = await Projection.open(await Rows.live(ground.database), partition=0, log_id=ground.log_id)
            await reader.seek(0, projection.lane.next_offset)
            while True:
                number += 1
                await ground.append(an_upload_queued(an_id("on and on", number)))
                await projection.fold(await reader.read(records_max=3, timeout_ms=100))
                await projection.flush()


async def test_what_a_lane_had_not_committed_when_the_rows_were_switched_is_refused(ground: Ground) -> None:
    await ground.append(a_lane_claimed(), a_batch_created())
    projection = await Projection.open(await Rows.live(ground.database), partition=0, log_id=ground.log_id)
    reader = ground.log.reader([0])
    await reader.seek(0, 0)
    await projection.fold(await reader.read(records_max=10, timeout_ms=1_000))
    await reader.close()

    await ground.replay()

    with pytest.raises(GenerationChangedError, match="gen_2 is live, and no longer gen_1"):
        await projection.flush()
    with pytest.raises(GenerationChangedError):
        await projection.batch(an_id("not in memory"))


async def test_a_processor_goes_on_with_the_rebuilt_rows_and_no_file_in_work_loses_an_attempt(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as lane:
        log_id = await lane.log.identify()
        assert log_id is not None
        ground = Ground(lane.log, log_id, 1, lane.database)
        batch_id = await lane.queue_pictures(["cat.png", "rocket.jpg", "fig.webp"] * 12)
        await lane.start()
        await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 3)

        await ground.replay()
        await lane.said("lane_begins_anew")
        _, uploads = await lane.snapshot_when(batch_id, lambda batch, _uploads: batch.ended)

        facts = [fact.event for fact in await lane.facts()]
        assert {upload.attempts for upload in uploads.values()} == {1}
        assert [event for event in facts if isinstance(event, UploadAttemptFailed)] == []
        assert len([event for event in facts if isinstance(event, LaneClaimed)]) == 2
        assert (await ground.verify()).equal


async def test_a_replay_outlives_cut_connections(ground: Ground, database_url: str) -> None:
    await ground.append(*a_story(7, facts=FACTS))
    await ground.project()
    live = await ground.rows()
    others = "pid <> pg_backend_pid() AND datname = current_database() AND backend_type = 'client backend'"
    killer = await asyncpg.connect(database_url)
    killed: list[int] = []

    replaying = asyncio.create_task(ground.replay(records_max=4))
    while not replaying.done():
        killed += [
            row[0]
            for row in await killer.fetch(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        ]
        await asyncio.wait({replaying}, timeout=0.6)
        if len(killed) > 8:
            break
    done = await replaying
    await killer.close()

    assert killed
    # Looked at by connections that come after: some that were cut may not have noticed.
    ground.database, cut = await Database.open(database_url), ground.database
    await cut.close()
    assert (await ground.live(), await ground.rows()) == (done.generation, live)
    await ground.database.close()


async def test_a_replay_waits_for_a_log_that_is_away(database_url: str) -> None:
    async with ground_in_memory(database_url) as (ground, kafka):
        await ground.append(*a_story(8, facts=FACTS))
        await ground.project()
        live = await ground.rows()

        kafka.pause()
        replaying = asyncio.create_task(ground.replay())
        await asyncio.wait({replaying}, timeout=0.5)
        assert not replaying.done()
        kafka.resume()
        await replaying

        assert await ground.rows() == live


async def test_a_second_rebuild_is_refused_while_one_runs(ground: Ground) -> None:
    await ground.append(a_lane_claimed())
    await ground.project()

    async with RebuildLock.taken(ground.database):
        with pytest.raises(RebuildRefused, match="another replay or verify works on this database since"):
            await ground.replay()
        with pytest.raises(RebuildRefused, match="another replay or verify"):
            await ground.verify()

    assert await ground.live() == "gen_1"
    assert (await ground.replay()).generation == "gen_2"


async def test_a_replay_that_ends_in_its_middle_leaves_the_live_rows_and_the_next_one_cleans_up(ground: Ground) -> None:
    await ground.append(*a_story(3, facts=FACTS))
    await ground.project()
    live = await ground.rows()
    middle = asyncio.Event()

    def on_step(progress: Progress) -> None:
        if progress.records > FACTS // 2:
            middle.set()

    replay = Replay(
        log=ground.log, log_id=ground.log_id, partitions=1, database=ground.database, on_step=on_step, records_max=5
    )
    running = asyncio.create_task(replay.run())
    await middle.wait()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running

    assert (await ground.live(), await ground.rows()) == ("gen_1", live)
    assert await ground.schemas() == ["gen_1", "gen_2"]
    assert (await ground.verify()).equal
    assert (await ground.replay()).generation == "gen_2"
    assert (await ground.schemas(), await ground.rows()) == (["gen_2"], live)


async def test_read_models_of_an_older_sluice_get_the_columns_they_lack_and_a_replay_fills_them(ground: Ground) -> None:
    await ground.append(*a_story(6, facts=FACTS))
    await ground.project()
    live = await ground.rows()
    await ground.execute("ALTER TABLE gen_1.upload_batches DROP COLUMN retries")

    with pytest.raises(ReadModelsGone):
        await ground.database.snapshot(BATCH)
    await ground.database.migrate()

    assert not (await ground.verify()).equal
    await ground.replay()
    assert await ground.rows() == live
    assert (await ground.verify()).equal


async def test_a_database_of_another_log_is_rebuilt_from_this_one(
    ground: Ground, kafka: str, database_url: str, unique: str
) -> None:
    await ground.append(*a_story(4, facts=FACTS), POISON)
    await ground.project()
    async with a_ground(kafka=kafka, database_url=database_url, topic=f"{unique}b") as other:
        await other.append(*a_story(5, facts=20))
        with pytest.raises(RebuildRefused, match="rebuild them from it with `sluice replay`"):
            await other.verify()

        await other.replay()

        assert {lane.log_id for lane in (await other.database.positions()).values()} == {other.log_id}
        assert (await other.verify()).equal


async def test_read_models_beyond_the_end_of_their_log_are_rebuilt_to_where_it_ends_now(database_url: str) -> None:
    async with ground_in_memory(database_url) as (ground, kafka):
        await ground.append(*a_story(6, facts=FACTS))
        await ground.project()
        del kafka.topics[ground.log.settings.topic].partitions[0].records[100:]
        with pytest.raises(RebuildRefused, match="include 161 records of partition 0, and the log holds 100"):
            await ground.verify()

        done = await ground.replay()

        assert done.next_offsets == {0: 100}
        assert (await ground.verify()).equal


async def test_what_is_in_quarantine_stays_uncounted_until_it_is_retried(ground: Ground) -> None:
    # An older version could not decode the second upload's queueing, so all that followed from it was ignored.
    second = an_id("second")
    queued: list[UploadQueued] = [an_upload_queued(), an_upload_queued(second)]
    first = await ground.append(
        a_lane_claimed(),
        a_batch_created(),
        *queued,
        POISON,
        a_batch_sealed(),
        an_upload_started(second),
        an_upload_succeeded(second),
    )
    place, poison = (0, first + 3), (0, first + 4)
    await ground.project(quarantined={place[1]: "not known to this version"})
    before = await ground.rows()
    assert await ground.quarantine() == [place, poison]
    assert len(before["uploads"]) == 1
    assert (await ground.verify()).equal

    await ground.replay()
    assert (await ground.rows(), await ground.quarantine()) == (before, [place, poison])
    done = await ground.replay(retried=frozenset({place, poison}))

    assert (done.quarantined, await ground.quarantine()) == (1, [poison])
    assert (await ground.verify()).equal
    snapshot = await ground.database.snapshot(BATCH)
    assert {upload.id: upload.status for upload in snapshot.uploads.values()} == {UPLOAD: "queued", second: "completed"}


async def test_a_lane_that_begins_anew_leaves_in_quarantine_what_was_there(ground: Ground) -> None:
    await ground.append(a_lane_claimed(), a_batch_created(), an_upload_queued())
    await ground.project(quarantined={3: "not known to this version"})
    before = await ground.rows()

    await ground.execute(f"DROP SCHEMA {await ground.live()} CASCADE")
    await ground.database.migrate()
    await ground.project()

    assert (await ground.rows(), await ground.quarantine()) == (before, [(0, 3)])


async def test_a_recorded_log_of_each_version_replays_to_the_rows_it_meant(database_url: str) -> None:
    then, records = expected("v1.expected.json"), recorded("v1.ndjson")
    async with ground_in_memory(database_url, records) as (ground, _kafka):
        log_id = then["lane"]["log_id"]

        await ground.replay(records_max=9)

        lane = (await ground.database.positions())[0]
        assert {name: getattr(lane, name) for name in then["lane"]} == then["lane"]
        found = [await ground.database.snapshot(key) for key in (*then["batches"], *then["deleted"])]
        batches = [snapshot.batch for snapshot in found if snapshot.batch is not None]
        assert [batch.id for batch in batches if batch.deleted] == then["deleted"]
        shown = {b.id: BatchView.of_log(b, log_id=log_id).model_dump(mode="json") for b in batches if not b.deleted}
        assert _as_recorded(shown, then["batches"]) == then["batches"]
        uploads = {
            upload.id: UploadView.of_log(upload, log_id=log_id, partition=0).model_dump(mode="json")
            | {"place": upload.place, "queueing": upload.queueing}
            for snapshot in found
            for upload in snapshot.uploads.values()
        }
        assert _as_recorded(uploads, then["uploads"]) == then["uploads"]


def _as_recorded(now: dict[str, dict[str, Any]], then: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is shown now, without the members that were not there then."""
    return {key: {name: value for name, value in shown.items() if name in then[key]} for key, shown in now.items()}
