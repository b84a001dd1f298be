"""The log keeps its promises: one suite, run on the log in memory and on Kafka.

`world` is either of them (tests/worlds.py), with what a test needs to bring about and no service may do. Tests that
pause or kill the broker, and those about producers and queues, are Kafka's alone and stand at the end.
"""

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.record.util import calc_crc32c

from schemas.events import Envelope, LaneClaimed, PreviousLog, encode
from schemas.records import NewRecord, StoredRecord
from services.embedded import EmbeddedKafka
from services.eventlog import (
    GROUP_BYTES_MAX,
    EventLog,
    Log,
    LogError,
    LogOutcomeUnknown,
    LogReader,
    LogRefused,
    LogUnavailable,
    RecordTooLarge,
)
from services.eventlog.identity import establish, new_created
from services.eventlog.topics import FACT_SETTINGS, release
from tests.pausing import paused
from tests.worlds import (
    LOG_ID,
    NOWHERE,
    SOURCE,
    OnKafka,
    World,
    a_record,
    created,
    read_all,
    reader_at,
    records,
    settings_for,
    texts,
)

SOON_MS = 30_000
T = TypeVar("T")
OTHER_LOG_ID = "77aa9c02-5b7e-7d41-9c00-3f2a6b8d4e00"

# Appending and reading


async def test_records_come_back_as_they_were_given(log: Log) -> None:
    given = [
        NewRecord(key=b"k", value=b"v", headers=(("ce_type", b"t"), ("ce_type", b"again"))),
        NewRecord(key=None, value=b"", headers=()),
        NewRecord(key=b"erased", value=None, headers=(("ü", b""),)),
    ]

    first = await log.writer().append(1, given, timeout_s=10)
    read = await read_all(await reader_at(log, 1, first))

    assert given == [NewRecord(record.key, record.value, record.headers) for record in read]
    assert [(1, first), (1, first + 1), (1, first + 2)] == [(record.partition, record.offset) for record in read]


async def test_the_time_of_a_record_is_the_brokers(log: Log) -> None:
    await log.writer().append(0, records("a"), timeout_s=10)
    await log.writer().append(0, records("b"), timeout_s=10)

    times = [record.timestamp_ms for record in await read_all(await reader_at(log, 0, 0))]

    assert times == sorted(times)
    assert all(time_ms > 1_767_000_000_000 for time_ms in times)


async def test_each_group_stands_where_its_caller_was_told_and_in_one_piece(log: Log) -> None:
    writer = log.writer()
    groups = [[f"{group}.{index}" for index in range(1 + group % 5)] for group in range(200)]

    firsts = await asyncio.gather(*(writer.append(0, records(*group), timeout_s=30) for group in groups))

    stored = {record.offset: texts([record])[0] for record in await read_all(await reader_at(log, 0, 1))}
    assert groups == [
        [stored[first + index] for index in range(len(group))] for first, group in zip(firsts, groups, strict=True)
    ]
    assert sum(map(len, groups)) == len(stored)
    assert firsts == sorted(firsts), "the order of asking is the order in the log"


async def test_a_thousand_records_are_appended_as_one(log: Log) -> None:
    group = [a_record(f"{index}", size_bytes=1_000) for index in range(1_000)]

    first = await log.writer().append(0, group, timeout_s=30)

    read = await read_all(await reader_at(log, 0, first))
    assert [record.value for record in group] == [record.value for record in read]


async def test_a_reader_goes_on_where_it_stopped(log: Log) -> None:
    await log.writer().append(0, records(*"abcdefg"), timeout_s=10)
    reader = await reader_at(log, 0, 1)

    parts = [texts(await reader.read(records_max=3, timeout_ms=SOON_MS)) for _ in range(3)]
    parts.append(texts(await reader.read(records_max=3, timeout_ms=300)))

    assert parts == [["a", "b", "c"], ["d", "e", "f"], ["g"], []]


async def test_a_read_gathers_what_one_fetch_did_not_bring(log: Log) -> None:
    writer = log.writer()
    for _ in range(3):  # more together than any one fetch brings
        await writer.append(0, [a_record(size_bytes=1_000_000) for _ in range(4)], timeout_s=30)
    reader = await reader_at(log, 0, 1)

    read = await reader.read(records_max=100, timeout_ms=20_000)

    assert list(range(1, 13)) == [record.offset for record in read]


