"""Taking a lane, on a log and rows in memory: who claims it when, and whose work what is found started was."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.events import Fact, LaneClaimed, LogEvent, decode
from schemas.records import NewRecord, StoredRecord
from services.processor import main, taking
from services.processor.health import Health
from services.processor.presence import Worker
from services.processor.projection import GenerationChangedError, Projection
from services.processor.taking import Tenure
from tests.examples import EPOCH, LOG_ID, OPENING, a_lane_claimed, records_of
from tests.fakes_rows import MemoryRows, Tables

WAIT_S = 30
OWN, OTHER = "worker-1", "worker-2"


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
    newer = a_lane_claimed(after=EPOCH, worker_id=OTHER)
    broker, health = Broker(records_of(*OPENING, newer)), Health()
    health.lane_lock = lock = SometimesHeld(broker)  # type: ignore[assignment]  # as far as it is asked
    projection = await Projection.open(MemoryRows(Tables()), partition=0, log_id=LOG_ID)
    tenure = Tenure(OWN)

    async with asyncio.timeout(WAIT_S):
        epoch = await taking.claim(broker, broker, projection, health, tenure)  # type: ignore[arg-type]  # as asked

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


@pytest.mark.parametrize(
    ("claims", "unbroken"),
    [
        ([(5, OWN, EPOCH)], True),
        ([(5, OWN, EPOCH), (7, OWN, 5)], True),
        ([(EPOCH, OWN, None), (5, OWN, EPOCH)], True),
        ([(5, OTHER, EPOCH)], False),
        ([(5, OTHER, EPOCH), (7, OWN, 5)], False),
        ([(5, OWN, 3)], False),
    ],
    ids=["own", "own after a claim in doubt", "read once more", "other", "other between", "not seen between"],
)
def test_a_lane_passed_from_own_to_own_is_unbroken(
    claims: Sequence[tuple[int, str, int | None]], *, unbroken: bool
) -> None:
    tenure = Tenure(OWN)
    tenure.left(EPOCH)
    for offset, worker_id, after in claims:
        tenure.see(offset, a_lane_claimed(after=after, worker_id=worker_id))

    assert tenure.unbroken(claims[-1][0]) is unbroken


def test_a_lane_in_which_something_is_begun_is_not_unbroken() -> None:
    tenure = Tenure(OWN)
    tenure.left(EPOCH)
    tenure.left(None)
    tenure.see(5, a_lane_claimed(after=EPOCH, worker_id=OWN))

    assert not tenure.unbroken(5)


async def test_the_own_claim_is_known_as_such_when_it_is_read_back() -> None:
    broker, health, tenure = Broker(records_of(*OPENING)), Health(), Tenure(OWN)
    health.lane_lock = SimpleNamespace(held=True)  # type: ignore[assignment]  # as far as it is asked
    projection = await Projection.open(MemoryRows(Tables()), partition=0, log_id=LOG_ID)
    tenure.left(EPOCH)

    epoch = await taking.claim(broker, broker, projection, health, tenure)  # type: ignore[arg-type]  # as asked

    assert epoch == len(OPENING)
    assert tenure.unbroken(epoch)


@pytest.mark.parametrize("finished", [True, False])
async def test_only_a_hand_that_finished_at_a_switch_leaves_nothing_begun(
    monkeypatch: pytest.MonkeyPatch, *, finished: bool
) -> None:
    health, found = Health(), []

    async def work_lane(_shop: object, _health: object, _stop: object, tenure: Tenure) -> None:
        own = Worker.this_process().worker_id
        tenure.see(5, a_lane_claimed(after=EPOCH, worker_id=own))
        found.append(tenure.unbroken(5))
        if len(found) == 1:
            health.hand = SimpleNamespace(finished=finished, epoch=EPOCH)  # type: ignore[assignment]  # as far as it is asked
            raise GenerationChangedError("other read models are live")

    monkeypatch.setattr(main, "_work_lane", work_lane)
    shop: Any = SimpleNamespace(settings=SimpleNamespace(partition=0))
    await main._work_lanes(shop, health, asyncio.Event())

    assert found == [False, finished]
