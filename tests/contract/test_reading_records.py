"""Old records are read again, those that are asked for and no others, and no reader stays open: in memory and on Kafka.

`opened` holds the readers that were made and not closed yet.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from schemas.records import StoredRecord
from services.eventlog import Log, LogReader, LogRefused, LogUnavailable, records_at, records_between
from services.eventlog import records as reading
from services.eventlog.records import GAP_RECORDS_MAX, ranges
from tests.fakes import FakeKafka
from tests.worlds import SOURCE, InMemory, records, texts

MANY = GAP_RECORDS_MAX + 100


@pytest.fixture
def opened(log: Log, monkeypatch: pytest.MonkeyPatch) -> list[LogReader]:
    made: list[LogReader] = []
    make = log.reader

    def reader(partitions: Any) -> LogReader:
        one: Any = make(partitions)
        close = one.close

        async def closed() -> None:
            await close()
            made.remove(one)

        one.close = closed
        made.append(one)
        return one

    monkeypatch.setattr(log, "reader", reader)
    return made


async def all_of(groups: AsyncGenerator[list[StoredRecord]]) -> list[StoredRecord]:
    async with aclosing(groups):
        return [record async for group in groups for record in group]


async def test_what_stands_at_some_places_is_read_in_their_order_whatever_is_between(
    log: Log, opened: list[LogReader]
) -> None:
    await log.writer().append(0, records(*map(str, range(1, 1 + MANY))), timeout_s=10)
    await log.writer().append(1, records("other lane"), timeout_s=10)

    places = [(1, 1), (0, MANY), (0, 3), (0, 5)]
    found = [record async for record in records_at(log, places)]

    assert ["3", "5", str(MANY), "other lane"] == texts(found)
    assert [(record.partition, record.offset) for record in found] == [(0, 3), (0, 5), (0, MANY), (1, 1)]
    assert opened == []


async def test_what_stands_between_two_offsets_is_read_and_the_second_left_out(
    log: Log, opened: list[LogReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.writer().append(0, records("a", "b", "c", "d"), timeout_s=10)
    monkeypatch.setattr(reading, "READ_RECORDS_MAX", 2)

    some = await all_of(records_between(log, 0, 1, 4))
    none = await all_of(records_between(log, 0, 4, 4))

    assert texts(some) == ["a", "b", "c"]
    assert none == []
    assert opened == []


async def test_nothing_is_asked_of_the_log_where_nothing_is_wanted(log: Log, opened: list[LogReader]) -> None:
    assert [record async for record in records_at(log, [])] == []
    assert opened == []


@pytest.fixture
async def pausable(unique: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeKafka, Log]]:
    """A log of two records, which are read one by one, and the broker in memory that has it."""
    world = InMemory(unique)
    monkeypatch.setattr(reading, "READ_RECORDS_MAX", 1)
    monkeypatch.setattr(reading, "READ_TIMEOUT_MS", 1)
    async with world.open(silence_ms_max=1) as log:
        await log.ensure_topics(partitions=1)
        await log.ensure_created(partitions=1, source=SOURCE)
        await log.writer().append(0, records("a", "b"), timeout_s=10)
        yield world.kafka, log


async def test_what_does_not_come_is_not_waited_for_without_end(pausable: tuple[FakeKafka, Log]) -> None:
    kafka, log = pausable
    async with aclosing(records_between(log, 0, 1, 3, silence_max_s=0.3)) as groups:
        await anext(groups)
        kafka.pause()

        with pytest.raises(LogUnavailable, match=r"no old records for 0\.3 s"):
            await anext(groups)


async def test_a_place_beyond_the_end_is_refused(log: Log, opened: list[LogReader]) -> None:
    for beyond in (1, 7):  # 1: a reader may stand there, but there is nothing to read yet
        with pytest.raises(LogRefused, match=f"ends at offset 1, but {beyond + 1}"):
            [record async for record in records_at(log, [(0, beyond)])]

    assert opened == []


async def test_who_stops_early_leaves_no_reader_behind(
    log: Log, opened: list[LogReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.writer().append(0, records("a", "b"), timeout_s=10)
    monkeypatch.setattr(reading, "READ_RECORDS_MAX", 1)

    async with aclosing(records_at(log, [(0, 1), (0, 2)])) as found:
        first = await anext(found)
        assert len(opened) == 1

    assert texts([first]) == ["a"]
    assert opened == []


async def test_reading_goes_on_when_the_log_is_back(pausable: tuple[FakeKafka, Log]) -> None:
    kafka, log = pausable
    async with aclosing(records_between(log, 0, 1, 3)) as groups:
        given = [await anext(groups)]

        kafka.pause()
        rest = asyncio.create_task(anext(groups))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(rest), 0.05)
        kafka.resume()
        given.append(await rest)

    assert [texts(each) for each in given] == [["a"], ["b"]]


def test_offsets_close_together_are_read_in_one_go_and_gaps_are_skipped() -> None:
    far = 5 + GAP_RECORDS_MAX

    assert list(ranges([3])) == [(3, 4)]
    assert list(ranges([3, 5, far, far + 1 + GAP_RECORDS_MAX, 10_000])) == [
        (3, far + 1),
        (far + 1 + GAP_RECORDS_MAX, far + 2 + GAP_RECORDS_MAX),
        (10_000, 10_001),
    ]
