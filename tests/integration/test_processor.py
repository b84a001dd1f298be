"""A real processor on real Kafka and Postgres: works, resumes, gives back, gives up, and never says anything twice."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.batch import Batch, Upload
from schemas.events import (
    BatchCancelled,
    BatchCompleted,
    BatchDeleted,
    BatchSealed,
    LaneClaimed,
    UploadAttemptFailed,
    UploadFailed,
    UploadInterrupted,
    UploadStarted,
    UploadSucceeded,
)
from tests.e2e.slow import slow_pictures
from tests.lanes import WAIT_S, Lane, a_lane
from tests.pausing import paused

GOOD = ["cat.png", "coffee.webp", "dandelions-pan.gif", "dandelions.heic", "rocket.jpg", "stream.jpg"]
CORRUPT = "broken-download.jpg"


@pytest.fixture
async def lane(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Lane]:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as made:
        yield made


def ended(batch: Batch, _uploads: dict[str, Upload]) -> bool:
    return batch.ended


async def test_works_every_file_and_one_bad_file_never_stops_the_batch(lane: Lane) -> None:
    batch_id = await lane.queue_pictures([*GOOD[:3], CORRUPT, *GOOD[3:]])
    await lane.start()

    batch, uploads = await lane.snapshot_when(batch_id, ended)

    assert (batch.status, batch.completed, batch.failed, batch.total) == ("completed", 6, 1, 7)
    by_name = {upload.filename: upload for upload in uploads.values()}
    assert by_name[CORRUPT].error_code == "corrupt_media"
    assert by_name["cat.png"].result is not None
    assert (lane.blobs / by_name["cat.png"].id).joinpath(f"thumb-{await epoch_of(lane)}-1").exists()
    starts = [fact.event for fact in await lane.facts() if isinstance(fact.event, UploadStarted)]
    assert [start.upload_id for start in starts] == [
        upload.id for upload in sorted(uploads.values(), key=lambda upload: upload.created_offset)
    ]


async def test_nothing_starts_before_what_was_started_ended(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD)
    await lane.start()
    await lane.until(batch_id, ended)

    in_work: set[str] = set()
    for fact in await lane.facts():
        if isinstance(fact.event, UploadStarted):
            in_work.add(fact.event.upload_id)
            assert len(in_work) == 1
        elif isinstance(fact.event, UploadSucceeded):
            in_work.remove(fact.event.upload_id)


async def test_a_kill_in_mid_batch_and_a_new_start_finish_it_with_right_counts(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD * 8)
    first = await lane.start()
    await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 5)

    first.send_signal(signal.SIGKILL)
    await first.wait()
    await lane.start()
    batch, uploads = await lane.snapshot_when(batch_id, ended)

    assert (batch.status, batch.completed, batch.failed, batch.total) == ("completed", 48, 0, 48)
    outcomes = [fact.event.upload_id for fact in await lane.facts() if isinstance(fact.event, UploadSucceeded)]
    assert sorted(outcomes) == sorted(uploads)


async def test_a_clean_stop_gives_the_lane_back_and_costs_no_attempt(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD * 8)
    first = await lane.start()
    await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 3)

    first.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(first.wait(), WAIT_S) == 0
    await lane.start()
    batch, uploads = await lane.snapshot_when(batch_id, ended)

    assert (batch.completed, batch.total) == (48, 48)
    assert {upload.attempts for upload in uploads.values()} == {1}
    assert not [fact for fact in await lane.facts() if isinstance(fact.event, UploadAttemptFailed)]


async def test_a_file_that_takes_too_long_is_tried_once_more_and_then_failed_for_good(
    lane: Lane, tmp_path: Path
) -> None:
    (slow,) = slow_pictures(tmp_path, 1)
    batch_id = await lane.queue_pictures([str(slow)])
    await lane.start(SLUICE_WORK_TIMEOUT_S="0.01")

    batch, uploads = await lane.snapshot_when(batch_id, ended)

    (upload,) = uploads.values()
    assert (batch.status, batch.error_message) == ("failed", "Its only upload failed.")
    assert (upload.attempts, upload.error_code) == (2, "work_timeout")
    kinds = [type(fact.event) for fact in await lane.facts() if fact.upload_id == upload.id]
    assert kinds[1:] == [UploadStarted, UploadAttemptFailed, UploadStarted, UploadFailed]


async def test_a_file_whose_bytes_are_gone_fails_and_the_next_one_goes_on(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(["rocket.jpg", "cat.png"])
    (queued, *_) = [fact.event for fact in await lane.facts() if fact.upload_id is not None]
    (lane.blobs / queued.blob).unlink()
    await lane.start()

    batch, uploads = await lane.snapshot_when(batch_id, ended)

    assert (batch.status, batch.completed, batch.failed) == ("completed", 1, 1)
    assert uploads[queued.upload_id].error_code == "blob_missing"


async def test_a_cancelled_batch_ends_at_once_and_nothing_of_it_is_worked_any_more(lane: Lane, tmp_path: Path) -> None:
    # So many slow ones that they are not done before it is cancelled, however late that is.
    batch_id = await lane.queue_pictures([GOOD[0], *map(str, slow_pictures(tmp_path, 40))])
    await lane.start()
    await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 1)

    await lane.append([BatchCancelled(batch_id=batch_id, user_id="ada")])
    batch = await lane.until(batch_id, ended)
    another = await lane.queue_pictures(["cat.png"])
    await lane.until(another, ended)

    assert batch.status == "cancelled"
    assert batch.cancelled > 0
    assert batch.queued == batch.processing == 0
    uploads = (await lane.database.snapshot(batch_id)).uploads.values()
    assert batch.cancelled == sum(upload.status == "cancelled" for upload in uploads)


async def test_a_deleted_batch_leaves_a_tombstone_and_no_files(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD[:2])
    await lane.start()
    _, uploads = await lane.snapshot_when(batch_id, ended)

    await lane.append([BatchDeleted(batch_id=batch_id, user_id="ada")])
    await lane.until(batch_id, lambda batch, _uploads: batch.deleted)

    async with asyncio.timeout(WAIT_S):
        while uploads.keys() & {path.name for path in lane.blobs.iterdir()}:  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.05)


async def test_an_open_batch_is_worked_at_once_and_completes_when_it_is_sealed(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD[:1], seal=False)
    await lane.start()
    batch = await lane.until(batch_id, lambda batch, _uploads: batch.completed == 1)
    assert batch.status == "processing"

    await lane.append([BatchSealed(batch_id=batch_id, user_id="ada")])

    assert (await lane.until(batch_id, ended)).status == "completed"


async def test_an_open_batch_left_alone_is_sealed_by_itself(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD[:1], seal=False)
    await lane.start(SLUICE_IDLE_SEAL_S="1")

    assert (await lane.until(batch_id, ended)).status == "completed"
    (sealed,) = [fact.event for fact in await lane.facts() if isinstance(fact.event, BatchSealed)]
    assert sealed.reason == "idle"


async def test_a_standby_waits_and_takes_over_when_the_holder_dies(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD * 8, seal=False)
    first = await lane.start()
    await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 3)
    await lane.start()

    first.send_signal(signal.SIGKILL)
    await first.wait()
    await lane.append([BatchSealed(batch_id=batch_id, user_id="ada")])  # so that it has not ended before
    batch = await lane.until(batch_id, ended)

    assert (batch.completed, batch.failed, batch.total) == (48, 0, 48)
    facts = await lane.facts()
    claims = [fact.offset for fact in facts if isinstance(fact.event, LaneClaimed)]
    completions = [fact.event.epoch for fact in facts if isinstance(fact.event, BatchCompleted)]
    assert (len(claims), completions) == (2, [claims[1]])
    assert not [fact for fact in facts if isinstance(fact.event, UploadInterrupted)]


async def epoch_of(lane: Lane) -> int:
    (claim,) = [fact.offset for fact in await lane.facts() if isinstance(fact.event, LaneClaimed)]
    return claim


async def test_a_late_copy_of_a_start_that_was_given_back_does_not_leave_the_upload_stuck(
    lane: Lane, tmp_path: Path
) -> None:
    first = await lane.queue_pictures(["cat.png"])
    await lane.start()
    await lane.until(first, ended)
    epoch = await epoch_of(lane)
    stray = await lane.queue_pictures([*map(str, slow_pictures(tmp_path, 5)), "cat.png"])  # its turn comes late
    _, queued = await lane.snapshot_when(stray, lambda batch, _uploads: batch.queued > 1)
    last = max(queued.values(), key=lambda upload: upload.created_offset)

    await lane.append([UploadStarted(batch_id=stray, upload_id=last.id, attempt=1, epoch=epoch)])
    batch = await lane.until(stray, ended)

    assert (batch.completed, batch.total) == (6, 6)
    (given_back,) = [fact.event for fact in await lane.facts() if isinstance(fact.event, UploadInterrupted)]
    assert given_back.upload_id == last.id


async def test_a_paused_holder_loses_the_lock_and_goes_on_when_it_has_it_back(lane: Lane) -> None:
    batch_id = await lane.queue_pictures(GOOD * 8)
    process = await lane.start()
    await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 3)

    with paused(process.pid):
        await lane.lock_is_free()

    assert (await lane.until(batch_id, ended)).completed == 48
    await lane.said("lane_lock_back")
    assert process.returncode is None
    assert not any("Traceback" in line for line in lane.lines)
