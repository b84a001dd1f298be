"""Sweeping the blob store of a real lane: what is wanted stays, what is left over goes, what is wrong is told."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.events import BatchDeleted, UploadQueued
from schemas.records import NewRecord
from services.blobs import LocalBlobs
from services.blobs.local_shelf import TRASH
from services.sweeping import Report, Sweeper, SweepRefused
from tests.integration.api_client import files_below
from tests.lanes import WAIT_S, Lane, a_lane, a_new_id

DAY_S = 24 * 3600.0
WEEK_S = 7 * DAY_S


@pytest.fixture
async def lane(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Lane]:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as lane:
        yield lane


async def swept(lane: Lane, **changes: Any) -> Report:
    steps: list[str] = []
    async with LocalBlobs.open(lane.blobs, fsync=False) as store:
        options: dict[str, Any] = {
            "age_s": DAY_S,
            "trash_s": WEEK_S,
            "dry_run": False,
            "contents": True,
            "on_step": lambda report: steps.append(report.step),
        } | changes
        report = await Sweeper(log=lane.log, database=lane.database, store=store, **options).run()
    assert (steps[0], steps[-1]) == ("waiting for the read models", "done")
    return report


def lay(lane: Lane, name: str, *, age_s: float = 2 * DAY_S, content: bytes = b"left over") -> Path:
    """A blob that lies there since so long."""
    path = lane.blobs / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    grow_old(path, age_s=age_s)
    return path


def grow_old(path: Path, *, age_s: float = 2 * DAY_S) -> None:
    then_s = time.time() - age_s
    os.utime(path, (then_s, then_s))


def blobs(lane: Lane) -> set[str]:
    """What lies in the store, without the trash and what the processor writes each second to see whether it can."""
    found = (path.relative_to(lane.blobs).as_posix() for path in files_below(lane.blobs))
    return {name for name in found if not name.startswith((TRASH, ".check-"))}


def trash(lane: Lane) -> set[str]:
    found = (path.relative_to(lane.blobs / TRASH) for path in (lane.blobs / TRASH).rglob("*") if path.is_file())
    return {"/".join(path.parts[1:]) for path in found}


async def test_what_is_wanted_stays_and_what_is_left_over_goes_into_the_trash(lane: Lane) -> None:
    # Given worked pictures that are old, and beside them what crashes left, old and young.
    await lane.start()
    batch_id = await lane.queue_pictures(["cat.png", "broken-download.jpg"])
    _, uploads = await lane.snapshot_when(batch_id, lambda batch, _: batch.ended)
    cat = next(upload for upload in uploads.values() if upload.filename == "cat.png")
    wanted = blobs(lane)
    for name in wanted:
        grow_old(lane.blobs / name)
    (thumbnail,) = (name for name in wanted if "thumb" in name)
    left = {
        f"{a_new_id()}/abandoned",
        f"{cat.id}/another-try",
        f"{cat.id}/thumb-0-{cat.attempts}",
        f"{cat.id}/thumb-99-{cat.attempts + 1}",
    }
    for name in left:
        lay(lane, name)
    young = lay(lane, f"{a_new_id()}/young", age_s=DAY_S / 2)
    foreign = lay(lane, f"{cat.id}/a file of somebody's.txt")

    # When it is swept, first to see what would be done.
    tried = await swept(lane, dry_run=True)
    untouched = blobs(lane)
    report = await swept(lane)
    again = await swept(lane)

    # Then just the old leftovers are gone, and lie in the trash.
    assert (set(tried.discarded), tried.young) == (left, 1)
    assert untouched >= wanted | left
    assert (set(report.discarded), report.young, report.faults) == (left, 1, [])
    assert report.discarded_bytes == len(left) * len(b"left over")
    assert blobs(lane) == wanted | {path.relative_to(lane.blobs).as_posix() for path in (young, foreign)}
    assert trash(lane) == left
    assert thumbnail in wanted
    assert (again.discarded, again.uploads, again.uploads_in_all) == ([], 2, 2)


async def test_the_trash_is_emptied_after_its_time(lane: Lane) -> None:
    await lane.start()
    await lane.until(await lane.queue_pictures(["cat.png"]), lambda batch, _: batch.ended)
    name = f"{a_new_id()}/abandoned"
    lay(lane, name)
    await swept(lane)

    kept = await swept(lane)
    emptied = await swept(lane, trash_s=-1.0)

    assert (kept.emptied, emptied.emptied) == (0, 1)
    assert trash(lane) == set()
    assert list((lane.blobs / TRASH).iterdir()) == []


async def test_missing_and_damaged_files_are_told_and_what_lies_in_the_trash_is_brought_back(lane: Lane) -> None:
    await lane.start()
    names = ["cat.png", "coffee.webp", "fig.webp", "stream.jpg"]
    batch_id = await lane.queue_pictures(names)
    _, uploads = await lane.snapshot_when(batch_id, lambda batch, _: batch.ended)
    paths = {upload.filename: lane.blobs / upload.blob for upload in uploads.values()}

    # When one file is gone, one has other bytes, one fewer, and one was put into the trash by mistake.
    paths["cat.png"].unlink()
    size_bytes = paths["coffee.webp"].stat().st_size
    paths["coffee.webp"].write_bytes(bytes(size_bytes))
    paths["fig.webp"].write_bytes(b"short")
    mistaken = lane.blobs / TRASH / "1" / paths["stream.jpg"].relative_to(lane.blobs)
    mistaken.parent.mkdir(parents=True)
    paths["stream.jpg"].rename(mistaken)
    quick = await swept(lane, contents=False, dry_run=True)
    report = await swept(lane)

    # Then each is told by its name, and the last one is back.
    assert {(fault.filename, fault.problem) for fault in report.faults} == {
        ("cat.png", "missing"),
        ("coffee.webp", "damaged"),
        ("fig.webp", "damaged"),
    }
    assert {fault.batch_id for fault in report.faults} == {batch_id}
    assert {fault.filename for fault in quick.faults} == {"cat.png", "fig.webp", "stream.jpg"}
    assert report.brought_back == [paths["stream.jpg"].relative_to(lane.blobs).as_posix()]
    assert paths["stream.jpg"].is_file()


async def test_a_thumbnail_that_is_gone_is_told(lane: Lane) -> None:
    await lane.start()
    await lane.until(await lane.queue_pictures(["cat.png"]), lambda batch, _: batch.ended)
    (thumbnail,) = lane.blobs.glob("*/thumb-*")
    thumbnail.unlink()

    report = await swept(lane)

    assert [(fault.problem, fault.detail) for fault in report.faults] == [
        ("missing", "its thumbnail is not in the blob store")
    ]


async def test_the_files_of_a_deleted_batch_that_were_missed_are_left_over(lane: Lane) -> None:
    await lane.start()
    batch_id = await lane.queue_pictures(["cat.png"])
    _, uploads = await lane.snapshot_when(batch_id, lambda batch, _: batch.ended)
    await lane.append([BatchDeleted(batch_id=batch_id, user_id="ada")])
    (upload,) = uploads.values()
    async with asyncio.timeout(WAIT_S):
        while blobs(lane):  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.05)
    missed = lay(lane, upload.blob)

    report = await swept(lane)

    assert report.discarded == [upload.blob]
    assert not missed.exists()


async def test_nothing_is_touched_while_the_read_models_lack_facts(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a batch that nobody has projected: its file looks as if nobody referred to it.
    await lane.queue_pictures(["cat.png"])
    for name in blobs(lane):
        grow_old(lane.blobs / name)
    before = blobs(lane)
    monkeypatch.setattr("services.sweeping.CAUGHT_UP_TIMEOUT_S", 0.5)

    with pytest.raises(SweepRefused, match="processor"):
        await swept(lane)

    assert blobs(lane) == before


async def test_what_an_undecodable_record_may_name_is_spared(lane: Lane) -> None:
    # Given a record that this version does not understand, which names an upload.
    await lane.start()
    batch_id = await lane.queue_pictures(["cat.png"])
    upload_id = a_new_id()
    headers = (("ce_specversion", b"1.0"), ("ce_type", b"sluice.UploadQueued.v99"), ("ce_id", a_new_id().encode()))
    unknown = NewRecord(batch_id.encode(), f'{{"upload_id": "{upload_id}"}}'.encode(), headers)
    writer = lane.log.writer()
    await writer.append(0, [unknown], timeout_s=10)
    await writer.close()
    await lane.until(batch_id, lambda batch, _: batch.ended)
    blob = lay(lane, f"{upload_id}/of-the-future")

    report = await swept(lane)

    assert (report.spared, report.discarded) == (1, [])
    assert blob.exists()


async def test_a_blob_whose_fact_came_meanwhile_is_wanted(lane: Lane) -> None:
    """A file that was sent slowly for more than a day is old when its fact comes."""
    await lane.start()
    batch_id = await lane.queue_pictures(["cat.png"], seal=False)
    upload_id = a_new_id()
    old = lay(lane, f"{upload_id}/slow")
    await lane.append(
        [
            UploadQueued(
                batch_id=batch_id,
                user_id="ada",
                upload_id=upload_id,
                filename="slow.png",
                content_type="image/png",
                size_bytes=9,
                sha256="0" * 64,
                blob=f"{upload_id}/slow",
            )
        ]
    )

    report = await swept(lane)

    assert report.discarded == []
    assert old.exists()
