"""Postgres or Kafka goes away while a lane is at work: it pauses, says so, and goes on by itself; nothing is lost."""

import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from schemas.batch import Batch, Upload
from schemas.events import BatchSealed, UploadAttemptFailed, UploadStarted, UploadSucceeded
from services.embedded import EmbeddedKafka, EmbeddedPostgres
from tests.lanes import Lane, a_lane
from tests.pausing import paused

PICTURES = ["cat.png", "coffee.webp", "rocket.jpg", "stream.jpg"]


@contextlib.asynccontextmanager
async def lane_on(kafka: str, database_url: str, folder: Path) -> AsyncIterator[Lane]:
    async with a_lane(
        kafka=kafka, database_url=database_url, unique=f"t{uuid.uuid4().hex[:16]}", folder=folder
    ) as made:
        yield made


def ended(batch: Batch, _uploads: dict[str, Upload]) -> bool:
    return batch.ended


async def assert_worked_once(lane: Lane, batch_id: str, files: int) -> None:
    batch, uploads = await lane.snapshot_when(batch_id, ended)
    assert (batch.status, batch.completed, batch.failed, batch.total) == ("completed", files, 0, files)
    assert {upload.attempts for upload in uploads.values()} == {1}
    # What got no answer in time is said again with the same id, and counts once.
    events = list({fact.id: fact.event for fact in await lane.facts()}.values())
    assert sum(isinstance(event, UploadStarted) for event in events) == files
    assert sum(isinstance(event, UploadSucceeded) for event in events) == files
    assert not any(isinstance(event, UploadAttemptFailed) for event in events)


async def test_postgres_restarts_in_mid_batch(kafka: str, data_dir: Path, tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(data_dir=data_dir)
    await postgres.start()
    try:
        async with lane_on(kafka, postgres.url, tmp_path) as lane:
            batch_id = await lane.queue_pictures(PICTURES * 15, seal=False)
            process = await lane.start()
            await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 3)

            port = postgres.port
            await postgres.stop()
            await lane.append([BatchSealed(batch_id=batch_id, user_id="ada")])  # so that there is something to write
            await lane.said("part_lost")
            postgres = EmbeddedPostgres(data_dir=data_dir, port=port)
            await postgres.start()

            await assert_worked_once(lane, batch_id, files=60)
            assert process.returncode is None
            assert not any("Traceback" in line for line in lane.lines)
    finally:
        await postgres.stop()


async def test_kafka_is_paused_in_mid_batch(database_url: str, data_dir: Path, tmp_path: Path) -> None:
    async with (
        EmbeddedKafka(data_dir=data_dir) as kafka,
        lane_on(kafka.bootstrap_servers, database_url, tmp_path) as lane,
    ):
        batch_id = await lane.queue_pictures(PICTURES * 15)
        process = await lane.start()
        await lane.until(batch_id, lambda batch, _uploads: batch.completed >= 3)

        with paused(kafka.pid):
            await lane.said("part_lost")

        await assert_worked_once(lane, batch_id, files=60)
        assert process.returncode is None
