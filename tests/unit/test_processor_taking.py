"""Taking a lane, on a log and rows in memory: who claims it when, and what a look back finds."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from schemas.events import Fact, LaneClaimed, LogEvent, decode
from schemas.records import NewRecord, StoredRecord
from services.eventlog import LogError, LogRefused, LogSettings, LogUnavailable
from services.processor import taking
from services.processor.health import Health
from services.processor.projection import Projection
from tests.examples import (
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_UPLOAD,
    UPLOAD,
    a_batch_created,
    a_batch_sealed,
    a_lane_claimed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_started,
    records_of,
)
from tests.fakes import FakeKafka, FakeLog
from tests.fakes_rows import MemoryRows, Tables

WAIT_S = 30


@dataclass
class Broker:
    """What `taking.claim` reads and writes."""

    records: list[StoredRecord]
    next: int = 0
    looked: int = 0

    async def ends(self) -> dict[int, int]:
        self.looked += 1
        return {0: len(self.records)}

    async def read(self, **_: object) -> list[StoredRecord]:
        records, self.next = self.records[self.next :], len(self.records)
        return records

    async def append(self, _partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        assert timeout_s > 0
        self.records += [
            StoredRecord(0, len(self.records), self.records[-1].timestamp_ms, one.key, one.value, one.headers)
            for one in records
        ]
        return len(self.records) - 1

    def claims(self) -> list[LogEvent]:
        facts = [fact for fact in map(decode, self.records) if isinstance(fact, Fact)]
        return [fact.event for fact in facts if isinstance(fact.event, LaneClaimed)]


async def test_a_newer_claim_is_not_answered_by_who_does_not_hold_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "RETRY_INTERVAL_S", 0)
    newer = a_lane_claimed(after=EPOCH, worker_id="worker-2")
    broker, health = Broker(records_of(*OPENING, newer)), Health()
    health.lane_lock = lock = SometimesHeld(broker)  # type: ignore[assignment]  # as far as it is asked
    projection = await Projection.open(MemoryRows(Tables()), partition=0, log_id=LOG_ID)

    async with asyncio.timeout(WAIT_S):
        epoch = await taking.claim(broker, broker, projection, health)  # type: ignore[arg-type]  # as asked

    assert lock.seen[:3] == [(False, 0, 2), (False, 0, 2), (True, 0, 2)], "who does not hold it does nothing"
    assert lock.seen[3:] == [(False, 1, 2), (True, 1, 2), (True, 2, 2)], "it was lost meanwhile"
    assert [type(event) for event in broker.claims()] == [LaneClaimed] * 3
    assert epoch == len(OPENING) + 1


@dataclass
class SometimesHeld:
    """A lane's lock: whether it was held each time it was asked for, and how often the log was looked at and how many
    claims it had by then."""

    broker: Broker
    answers: list[bool] = field(default_factory=lambda: [False, False, True, False, True, True])
    seen: list[tuple[bool, int, int]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        held = self.answers.pop(0)
        self.seen.append((held, self.broker.looked, len(self.broker.claims())))
        return held


@pytest.mark.parametrize(("records_max", "found"), [(20_000, {UPLOAD}), (5, {UPLOAD}), (4, set())])
async def test_who_takes_a_lane_looks_back_so_far_for_what_a_late_copy_began(
    monkeypatch: pytest.MonkeyPatch, records_max: int, found: set[str]
) -> None:
    monkeypatch.setattr(taking, "LOOK_BACK_RECORDS_MAX", records_max)
    monkeypatch.setattr(taking, "READ_RECORDS_MAX", 2)
    copied = an_upload_started()
    events = [a_lane_claimed(), a_batch_created(), an_upload_queued(), copied, an_upload_interrupted()]
    events += [a_batch_sealed(), copied, an_upload_queued(OTHER_UPLOAD), a_lane_claimed(after=EPOCH), copied]
    records = records_of(*events)
    records[6] = records[9] = records[3]
    async with FakeLog.open(FakeKafka(), LogSettings(bootstrap_servers="nowhere:1")) as log:
        await log.ensure_topics(partitions=1)
        await log.ensure_created(partitions=1, source="test")
        await log.writer().append(0, [NewRecord(one.key, one.value, one.headers) for one in records], timeout_s=5)

        assert await taking.landed_late(log, 0, Health(), 9, {UPLOAD: 1}) == found
        assert await taking.landed_late(log, 0, Health(), 9, {UPLOAD: 2}) == set()


@pytest.mark.parametrize(
    ("trouble", "found", "said"),
    [
        (LogUnavailable("away"), {UPLOAD}, ["log lost", "log back"]),
        (LogRefused("a record is damaged"), set(), []),
    ],
    ids=["away for a moment", "refused"],
)
async def test_a_look_back_waits_for_the_log_and_does_without_what_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, trouble: LogError, found: set[str], said: list[str]
) -> None:
    monkeypatch.setattr(taking, "RETRY_INTERVAL_S", 0)
    health, heard = Health(), list[str]()
    monkeypatch.setattr(health, "lost", lambda part, _reason: heard.append(f"{part} lost"))
    monkeypatch.setattr(health, "back", lambda part: heard.append(f"{part} back"))
    started, interrupted = an_upload_started(), an_upload_interrupted()
    records = records_of(*OPENING, started, interrupted, started, a_lane_claimed(after=EPOCH))
    records[4] = replace(records[2], offset=4)
    reader = SimpleNamespace(seek=AsyncMock(), read=AsyncMock(side_effect=[trouble, records]), close=AsyncMock())
    log: Any = SimpleNamespace(reader=lambda _partitions: reader)

    assert await taking.landed_late(log, 0, health, 5, {UPLOAD: 1}) == found
    assert heard == said
    reader.close.assert_awaited_once()