async def test_a_read_returns_when_a_record_comes_and_not_when_its_time_is_up(log: Log) -> None:
    reader = await reader_at(log, 0, 1)
    assert await reader.read(records_max=10, timeout_ms=100) == []
    reading = asyncio.create_task(reader.read(records_max=10, timeout_ms=60_000))

    await log.writer().append(0, records("at last"), timeout_s=10)

    async with asyncio.timeout(SOON_MS / 1000):
        assert texts(await reading) == ["at last"]


async def test_each_partition_is_read_in_its_own_order(log: Log) -> None:
    writer, reader = log.writer(), log.reader([0, 1])
    for partition in (0, 1):
        await reader.seek(partition, 1)
    for number in range(10):
        await writer.append(number % 2, records(str(number)), timeout_s=10)

    read = await read_all(reader)

    assert texts([record for record in read if record.partition == 0]) == ["0", "2", "4", "6", "8"]
    assert texts([record for record in read if record.partition == 1]) == ["1", "3", "5", "7", "9"]


async def test_what_a_cancelled_read_took_is_read_again(log: Log) -> None:
    reader = await reader_at(log, 0, 1)
    for attempt in range(5):
        reading = asyncio.create_task(reader.read(records_max=100, timeout_ms=60_000))
        await log.writer().append(0, records(str(attempt)), timeout_s=10)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if not reading.cancelled():
            await reader.seek(0, 1)

    assert texts(await read_all(reader)) == ["0", "1", "2", "3", "4"]


async def test_a_reader_can_be_sent_back(log: Log) -> None:
    await log.writer().append(0, records("a", "b"), timeout_s=10)
    reader = await reader_at(log, 0, 3)
    assert await reader.read(records_max=10, timeout_ms=200) == []

    await reader.seek(0, 2)

    assert texts(await reader.read(records_max=10, timeout_ms=SOON_MS)) == ["b"]


async def test_the_end_is_where_the_next_record_goes(log: Log) -> None:
    reader, writer = log.reader([0, 1]), log.writer()
    assert await reader.ends() == {0: 1, 1: 1}

    first = await writer.append(1, records("a", "b"), timeout_s=10)

    assert first == 1
    assert await reader.ends() == {0: 1, 1: 3}


async def test_the_first_record_is_told_without_moving_the_reader(log: Log) -> None:
    await log.writer().append(0, records("a", "b"), timeout_s=10)
    reader = await reader_at(log, 0, 2)

    first = await reader.first(0)

    assert first
    assert (first.partition, first.offset) == (0, 0)
    assert texts(await reader.read(records_max=10, timeout_ms=SOON_MS)) == ["b"]


