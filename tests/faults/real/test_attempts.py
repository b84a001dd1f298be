"""Attempts are honest: a crash is one, two are `worker_crashed`; a clean stop, a pause or a Postgres that restarts is
none; and a file that kills its decoder costs its own attempts only.

The files here say in a word how their work goes (tests/work_handlers.py), which a processor learns of by an installed
entry point, as any plug-in.
"""

import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from schemas.batch import Upload
from schemas.events import BatchCreated, BatchSealed, Limits, LogEvent, UploadInterrupted, UploadQueued
from services.embedded import EmbeddedPostgres
from tests.faults.checking import Evidence, violations
from tests.faults.real import gathering, table
from tests.lanes import Lane, a_lane, a_new_id
from tests.work_handlers import CONTENT_TYPE

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine

ENTRY_POINTS = "[sluice.work]\nword = tests.work_handlers:handler\n"


@pytest.fixture
def plug_in(tmp_path: Path) -> dict[str, str]:
    """The environment in which the word handler is installed."""
    installed = tmp_path / "plug-in" / "words-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: words\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    return {"PYTHONPATH": str(installed.parent)}


@contextlib.asynccontextmanager
async def a_checked_lane(kafka: str, database_url: str, unique: str, folder: Path) -> AsyncIterator[Lane]:
    """A lane that is held to every invariant at the end."""
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=folder) as lane:
        yield lane
        evidence = Evidence(records=await gathering.records_of(lane.log), rows=await gathering.rows_of(database_url))
        assert violations(evidence) == []


@pytest.fixture
async def lane(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Lane]:
    async with a_checked_lane(kafka, database_url, unique, tmp_path) as made:
        yield made


async def queue_words(lane: Lane, words: Sequence[str]) -> str:
    """A sealed batch of files that hold these words."""
    batch_id = a_new_id()
    limits = Limits(files_max=1000, batch_bytes_max=10**10, file_bytes_max=10**8)
    events: list[LogEvent] = [BatchCreated(batch_id=batch_id, user_id="ada", limits=limits)]
    for number, word in enumerate(words):
        upload_id = a_new_id()
        (lane.blobs / upload_id).mkdir()
        (lane.blobs / upload_id / "original").write_text(word)
        events.append(
            UploadQueued(
                batch_id=batch_id,
                user_id="ada",
                upload_id=upload_id,
                filename=f"{number} {word}",
                content_type=CONTENT_TYPE,
                size_bytes=len(word),
                sha256=hashlib.sha256(word.encode()).hexdigest(),
                blob=f"{upload_id}/original",
            )
        )
    await lane.append([*events, BatchSealed(batch_id=batch_id, user_id="ada")])
    return batch_id


async def ended(lane: Lane, batch_id: str) -> list[Upload]:
    """The batch's uploads when it ended, in queue order."""
    _, uploads = await lane.snapshot_when(batch_id, lambda batch, _uploads: batch.ended)
    return sorted(uploads.values(), key=lambda upload: upload.created_offset)


def how(upload: Upload) -> tuple[str, int, str | None]:
    return upload.status, upload.attempts, upload.error_code


async def in_work(lane: Lane, batch_id: str) -> None:
    await lane.until(batch_id, lambda batch, _uploads: batch.processing == 1)


async def test_a_crash_is_an_attempt_and_two_are_worker_crashed(lane: Lane, plug_in: dict[str, str]) -> None:
    # Given two files, and processors that die with each of them once, and with the second a second time
    batch_id = await queue_words(lane, ["hello", "hello again"])

    for fault in ("processor.in_work:kill", "processor.in_work:kill", "processor.in_work:kill:2"):
        process = await lane.start(**plug_in, SLUICE_FAULT=fault)
        await process.wait()
        table.injected("processor: kill at in_work")
    await lane.start(**plug_in)
    uploads = await ended(lane, batch_id)

    assert list(map(how, uploads)) == [("completed", 2, None), ("failed", 2, "worker_crashed")]


async def test_a_file_that_kills_its_decoder_costs_its_own_attempts_only(lane: Lane, plug_in: dict[str, str]) -> None:
    batch_id = await queue_words(lane, ["hello 1", "die SEGV", "hello 2", "die KILL", "hello 3"])

    process = await lane.start(**plug_in)
    uploads = await ended(lane, batch_id)

    table.injected("decoder: dies")
    assert [how(upload) for upload in uploads] == [
        ("completed", 1, None),
        ("failed", 2, "worker_crashed"),
        ("completed", 1, None),
        ("failed", 2, "worker_crashed"),
        ("completed", 1, None),
    ]
    assert process.returncode is None


async def test_a_clean_stop_in_mid_work_costs_no_attempt(lane: Lane, plug_in: dict[str, str]) -> None:
    batch_id = await queue_words(lane, ["sleep", "hello"])
    process = await lane.start(**plug_in)
    await in_work(lane, batch_id)

    process.terminate()
    await process.wait()
    table.injected("processor: terminated in mid work")
    (lane.blobs / (await first_upload(lane, batch_id)).id / "original").write_text("hello")  # as long as before
    await lane.start(**plug_in)
    uploads = await ended(lane, batch_id)

    assert process.returncode == 0
    assert [how(upload) for upload in uploads] == [("completed", 1, None)] * 2
    assert sum(isinstance(fact.event, UploadInterrupted) for fact in await lane.facts()) == 1


async def first_upload(lane: Lane, batch_id: str) -> Upload:
    _, uploads = await lane.snapshot_when(batch_id, lambda _batch, uploads: bool(uploads))
    return min(uploads.values(), key=lambda upload: upload.created_offset)


async def test_a_pause_that_loses_the_lock_and_a_postgres_that_restarts_cost_no_attempt(
    kafka: str, unique: str, data_dir: Path, tmp_path: Path, plug_in: dict[str, str]
) -> None:
    postgres = EmbeddedPostgres(data_dir=data_dir)
    await postgres.start()
    try:
        async with a_checked_lane(kafka, postgres.url, unique, tmp_path) as lane:
            # Given a processor at work, paused until it has lost its lock
            process = await lane.start(**plug_in, SLUICE_FAULT="processor.in_work:stop:2")
            batch_id = await queue_words(lane, ["hello"] * 4)
            await lane.said("SLUICE_FAULT: stop")
            await lane.lock_is_free()
            table.injected("processor: stop at in_work")

            # When it goes on, and Postgres restarts
            os.kill(process.pid, signal.SIGCONT)
            uploads = await ended(lane, batch_id)
            port = postgres.port
            await postgres.stop()
            table.injected("postgres restarted")
            postgres = EmbeddedPostgres(data_dir=data_dir, port=port)
            await postgres.start()
            uploads += await ended(lane, await queue_words(lane, ["hello"] * 2))

            # Then no attempt was wasted, and the process is still the same
            assert [how(upload) for upload in uploads] == [("completed", 1, None)] * 6
            assert process.returncode is None
    finally:
        await postgres.stop()
