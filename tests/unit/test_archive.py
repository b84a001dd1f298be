"""An archive's format and what it keeps of a log, without a server; see tests/integration/test_archive.py."""

import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import Erased, Fact, LogEvent, PreviousLog, decode
from schemas.ids import derived_id
from schemas.position import Position
from schemas.records import StoredRecord
from services.archive import lines
from services.archive.exporting import Exporter
from services.archive.lines import DamagedLineError, Gap
from services.archive.manifest import MANIFEST, ArchiveRefused, Manifest, Segment, checked, load, save
from services.archive.places import Bucket, Folder, PlaceUnavailable, place_of
from services.archive.selecting import Erasure, Selection, Slice, Whole
from services.cli import archives
from services.cli.errors import WrongUse
from services.eventlog import LogIdentity, LogSettings
from services.eventlog.identity import random_log_id
from services.eventlog.topics import TopicFound
from tests.examples import (
    BATCH,
    LOG_ID,
    OPENING,
    OTHER_BATCH,
    OTHER_UPLOAD,
    OTHER_USER,
    UPLOAD,
    USER,
    a_batch_created,
    a_batch_sealed,
    a_finished_batch,
    a_lane_claimed,
    an_id,
    an_upload_queued,
    records_of,
)
from tests.fakes import FakeKafka, FakeLog, FakePartition, FakeTopic

MAYBE_BYTES = st.none() | st.binary(max_size=40)
RECORDS = st.builds(
    StoredRecord,
    partition=st.just(3),
    offset=st.integers(0, 2**63 - 1),
    timestamp_ms=st.integers(0, 2**53),
    key=MAYBE_BYTES,
    value=MAYBE_BYTES,
    headers=st.lists(st.tuples(st.text(max_size=20), MAYBE_BYTES), max_size=4).map(tuple),
)


# Lines


@given(record=RECORDS)
def test_a_record_comes_back_from_its_line_byte_for_byte_and_null_for_null(record: StoredRecord) -> None:
    line = lines.written(record)

    assert lines.read(line, 3) == record
    assert b"\n" not in line


def test_a_gap_comes_back_from_its_line() -> None:
    gap = Gap(3, first=7, last=9, timestamp_ms=12)

    assert lines.read(lines.written(gap), 3) == gap


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{", b'{"offset":1}', b'{"offset":1,"timestamp_ms":2,"headers":[["a"]]}']
)
def test_a_line_that_is_none_is_said_to_be_damaged(line: bytes) -> None:
    with pytest.raises(DamagedLineError):
        lines.read(line, 0)


# Manifest and places


def a_segment(first: int, last: int, *, partition: int = 0, data: bytes = b"data") -> Segment:
    digest = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"  # of b"data"
    return Segment(
        name=f"segments/{partition}/{first}",
        partition=partition,
        first_offset=first,
        last_offset=last,
        size_bytes=len(data),
        sha256=digest,
    )


def a_manifest(*segments: Segment, **changes: object) -> Manifest:
    given: dict[str, object] = {"log_id": LOG_ID, "exported_at": "", "ends": {0: 10}, "segments": segments}
    return Manifest.model_validate({**given, **changes})


def test_an_archive_is_finished_when_each_partition_reaches_the_logs_end() -> None:
    part = a_manifest(a_segment(0, 4))

    assert not part.finished
    assert part.reached(0) == 5
    assert a_manifest(a_segment(0, 4), a_segment(5, 9)).finished
    assert not a_manifest(a_segment(0, 9), ends={0: 10, 1: 3}).finished
    assert a_manifest(a_segment(0, 9), a_segment(0, 2, partition=1), ends={0: 10, 1: 3}).finished


