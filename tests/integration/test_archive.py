"""Exporting a log and importing it elsewhere, on a real Kafka: what comes out is what went in.

State is compared with the plainest fold there is (`examples.fold`), which the services' folds agree with.
"""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.events import PreviousLog
from schemas.position import Position
from schemas.records import StoredRecord
from services.archive.exporting import Exporter
from services.archive.importing import Importer
from services.archive.manifest import ArchiveRefused, load
from services.archive.places import Folder, PlaceUnavailable, place_of
from services.archive.selecting import Erasure, Slice, Whole
from services.cli import log_tail
from services.cli.errors import WrongUse
from services.eventlog import LogRefused
from tests.archives import (
    ADAS,
    GRACES,
    PARTITIONS,
    Archived,
    a_topic,
    a_used_log,
    in_lane_0,
    in_lane_1,
    killed,
    names,
)
from tests.buckets import BUCKET, a_bucket
from tests.examples import OTHER_USER, USER, State, a_batch_created, an_id, fold


@pytest.fixture
async def used(kafka: str, unique: str) -> AsyncIterator[Archived]:
    async with a_used_log(kafka, unique) as used:
        yield used


@pytest.fixture
async def fresh(kafka: str, unique: str) -> AsyncIterator[Archived]:
    async with a_topic(kafka, f"{unique}.again") as fresh:
        yield fresh


def state_of(records: list[list[StoredRecord]]) -> State:
    """The whole log folded; which log it is does not matter here."""
    state = fold(record for partition in records for record in partition)
    for lane in state.lanes.values():
        lane.log_id = ""
    return state