async def test_a_group_that_does_not_fit_a_record_batch_is_refused_before_anything_is_sent(log: Log) -> None:
    too_large = [a_record(size_bytes=GROUP_BYTES_MAX // 4) for _ in range(4)]

    with pytest.raises(RecordTooLarge, match="4 records of together 83"):
        await log.writer().append(0, too_large, timeout_s=10)

    assert await log.reader([0]).ends() == {0: 1}


async def test_the_largest_group_that_is_taken_fits_and_comes_back(log: Log) -> None:
    largest = [a_record(size_bytes=GROUP_BYTES_MAX // 4 - 100) for _ in range(4)]

    first = await log.writer().append(0, largest, timeout_s=30)
    read = await read_all(await reader_at(log, 0, first))

    assert [record.value for record in largest] == [record.value for record in read]


async def test_a_partition_that_is_not_there_is_refused_and_the_others_go_on(log: Log) -> None:
    writer = log.writer()

    with pytest.raises(LogRefused, match="/7 does not exist"):
        await writer.append(7, records("a"), timeout_s=10)

    assert await writer.append(0, records("a"), timeout_s=10) == 1


async def test_an_empty_group_is_a_mistake_of_the_caller(log: Log) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        await log.writer().append(0, [], timeout_s=1)


async def test_a_closed_writer_takes_nothing_and_a_closed_reader_gives_nothing(log: Log) -> None:
    writer, reader = log.writer(), await reader_at(log, 0, 0)
    await writer.append(0, records("a"), timeout_s=10)
    await writer.close()
    await reader.close()

    with pytest.raises(LogUnavailable, match="closed"):
        await writer.append(0, records("b"), timeout_s=10)
    with pytest.raises(LogUnavailable, match="closed"):
        await reader.read(records_max=1, timeout_ms=10)


# Logs that are not what they were


async def test_reading_beyond_the_end_is_refused_with_what_to_do(log: Log) -> None:
    with pytest.raises(LogRefused, match=r"ends at offset 1, but 5 was asked for.*sluice replay"):
        await log.reader([0]).seek(0, 5)


async def test_what_stands_before_a_gap_is_read_and_the_gap_is_refused_until_sought_again(
    world: World, log: Log
) -> None:
    await log.writer().append(0, records("a"), timeout_s=10)
    reader = await reader_at(log, 0, 1)
    await world.leave_a_gap()

    before = await reader.read(records_max=100, timeout_ms=SOON_MS)
    while before[-1].offset + 1 < (await reader.ends())[0] - 2:
        before += await reader.read(records_max=100, timeout_ms=SOON_MS)

    for _ in range(2):
        with pytest.raises(LogRefused, match=r"has a gap: after offset \d+ comes \d+"):
            await reader.read(records_max=100, timeout_ms=SOON_MS)
    await reader.seek(0, (await reader.ends())[0] - 1)
    assert texts(await reader.read(records_max=100, timeout_ms=SOON_MS)) == ["beyond"]


async def test_a_log_whose_beginning_is_gone_is_refused(world: World, log: Log) -> None:
    await log.writer().append(0, records("a", "b", "c"), timeout_s=10)
    await world.cut(2)

    with pytest.raises(LogRefused, match="begins at offset 2, so its first facts are gone"):
        await log.reader([0]).seek(0, 3)
    with pytest.raises(LogRefused, match="begins at offset 2"):
        await log.ensure_created(partitions=2, source=SOURCE)


async def test_a_reader_that_connects_to_another_log_in_the_place_of_its_own_refuses_it(world: World) -> None:
    async with world.open() as log:
        await log.ensure_topics(partitions=1)
        await log.ensure_created(partitions=1, source=SOURCE)
        await world.replace_log()
        await log.writer().append(0, [created(OTHER_LOG_ID)], timeout_s=10)
        reader = await reader_at(log, 0, 1)

        with pytest.raises(LogRefused, match=f"belongs to the log {OTHER_LOG_ID}, not to"):
            await reader.read(records_max=1, timeout_ms=5_000)


# Topics


async def test_topics_are_made_once_and_partitions_added(world: World) -> None:
    async with world.open() as log:
        await log.ensure_topics(partitions=1)
        await log.ensure_topics(partitions=1)
        await log.ensure_topics(partitions=3)

        identity = await log.ensure_created(partitions=3, source=SOURCE)

        assert await log.reader(range(3)).ends() == {0: 1, 1: 1, 2: 1}
        assert identity.previous == {0: (), 1: (), 2: ()}


async def test_two_starters_at_once_make_the_same_topics(world: World) -> None:
    async with world.open() as one, world.open() as other:
        await asyncio.gather(one.ensure_topics(partitions=2), other.ensure_topics(partitions=2))

        assert await other.reader([0, 1]).ends() == {0: 0, 1: 0}


async def test_fewer_partitions_than_there_are_is_refused(log: Log) -> None:
    with pytest.raises(LogRefused, match="has 2 partitions"):
        await log.ensure_topics(partitions=1)


@pytest.mark.parametrize("partitions", [0, 257])
async def test_ids_can_name_256_partitions_and_no_more(world: World, partitions: int) -> None:
    async with world.open() as log:
        with pytest.raises(LogRefused, match=f"{partitions} partitions cannot be had"):
            await log.ensure_topics(partitions=partitions)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cleanup.policy", "compact"),
        ("retention.ms", "604800000"),
        ("retention.bytes", "1000000"),
        ("message.timestamp.type", "CreateTime"),
        ("max.message.bytes", "1048588"),
    ],
)
async def test_a_topic_that_could_lose_or_refuse_facts_is_refused_with_the_command_to_run(
    world: World, setting: str, value: str
) -> None:
    await world.make_topic(partitions=1, **{setting.replace(".", "_"): value})

    async with world.open() as log:
        with pytest.raises(LogRefused) as refused:
            await log.ensure_topics(partitions=1)

    assert f"{setting}={value} (must be {FACT_SETTINGS[setting]})" in str(refused.value)
    assert f"--entity-name {world.topic} --add-config {setting}={FACT_SETTINGS[setting]}" in str(refused.value)


async def test_with_fsync_a_topic_that_is_not_flushed_is_refused(log: Log) -> None:
    with pytest.raises(LogRefused, match=r"flush\.messages=1"):
        await log.ensure_topics(partitions=2, fsync=True)


async def test_a_new_topic_with_fsync_is_flushed(world: World) -> None:
    async with world.open() as log:
        await log.ensure_topics(partitions=1, fsync=True)
        await log.ensure_topics(partitions=1, fsync=True)

        assert await log.writer().append(0, records("a"), timeout_s=10) == 0


async def test_more_replicas_than_brokers_are_refused(world: World) -> None:
    async with world.open() as log:
        with pytest.raises(LogRefused, match="cannot have 3 replicas"):
            await log.ensure_topics(partitions=1, replication_factor=3)


# Which log it is


async def test_every_start_finds_the_identity_the_first_one_wrote(world: World) -> None:
    async with world.open() as log:
        await log.ensure_topics(partitions=3)
        first = await log.ensure_created(partitions=3, source=SOURCE)
    async with world.open() as log:
        again = await log.ensure_created(partitions=3, source=SOURCE)
        ends = await log.reader(range(3)).ends()

    assert first == again
    assert ends == {0: 1, 1: 1, 2: 1}


async def test_two_starters_at_once_agree_on_one_identity(world: World) -> None:
    async with contextlib.AsyncExitStack() as stack:
        logs = [await stack.enter_async_context(world.open()) for _ in range(4)]
        await logs[0].ensure_topics(partitions=2)

        identities = await asyncio.gather(*(log.ensure_created(partitions=2, source=SOURCE) for log in logs))

    assert len({identity.log_id for identity in identities}) == 1


async def test_a_second_log_created_means_nothing(world: World) -> None:
    await world.make_topic(partitions=1)
    async with world.open() as log:
        await log.writer().append(0, [created(LOG_ID), created(OTHER_LOG_ID)], timeout_s=10)

        assert (await log.ensure_created(partitions=1, source=SOURCE)).log_id == LOG_ID


async def test_a_crash_between_creating_the_topic_and_its_first_record_is_mended_by_the_next_start(
    world: World,
) -> None:
    async with world.open() as log:
        await log.ensure_topics(partitions=2)
        await log.writer().append(0, [created(LOG_ID)], timeout_s=10)  # and here it died, before partition 1

    async with world.open() as log:
        await log.ensure_topics(partitions=2)
        identity = await log.ensure_created(partitions=2, source=SOURCE)
        second = await log.reader([0, 1]).first(1)

    assert identity.log_id == LOG_ID
    assert second
    assert LOG_ID.encode() in (second.value or b"")


async def test_partitions_added_later_are_of_the_same_log(world: World) -> None:
    async with world.open() as log:
        await log.ensure_topics(partitions=1)
        before = await log.ensure_created(partitions=1, source=SOURCE)
        await log.ensure_topics(partitions=2)
        after = await log.ensure_created(partitions=2, source=SOURCE)

    assert before.log_id == after.log_id


async def test_a_topic_of_something_else_is_refused(world: World) -> None:
    await world.make_topic(partitions=1)
    async with world.open() as log:
        await log.writer().append(0, records("not a fact"), timeout_s=10)

        with pytest.raises(LogRefused, match="is not a log of Sluice: its first record is not readable"):
            await log.ensure_created(partitions=1, source=SOURCE)


async def test_a_log_that_begins_with_another_fact_is_refused(world: World) -> None:
    await world.make_topic(partitions=1)
    envelope = Envelope(id=LOG_ID, source=SOURCE, time="2026-01-01T12:00:00Z")
    async with world.open() as log:
        await log.writer().append(0, [encode(LaneClaimed(worker_id="w", after=None), envelope)], timeout_s=10)

        with pytest.raises(LogRefused, match=r"its first record is sluice\.LaneClaimed\.v1, not LogCreated"):
            await log.ensure_created(partitions=1, source=SOURCE)


async def test_partitions_of_two_logs_are_refused(world: World) -> None:
    await world.make_topic(partitions=2)
    async with world.open() as log:
        await log.writer().append(0, [created(LOG_ID)], timeout_s=10)
        await log.writer().append(1, [created(OTHER_LOG_ID)], timeout_s=10)

        with pytest.raises(LogRefused, match=f"/1 belongs to the log {OTHER_LOG_ID}, not to {LOG_ID}"):
            await log.ensure_created(partitions=2, source=SOURCE)


async def test_a_log_that_lost_partition_0_is_refused(world: World) -> None:
    await world.make_topic(partitions=2)
    async with world.open() as log:
        await log.writer().append(1, [created(LOG_ID)], timeout_s=10)

        with pytest.raises(LogRefused, match="/0 is empty and other partitions are not"):
            await log.ensure_created(partitions=2, source=SOURCE)


async def test_a_start_beside_another_does_not_take_its_first_records_for_the_rest_of_a_lost_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.make_topic(partitions=2)
    async with world.open() as log:
        reader, writer = log.reader([0, 1]), log.writer()
        ends = reader.ends

        async def written_meanwhile() -> dict[int, int]:
            """Where partition 0 ends, then what another starter does, then where partition 1 ends."""
            before = await ends()
            if before[0] == 0:
                await writer.append(0, [created(LOG_ID)], timeout_s=10)
                await writer.append(1, [created(LOG_ID)], timeout_s=10)
            return {0: before[0], 1: (await ends())[1]}

        monkeypatch.setattr(reader, "ends", written_meanwhile)
        make = functools.partial(new_created, source=SOURCE)
        identity = await establish(reader, writer, topic=log.settings.topic, new_created=make)

    assert identity.log_id == LOG_ID


async def test_an_import_is_refused_until_it_is_complete(world: World) -> None:
    await world.make_topic(partitions=1)
    previous = PreviousLog(log_id=OTHER_LOG_ID, next_offset=3)
    async with world.open() as log:
        await log.writer().append(0, [created(LOG_ID, previous), a_record("1")], timeout_s=10)

        with pytest.raises(LogRefused, match=r"is an unfinished import: it ends at offset 2.*had 3"):
            await log.ensure_created(partitions=1, source=SOURCE)
        await log.writer().append(0, [a_record("2")], timeout_s=10)

        assert {0: (previous,)} == (await log.ensure_created(partitions=1, source=SOURCE)).previous


# Progress


async def test_progress_reaches_those_who_listen(log: Log) -> None:
    reader = log.progress_reader([0, 1])
    given = NewRecord(key=b"batch", value=b"50 %", headers=(("ce_type", b"progress"),))
    read: list[StoredRecord] = []

    async with asyncio.timeout(SOON_MS / 1000):
        while not read:  # what was sent before the reader had found the end is none of its business
            log.publish_progress(1, given)
            read = await reader.read(records_max=10, timeout_ms=200)

    assert (1, given) == (read[0].partition, NewRecord(read[0].key, read[0].value, read[0].headers))
    await reader.close()


async def test_progress_is_not_in_the_log(log: Log) -> None:
    log.publish_progress(0, a_record("50 %"))

    assert await (await reader_at(log, 0, 1)).read(records_max=10, timeout_ms=300) == []
    assert await log.reader([0, 1]).ends() == {0: 1, 1: 1}


# Kafka alone: no broker at all


async def test_without_a_broker_everything_says_so_within_its_bound(unique: str) -> None:
    async with EventLog.open(settings_for(NOWHERE, unique, request_timeout_ms=500, close_timeout_s=0.1)) as log:
        began = time.monotonic()
        for attempt in (
            log.check_version(),
            log.ensure_topics(partitions=1),
            log.ensure_created(partitions=1, source=SOURCE),
            log.reader([0]).seek(0, 0),
            log.writer().append(0, records("a"), timeout_s=0.5),
        ):
            with pytest.raises(LogUnavailable, match=NOWHERE):
                await attempt

        assert time.monotonic() - began < 20


async def test_the_queue_before_a_lane_is_bounded_and_those_who_do_not_get_in_sent_nothing(unique: str) -> None:
    async with EventLog.open(settings_for(NOWHERE, unique, queue_groups_max=3, close_timeout_s=0.1)) as log:
        writer = log.writer()

        answers = await asyncio.gather(
            *(writer.append(0, records(str(index)), timeout_s=0.5) for index in range(10)), return_exceptions=True
        )

        assert [LogUnavailable] * 10 == [type(answer) for answer in answers]
        assert writer._lanes[0]._queue.maxsize == 3
        assert writer._lanes[0]._queue.full()


async def test_closing_answers_those_in_the_queue_and_those_before_it(unique: str) -> None:
    async with EventLog.open(settings_for(NOWHERE, unique, queue_groups_max=2, close_timeout_s=0.1)) as log:
        writer = log.writer()
        waiting = [asyncio.create_task(writer.append(0, records(str(index)), timeout_s=60)) for index in range(8)]
        await asyncio.sleep(0)  # until each has begun

        await writer.close()

        async with asyncio.timeout(5):
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(answer) for answer in answers] == [LogUnavailable] * 8
        assert "closed before anything of this was sent" in str(answers[-1])


async def test_progress_nobody_takes_is_dropped_beyond_the_queue(unique: str) -> None:
    async with EventLog.open(settings_for(NOWHERE, unique, progress_queue_records_max=3)) as log:
        for percent in range(10):
            log.publish_progress(0, a_record(f"{percent} %"))

        assert [(record.value or b"").decode() for _, record in log._progress._queue] == ["7 %", "8 %", "9 %"]
        assert log._progress.dropped == 7


@pytest.mark.parametrize(("produce_version", "named"), [(10, "3.7"), (12, "4.0"), (14, "4.1 or newer")])
def test_releases_since_3_7_are_known(produce_version: int, named: str) -> None:
    assert named == release(produce_version=produce_version)


def test_an_old_release_is_refused() -> None:
    with pytest.raises(LogRefused, match=r"2.8 to 3.6, and Sluice needs 3.7 or newer"):
        release(produce_version=9)


# Kafka alone: headers that no client can read

NOT_UTF_8 = b"\xff\xfe"


async def append_unreadable(kafka: str, topic: str, *values: bytes) -> None:
    """One record batch, in partition 0; the last record has a header whose name is not UTF-8."""
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        batch: Any = producer.create_batch()
        for value in values[:-1]:
            batch.append(timestamp=None, key=None, value=value, headers=[])
        batch.append(timestamp=None, key=None, value=values[-1], headers=[("zz", b"")])
        spoiled = bytearray(batch._build().replace(b"zz", NOT_UTF_8))
        spoiled[17:21] = calc_crc32c(bytes(spoiled[21:])).to_bytes(4, "big")
        batch._buffer = bytes(spoiled)
        await (await producer.send_batch(batch, topic, partition=0))


async def read_on(reader: LogReader, read: list[StoredRecord], *, records_min: int) -> None:
    while len(read) < records_min:
        read += await reader.read(records_max=100, timeout_ms=SOON_MS)


async def test_a_record_that_no_client_can_read_is_refused_by_its_place_after_all_before_it(
    kafka: str, unique: str
) -> None:
    world = OnKafka(kafka, unique)
    await world.make_topic(partitions=2)
    async with world.open() as log:
        await log.writer().append(0, records("a"), timeout_s=10)
        await log.writer().append(1, records("other lane"), timeout_s=10)
        await append_unreadable(kafka, unique, b"b", b"unreadable")
        await log.writer().append(1, records("more"), timeout_s=10)
        await log.writer().append(0, records("c"), timeout_s=10)
        reader = log.reader([0, 1])
        for partition in (0, 1):
            await reader.seek(partition, 0)

        read: list[StoredRecord] = []
        with pytest.raises(LogRefused, match=f"{unique}/0 cannot be read at offset 2: a header .* is not UTF-8"):
            await read_on(reader, read, records_min=6)
        await reader.seek(0, 3)
        await read_on(reader, read, records_min=5)

    assert texts([record for record in read if record.partition == 0]) == ["a", "b", "c"]
    assert texts([record for record in read if record.partition == 1]) == ["other lane", "more"]


async def test_a_first_record_that_no_client_can_read_is_refused(kafka: str, unique: str) -> None:
    world = OnKafka(kafka, unique)
    await world.make_topic(partitions=1)
    await append_unreadable(kafka, unique, b"unreadable")
    async with world.open() as log:
        with pytest.raises(LogRefused, match=f"{unique}/0 cannot be read at offset 0"):
            await log.ensure_created(partitions=1, source=SOURCE)


# Kafka alone: producers


async def test_what_waits_together_is_sent_together(kafka: str, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    send_batch = AIOKafkaProducer.send_batch

    async def counted(self: AIOKafkaProducer, batch: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(batch.record_count())
        return await send_batch(self, batch, *arguments, **named)

    monkeypatch.setattr(AIOKafkaProducer, "send_batch", counted)
    async with EventLog.open(settings_for(kafka, unique, joined_bytes_max=100_000)) as log:
        await log.ensure_topics(partitions=1)
        writer = log.writer()

        await asyncio.gather(
            *(writer.append(0, [a_record(size_bytes=1_000)], timeout_s=30) for _ in range(500)),
        )

    assert sum(sizes) == 500
    assert len(sizes) < 20
    assert max(sizes) <= 100, "no batch is larger than groups are joined to"


async def test_a_poisoned_producer_is_replaced_and_what_it_held_is_of_unknown_outcome(kafka: str, unique: str) -> None:
    async with EventLog.open(settings_for(kafka, unique)) as log:
        await log.ensure_topics(partitions=1)
        writer = log.writer()
        await writer.append(0, records("a"), timeout_s=10)
        poisoned = await writer._producers.ready()
        poisoned._txn_manager.increment_sequence_number(TopicPartition(unique, 0), 5)  # as after a batch that was lost

        with pytest.raises(LogOutcomeUnknown, match="OutOfOrderSequence"):
            await writer.append(0, records("b"), timeout_s=10)

        assert await writer.append(0, records("c"), timeout_s=10) == 1
        assert await writer._producers.ready() is not poisoned


async def test_a_batch_the_broker_finds_too_large_does_not_end_the_writer(kafka: str, unique: str) -> None:
    world = OnKafka(kafka, unique)
    await world.make_topic(partitions=1, max_message_bytes="10000")
    async with world.open() as log:
        writer = log.writer()

        with pytest.raises(RecordTooLarge, match=r"max\.message\.bytes"):
            await writer.append(0, [a_record(size_bytes=50_000)], timeout_s=10)

        assert await writer.append(0, records("small"), timeout_s=10) == 0


# Kafka alone: a broker that is paused or killed


@pytest.fixture(scope="module")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedKafka]:
    """A broker that tests may pause; whoever does, lets it go on."""
    async with EmbeddedKafka(data_dir=tmp_path_factory.mktemp("fragile")) as server:
        yield server


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """What it comes to as soon as the broker, which may be slow on a busy machine, answers within its bound."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(LogUnavailable, LogOutcomeUnknown):
                return await attempt()


async def error_of(attempt: Any) -> tuple[type[Exception] | None, float]:
    """What a call raised, and how long it took in seconds."""
    began = time.monotonic()
    try:
        await attempt
    except LogError as error:
        return type(error), time.monotonic() - began
    return None, time.monotonic() - began


async def test_while_the_broker_is_paused_nothing_waits_beyond_its_bound_and_afterwards_all_goes_on(
    fragile: EmbeddedKafka, unique: str
) -> None:
    settings = settings_for(
        fragile.bootstrap_servers, unique, request_timeout_ms=1_000, silence_ms_max=1_000, append_stuck_s=60
    )
    async with EventLog.open(settings) as log:
        await patiently(lambda: log.ensure_topics(partitions=1))
        writer, reader = log.writer(), await patiently(lambda: reader_at(log, 0, 0))
        await writer.append(0, records("a"), timeout_s=10)
        before: list[str] = []
        while not before:
            before = texts(await patiently(lambda: reader.read(records_max=10, timeout_ms=5_000)))
        assert before == ["a"]

        with paused(fragile.pid):
            sent = await error_of(writer.append(0, records("b"), timeout_s=0.5))
            queued = await error_of(writer.append(0, records("never"), timeout_s=0.5))
            ends = await error_of(reader.ends())
            silent = [await error_of(reader.read(records_max=10, timeout_ms=300)) for _ in range(8)]

        assert [LogOutcomeUnknown, LogUnavailable, LogUnavailable] == [sent[0], queued[0], ends[0]]
        assert {None, LogUnavailable} == {error for error, _ in silent}
        assert max(seconds for _, seconds in (sent, queued, ends, *silent)) < 20
        async with asyncio.timeout(60):
            await writer.append(0, records("c"), timeout_s=60)
            read: list[str] = []
            while read[-1:] != ["c"]:
                with contextlib.suppress(LogUnavailable):
                    read += texts(await reader.read(records_max=10, timeout_ms=500))
        assert read == ["b", "c"], "what was sent landed once, what was only queued was withdrawn"
        assert reader.silent_ms < 1_000


async def test_a_batch_without_an_answer_is_given_up_with_its_producer(fragile: EmbeddedKafka, unique: str) -> None:
    settings = settings_for(fragile.bootstrap_servers, unique, request_timeout_ms=1_000, append_stuck_s=1.0)
    async with EventLog.open(settings) as log:
        await patiently(lambda: log.ensure_topics(partitions=1))
        writer = log.writer()
        await patiently(lambda: writer.append(0, records("a"), timeout_s=10))
        first = await writer._producers.ready()

        with paused(fragile.pid):
            stuck = await error_of(writer.append(0, records("b"), timeout_s=20))

        assert LogOutcomeUnknown is stuck[0]
        assert stuck[1] < 15
        await patiently(lambda: writer.append(0, records("c"), timeout_s=15))
        assert await writer._producers.ready() is not first


async def test_closing_is_bounded_while_the_broker_is_paused_and_leaves_nothing_behind(
    fragile: EmbeddedKafka, unique: str
) -> None:
    settings = settings_for(fragile.bootstrap_servers, unique, request_timeout_ms=30_000, close_timeout_s=0.5)
    before = asyncio.all_tasks()
    async with contextlib.AsyncExitStack() as stack:
        log = await stack.enter_async_context(EventLog.open(settings))
        await log.ensure_topics(partitions=1)
        writer, reader, progress = log.writer(), await reader_at(log, 0, 0), log.progress_reader([0])
        await writer.append(0, records("a"), timeout_s=10)
        await reader.read(records_max=10, timeout_ms=100)
        await progress.read(records_max=10, timeout_ms=100)
        log.publish_progress(0, a_record("1 %"))

        with paused(fragile.pid):
            log.publish_progress(0, a_record("2 %"))
            sent = asyncio.create_task(error_of(writer.append(0, records("b"), timeout_s=60)))
            queued = asyncio.create_task(error_of(writer.append(0, [a_record(size_bytes=5_000_000)], timeout_s=60)))
            await asyncio.sleep(0.2)  # until the first is on its way, of which nothing here tells
            began = time.monotonic()
            await stack.aclose()
            took_s = time.monotonic() - began

    assert took_s < 20
    assert [LogOutcomeUnknown, LogUnavailable] == [(await sent)[0], (await queued)[0]]
    await until_only(before)


async def until_only(before: set["asyncio.Task[Any]"]) -> None:
    """Wait until no task is left, of the client library for example, that was not there before."""
    async with asyncio.timeout(10):
        while not asyncio.all_tasks() <= before:
            await asyncio.wait(asyncio.all_tasks() - before - {asyncio.current_task()}, timeout=0.1)


@pytest.mark.timeout(180)
async def test_groups_in_flight_when_the_broker_is_killed_land_once_and_in_order(tmp_path: Path, unique: str) -> None:
    server = EmbeddedKafka(data_dir=tmp_path)
    await server.start()
    groups = [[f"{group}.{index}" for index in range(1_000)] for group in range(8)]
    settings = settings_for(
        server.bootstrap_servers, unique, request_timeout_ms=2_000, joined_bytes_max=1, append_stuck_s=90
    )
    async with EventLog.open(settings) as log:
        await patiently(lambda: log.ensure_topics(partitions=1))
        writer, reader = log.writer(), await patiently(lambda: reader_at(log, 0, 0))
        await writer.append(0, records("before"), timeout_s=10)

        appending = [asyncio.create_task(writer.append(0, records(*group), timeout_s=90)) for group in groups]
        await appending[0]
        os.kill(server.pid, signal.SIGKILL)
        port = server.port
        await server.stop()
        server = EmbeddedKafka(data_dir=tmp_path, port=port)
        await server.start()
        firsts = await asyncio.gather(*appending)

        read: list[str] = []
        async with asyncio.timeout(60):
            while len(read) < 8_001:
                with contextlib.suppress(LogUnavailable):
                    read += texts(await reader.read(records_max=10_000, timeout_ms=1_000))
    await server.stop()

    assert ["before", *(text for group in groups for text in group)] == read
    assert [1 + 1_000 * group for group in range(8)] == firsts


async def test_closing_waits_for_what_is_queued(kafka: str, unique: str) -> None:
    async with EventLog.open(settings_for(kafka, unique, close_timeout_s=30.0)) as log:
        await log.ensure_topics(partitions=1)
        writer, reader = log.writer(), log.reader([0])
        waiting = [asyncio.create_task(writer.append(0, records(text), timeout_s=10)) for text in "abc"]
        await asyncio.sleep(0)  # until each has begun

        await writer.close()

        assert await asyncio.gather(*waiting) == [0, 1, 2]
        assert await reader.ends() == {0: 3}