async def test_a_manifest_comes_back_and_a_bad_one_is_refused_with_its_place(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    assert await load(place) is None
    manifest = a_manifest(a_segment(0, 4), kind="slice", of=BATCH)

    await save(place, manifest)

    assert await load(place) == manifest
    await save(place, a_manifest(a_segment(0, 4), a_segment(6, 9)))
    with pytest.raises(ArchiveRefused, match=r"segments/0/6 does not begin at offset 5 of partition 0"):
        await load(place)
    (tmp_path / MANIFEST).write_text('{"format": "something else"}')
    with pytest.raises(ArchiveRefused, match=r"manifest.json is not the manifest of a log's export \(format"):
        await load(place)


async def test_a_segment_is_given_out_only_as_it_was_written(tmp_path: Path) -> None:
    place, segment = Folder(tmp_path), a_segment(0, 4)
    with pytest.raises(ArchiveRefused, match=r"segments/0/0 is missing"):
        await checked(place, segment)
    await place.put(segment.name, b"data")

    assert await checked(place, segment) == b"data"

    await place.put(segment.name, b"dada")
    with pytest.raises(ArchiveRefused, match=r"segments/0/0 is damaged: it has 4 bytes \(written were 4\)"):
        await checked(place, segment)


async def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(PlaceUnavailable, match=r"file/name cannot be written: "):
        await Folder(tmp_path / "file").put("name", b"")
    with pytest.raises(PlaceUnavailable, match=r"file/name cannot be read: Not a directory"):
        await Folder(tmp_path / "file").get("name")


def test_a_place_is_a_bucket_or_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")

    assert isinstance(place_of("backups/log"), Folder)
    bucket = place_of("s3://backups/log/")
    assert isinstance(bucket, Bucket)
    assert str(bucket) == "s3://backups/log"
    with pytest.raises(ValueError, match="names no bucket"):
        place_of("s3:///log")


# What is kept


def scan_of(records: list[StoredRecord]) -> object:
    async def scan(partition: int, end: int) -> AsyncIterator[list[StoredRecord]]:
        yield [record for record in records if record.partition == partition and record.offset < end]

    return scan


async def test_a_slice_keeps_the_batch_the_first_record_and_the_claims_up_to_its_last_fact() -> None:
    log = records_of(
        *OPENING,
        *a_finished_batch(OTHER_BATCH, [OTHER_UPLOAD]),
        a_lane_claimed(after=1),
        *a_finished_batch(BATCH, [UPLOAD], epoch=8),
        a_lane_claimed(after=8),
        a_batch_created(an_id("later")),
    )
    wanted = Slice(BATCH)

    ends = await wanted.prepare(scan_of(log), {0: len(log), 1: 5, 2: 0})  # type: ignore[arg-type]
    kept = [record.offset for record in log[: ends[0]] if wanted.take(record) is not None]

    assert ends == {0: 15, 1: 1, 2: 0}
    assert kept == [0, 1, 8, *range(9, 15)]
    assert Slice(BATCH).of == BATCH
    with pytest.raises(ArchiveRefused, match="'my batch' is not the id of a batch"):
        Slice("my batch")


async def test_an_erasure_empties_a_users_batches_whole_and_what_the_user_tried_elsewhere() -> None:
    poison = StoredRecord(0, 99, 0, BATCH.encode(), b'{"user_id": "ada"', ())
    hijacked = a_batch_created(BATCH, user_id=OTHER_USER)
    log = records_of(
        *OPENING,
        *a_finished_batch(BATCH, [UPLOAD]),
        hijacked,
        a_batch_created(OTHER_BATCH, user_id=OTHER_USER),
        an_upload_queued(OTHER_UPLOAD, OTHER_BATCH, user_id=OTHER_USER),
        an_upload_queued(an_id("foreign"), OTHER_BATCH, user_id=USER),
    )
    wanted = Erasure(USER)

    ends = await wanted.prepare(scan_of(log), {0: len(log)})  # type: ignore[arg-type]
    taken = [wanted.take(record) for record in log]

    assert ends == {0: len(log)}
    emptied = [fact for fact in map(decode, filter(None, taken)) if isinstance(fact, Fact)]
    erased = [(fact.offset, fact.batch_id) for fact in emptied if isinstance(fact.event, Erased)]
    assert erased == [*((offset, BATCH) for offset in range(2, 9)), (11, OTHER_BATCH)]
    assert [fact.upload_id for fact in emptied if isinstance(fact.event, Erased)][1] == UPLOAD
    assert [taken[offset] for offset in (0, 1, 9, 10)] == [log[offset] for offset in (0, 1, 9, 10)]
    assert [each.timestamp_ms for each in filter(None, taken)] == [record.timestamp_ms for record in log]
    silenced = wanted.take(poison)
    assert silenced is not None
    assert silenced.value == f'{{"erased":true,"batch_id":"{BATCH}"}}'.encode()
    assert wanted.of is not None
    assert USER not in wanted.of


# Going on with an export that was begun before


class LaneInMemory(FakeLog):
    """What an export asks of a log; `records` may be changed by hand."""

    def __init__(self, *events: LogEvent) -> None:
        self.records = records_of(*events)
        kafka = FakeKafka()
        kafka.topics["log"] = FakeTopic({}, [FakePartition(self.records)])
        super().__init__(kafka, LogSettings(bootstrap_servers="memory", topic="log", progress_topic="progress"))

    async def inspect(self) -> TopicFound:
        return TopicFound(1, None)

    async def identify(self) -> str:
        return LOG_ID

    async def exported(self, folder: Path, selection: Selection) -> Manifest:
        exporter = Exporter(
            self,  # type: ignore[arg-type]  # as much of a log as is asked for
            Folder(folder),
            selection,
            lambda _: None,
        )
        return await exporter.run()


KEPT = (*OPENING, a_batch_created(OTHER_BATCH, user_id=OTHER_USER), a_batch_created())
SELECTIONS = (Whole, lambda: Slice(BATCH), lambda: Erasure(USER), lambda: Erasure(OTHER_USER))
selected = pytest.mark.parametrize(
    "selection", SELECTIONS, ids=["whole", "slice", "erasure of the last", "erasure of another"]
)


@selected
async def test_an_export_is_not_continued_from_a_log_that_lost_its_end_and_grew_again(
    tmp_path: Path, selection: Callable[[], Selection]
) -> None:
    before = await LaneInMemory(*KEPT, an_upload_queued()).exported(tmp_path, selection())
    regrown = LaneInMemory(*KEPT, an_upload_queued(OTHER_UPLOAD), a_batch_sealed())
    headers = tuple(
        (name, an_id("another").encode() if name == "ce_id" else value) for name, value in regrown.records[4].headers
    )
    regrown.records[4] = dataclasses.replace(regrown.records[4], headers=headers)

    with pytest.raises(ArchiveRefused, match=r"partition 0 of the log has another record at offset 4 than .* into ano"):
        await regrown.exported(tmp_path, selection())

    assert await load(Folder(tmp_path)) == before


@selected
async def test_an_export_is_continued_from_a_log_that_only_grew(
    tmp_path: Path, selection: Callable[[], Selection]
) -> None:
    before = await LaneInMemory(*KEPT, an_upload_queued()).exported(tmp_path, selection())
    grown = LaneInMemory(*KEPT, an_upload_queued(), a_batch_sealed(OTHER_BATCH, user_id=OTHER_USER), a_batch_sealed())

    after = await grown.exported(tmp_path, selection())

    assert (before.ends, after.ends) == ({0: 5}, {0: 7})
    assert after.segments[:1] == before.segments
    assert after.finished


async def test_an_export_is_continued_where_what_it_has_last_is_erased_by_now(tmp_path: Path) -> None:
    early = (*OPENING, a_batch_created(OTHER_BATCH), an_upload_queued())
    await LaneInMemory(*early).exported(tmp_path, Erasure(USER))

    after = await LaneInMemory(*early, a_batch_created()).exported(tmp_path, Erasure(USER))

    assert after.ends == {0: 5}


# Positions of a log that was imported

OLDER, OLD, HERE = (derived_id("log", name, partition=0) for name in ("older", "old", "here"))
IDENTITY = LogIdentity(
    HERE,
    {
        0: (PreviousLog(log_id=OLDER, next_offset=5), PreviousLog(log_id=OLD, next_offset=8)),
        1: (PreviousLog(log_id=OLD, next_offset=3),),
    },
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Position.of(HERE, {0: 100}), Position.of(HERE, {0: 100})),
        (Position.of(OLD, {0: 7, 1: 2}), Position.of(HERE, {0: 7, 1: 2})),
        (Position.of(OLDER, {0: 4}), Position.of(HERE, {0: 4})),
        (Position.of(OLD, {0: 8}), None),
        (Position.of(OLD, {0: 7, 1: 3}), None),
        (Position.of(OLDER, {0: 5}), None),
        (Position.of(OLDER, {0: 4, 1: 0}), None),
        (Position.of(OLD, {2: 0}), None),
        (Position.of(LOG_ID, {0: 1}), None),
    ],
)
def test_a_position_of_a_previous_log_is_good_below_where_that_one_ended(
    given: Position, expected: Position | None
) -> None:
    assert IDENTITY.here(given) == (expected or given)


def test_positions_tell_logs_apart_that_were_made_in_the_same_minute() -> None:
    seen = {Position.of(random_log_id(), {0: 0}).log for _ in range(20)}

    assert len(seen) == 20


# The commands


def test_two_kinds_of_export_at_once_are_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="two different exports: give one of them"):
        archives.export_log(tmp_path, "backup", batch=BATCH, erase=USER, as_json=False)
    with pytest.raises(WrongUse, match="names no bucket: write s3://bucket/prefix"):
        archives.import_log(tmp_path, "s3://", as_json=False)


def test_an_export_without_a_kafka_asks_which_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLUICE_")]:
        monkeypatch.delenv(name)

    with pytest.raises(WrongUse, match=r"Which Sluice\? Nothing runs in .*SLUICE_KAFKA_BOOTSTRAP_SERVERS is not set"):
        archives.export_log(tmp_path, str(tmp_path / "backup"), batch=None, erase=None, as_json=False)
    assert list(tmp_path.iterdir()) == []