async def test_an_import_elsewhere_is_the_same_log_under_another_name(
    used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    before = await used.records()
    manifest = await used.exported(tmp_path)
    assert len(manifest.segments) > 2 * PARTITIONS, "resuming is about several segments"

    imported = await fresh.imported(tmp_path)
    after = await fresh.records()

    assert [part[1:] for part in after] == [part[1:] for part in before]
    assert [part[0].timestamp_ms for part in after] == [part[0].timestamp_ms for part in before]
    assert state_of(after) == state_of(before)
    assert (imported.written, imported.previous_log_id) == (manifest.records, manifest.log_id)


async def test_services_take_an_import_for_a_log_whose_old_positions_are_good(
    used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    manifest = await used.exported(tmp_path)
    imported = await fresh.imported(tmp_path)

    await fresh.log.ensure_topics(partitions=PARTITIONS)
    identity = await fresh.log.ensure_created(partitions=PARTITIONS, source="/sluice/tests")
    await fresh.append(a_batch_created(an_id("new")))

    here, ends = imported.log_id, manifest.ends
    previous = {number: (PreviousLog(log_id=manifest.log_id, next_offset=end),) for number, end in ends.items()}
    assert (identity.log_id, dict(identity.previous)) == (here, previous)
    last = Position.of(manifest.log_id, {number: end - 1 for number, end in ends.items()})
    assert identity.here(last) == Position.of(here, dict(last.offsets))
    beyond = Position.of(manifest.log_id, {0: ends[0]})
    assert identity.here(beyond) == beyond
    tailed = await log_tail.span(fresh.log, start=str(last), end=str(last), newest=0, follow=False)
    assert tailed.first == tailed.last == {number: end - 1 for number, end in ends.items()}
    with pytest.raises(WrongUse, match=f"is a position of the log {beyond.log}, and this is the log {here[:8]}"):
        await log_tail.span(fresh.log, start=str(beyond), end=None, newest=0, follow=False)
    newest = (await fresh.records())[0][-1]
    assert newest.timestamp_ms > (await used.records())[0][-1].timestamp_ms, "times are the broker's again"

    # And an import of the import knows both.
    async with a_topic(fresh.log.settings.bootstrap_servers, f"{fresh.log.settings.topic}.third") as third:
        await fresh.exported(tmp_path / "second")
        await third.imported(tmp_path / "second")
        assert (await third.log.inspect()) is not None
        third_identity = await third.log.ensure_created(partitions=PARTITIONS, source="/sluice/tests")
        assert third_identity.here(last) == Position.of(third_identity.log_id, dict(last.offsets))
        assert third_identity.here(Position.of(here, {0: ends[0]})).log != Position.of(here, {}).log


async def test_a_slice_rebuilds_its_batch_to_the_same_state_at_the_same_positions(
    used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    whole = await used.records()
    manifest = await used.exported(tmp_path, Slice(ADAS))
    await fresh.imported(tmp_path)
    records = await fresh.records()

    sliced, before = state_of(records), state_of(whole)

    assert sliced.batches == {ADAS: before.batches[ADAS]}
    assert list(sliced.uploads.values()) == before.uploads_of(ADAS)
    assert sliced.lanes[1].epoch == before.lanes[1].epoch == 12
    kept = [record for record in whole[1] if record.key == ADAS.encode()]
    assert [record for record in records[1] if record.key is not None] == kept
    assert manifest.ends == {0: 1, 1: kept[-1].offset + 1}
    everything = b"".join(record.value or b"" for part in records for record in part)
    assert b"grace" not in everything
    assert (await fresh.log.ensure_created(partitions=PARTITIONS, source="/sluice/tests")).log_id != manifest.log_id


async def test_an_erasure_leaves_nothing_of_its_user_and_all_of_the_others(
    used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    before = state_of(await used.records())
    manifest = await used.exported(tmp_path, Erasure(USER))
    await fresh.imported(tmp_path)
    records = await fresh.records()

    after = state_of(records)

    others = {batch.id: batch for batch in before.batches.values() if batch.user_id == OTHER_USER}
    assert after.batches == others
    assert after.uploads == {each.id: each for each in before.uploads.values() if each.batch_id in others}
    assert {number: lane.next_offset for number, lane in after.lanes.items()} == manifest.ends
    everything = b"".join(record.value or b"" for part in records for record in part)
    assert f'"{USER}"'.encode() not in everything
    assert b"secret" not in everything
    assert GRACES in after.batches
    assert f'"{USER}"' not in (tmp_path / "manifest.json").read_text()


async def test_a_bucket_does_as_well_as_a_folder(used: Archived, fresh: Archived) -> None:
    with a_bucket() as s3:
        place = place_of(f"s3://{BUCKET}/{s3.prefix}/log/")
        manifest = await Exporter(used.log, place, Whole(), used.news.append).run()
        await Importer(fresh.log, place, fresh.news.append).run()
        stored = s3.names()
        with pytest.raises(PlaceUnavailable, match=r"manifest.json cannot be written \(NoSuchBucket\): check"):
            await place_of(f"s3://{BUCKET}-nobody-made/log").put("manifest.json", b"")

    assert stored == {"log/manifest.json", *(f"log/{segment.name}" for segment in manifest.segments)}
    assert state_of(await fresh.records()) == state_of(await used.records())


async def test_a_log_that_grows_is_exported_again_by_what_is_new(used: Archived, tmp_path: Path) -> None:
    first = await used.exported(tmp_path)
    files = {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)}
    await used.append(a_batch_created(an_id("new")))

    second = await used.exported(tmp_path)

    assert second.segments[: len(first.segments)] == first.segments
    assert second.ends == {**first.ends, 0: first.ends[0] + 1}
    assert second.finished
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files} == files


async def test_an_export_that_was_killed_goes_on_after_its_last_whole_segment(
    kafka: str, used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    await killed("export", kafka, used.log.settings.topic, tmp_path, partition=0, nth=3)
    begun = {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)}
    assert len(begun) == 2
    with pytest.raises(ArchiveRefused, match="is unfinished: run `sluice log export` there again"):
        await fresh.imported(tmp_path)

    await used.exported(tmp_path)
    await fresh.imported(tmp_path)

    assert {name: (tmp_path / name).stat().st_mtime_ns for name in begun} == begun
    assert state_of(await fresh.records()) == state_of(await used.records())


async def test_a_finished_archive_stays_importable_when_the_export_that_adds_to_it_is_killed(
    kafka: str, unique: str, used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    first = await used.exported(tmp_path)
    await used.append(*in_lane_0())
    await used.append(*in_lane_1(), partition=1)

    await killed("export", kafka, used.log.settings.topic, tmp_path, partition=0, nth=2)
    between = await load(Folder(tmp_path))
    await fresh.imported(tmp_path)

    assert between is not None
    assert len(between.segments) == len(first.segments) + 1
    assert between.ends == {0: between.reached(0), 1: first.ends[1]}
    records = await used.records()
    whole = [part[1 : between.ends[number]] for number, part in enumerate(records)]
    assert [part[1:] for part in await fresh.records()] == whole

    second = await used.exported(tmp_path)
    async with a_topic(kafka, f"{unique}.third") as third:
        await third.imported(tmp_path)
        assert [part[1:] for part in await third.records()] == [part[1:] for part in records]
    assert second.segments[: len(between.segments)] == between.segments
    assert second.ends == {number: len(part) for number, part in enumerate(records)}


async def test_a_partition_that_an_export_did_not_come_to_yet_is_imported_empty(
    kafka: str, used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    await used.exported(tmp_path)
    await used.log.ensure_topics(partitions=PARTITIONS + 1)
    await used.append(*in_lane_0())

    await killed("export", kafka, used.log.settings.topic, tmp_path, partition=0, nth=2)
    imported = await fresh.imported(tmp_path)

    assert imported.partitions == PARTITIONS + 1


@pytest.mark.parametrize("partition", [1, 0], ids=["in the last partition", "in the first one"])
async def test_an_import_that_was_killed_is_refused_by_services_and_goes_on_when_run_again(
    kafka: str, used: Archived, fresh: Archived, tmp_path: Path, partition: int
) -> None:
    await used.exported(tmp_path)
    await killed("import", kafka, fresh.log.settings.topic, tmp_path, partition=partition, nth=3)
    with pytest.raises(LogRefused, match=r"broken off: run `sluice log import` again"):
        await fresh.log.ensure_topics(partitions=PARTITIONS)
    with pytest.raises(LogRefused, match=r"unfinished.*log import"):
        await fresh.log.ensure_created(partitions=PARTITIONS, source="/sluice/tests")

    imported = await fresh.imported(tmp_path)

    assert 0 < imported.written < imported.records
    assert state_of(await fresh.records()) == state_of(await used.records())
    again = await fresh.imported(tmp_path)
    assert (again.log_id, again.written) == (imported.log_id, 0)


async def test_a_damaged_segment_is_named_before_anything_is_written(
    used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    await used.exported(tmp_path)
    damaged = tmp_path / names(tmp_path)[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")

    with pytest.raises(ArchiveRefused, match=f"{damaged.name} is damaged"):
        await fresh.imported(tmp_path)
    assert await fresh.log.inspect() is None

    # The log still has what it held, so exporting again mends it.
    await used.exported(tmp_path)
    await fresh.imported(tmp_path)
    assert state_of(await fresh.records()) == state_of(await used.records())


async def test_only_an_empty_topic_is_imported_into(used: Archived, fresh: Archived, tmp_path: Path) -> None:
    await used.exported(tmp_path / "whole")
    with pytest.raises(ArchiveRefused, match=r"is not empty: partition 0 has .* records that no import"):
        await used.imported(tmp_path / "whole")

    await used.exported(tmp_path / "slice", Slice(ADAS))
    await fresh.imported(tmp_path / "slice")
    with pytest.raises(ArchiveRefused, match="is not empty"):
        await fresh.imported(tmp_path / "whole")
    await fresh.append(a_batch_created(an_id("new")))
    with pytest.raises(ArchiveRefused, match="is not empty: partition 0 has 2 records"):
        await fresh.imported(tmp_path / "slice")


async def test_an_empty_topic_that_is_there_keeps_the_settings_it_was_given(
    used: Archived, fresh: Archived, tmp_path: Path
) -> None:
    await fresh.log.ensure_topics(partitions=1, fsync=True)
    await used.exported(tmp_path)

    await fresh.imported(tmp_path)

    found = await fresh.log.inspect(fsync=True)
    assert found is not None
    assert (found.partitions, found.complaint) == (PARTITIONS, None)


async def test_a_folder_holds_one_export(used: Archived, fresh: Archived, tmp_path: Path) -> None:
    await used.exported(tmp_path / "whole")
    with pytest.raises(ArchiveRefused, match=r"holds another export \(whole"):
        await used.exported(tmp_path / "whole", Slice(ADAS))
    await fresh.imported(tmp_path / "whole")
    with pytest.raises(ArchiveRefused, match="holds another export"):
        await fresh.exported(tmp_path / "whole")

    # A log that ends before what was exported of it has lost its end, and the export is what is left of it.
    shutil.copytree(tmp_path / "whole", tmp_path / "older")
    await used.append(a_batch_created(an_id("new")))
    await used.exported(tmp_path / "whole")
    manifest = tmp_path / "whole" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(await log_id_of(used), await log_id_of(fresh)))
    with pytest.raises(ArchiveRefused, match="the log lost its end; keep this export"):
        await fresh.exported(tmp_path / "whole")


async def log_id_of(archived: Archived) -> str:
    log_id = await archived.log.identify()
    assert log_id is not None
    return log_id


async def test_what_the_log_does_not_have_is_said(used: Archived, fresh: Archived, tmp_path: Path) -> None:
    with pytest.raises(ArchiveRefused, match=r"there is no log .* yet: nothing to export"):
        await fresh.exported(tmp_path)
    with pytest.raises(ArchiveRefused, match="the log has no batch"):
        await used.exported(tmp_path, Slice(an_id("unknown")))
    with pytest.raises(ArchiveRefused, match="no batch of this user: nothing to erase"):
        await used.exported(tmp_path, Erasure("nobody"))
    assert await load(Folder(tmp_path)) is None
