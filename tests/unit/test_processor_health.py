"""When a processor says that it does not get on, though no part of it said that it was lost."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.events import UploadStarted
from services.processor import health as module
from services.processor.health import STILL_MAX_S, WORK_GRACE_S, Health
from services.processor.lane import Doing


@dataclass
class Clock:
    now_s: float = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def a_hand(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"epoch": 3, "doing": None, "steps": 0, "has_to_do": False, "queued": 0, **changes})


def at_work(hand: SimpleNamespace, *, committed: int = 5, dirty: bool = False) -> Health:
    health = Health()
    health.state, health.work_timeout_s = "working", 120.0
    health.projection = SimpleNamespace(committed=committed, dirty=dirty)  # type: ignore[assignment]  # as far as asked
    health.hand = hand  # type: ignore[assignment]  # as far as it is asked
    return health


def look(health: Health, clock: Clock, *, after_s: float, reads: int = 1) -> list[str]:
    clock.now_s += after_s
    health.reads += reads
    return list(health.condition().problems)


def test_an_idle_lane_is_well_for_ever(clock: Clock) -> None:
    health = at_work(a_hand())

    assert [look(health, clock, after_s=3_600) for _ in range(3)] == [[], [], []]


def test_a_log_that_nobody_asks_any_more_is_said(clock: Clock) -> None:
    health = at_work(a_hand())
    look(health, clock, after_s=1)

    (said,) = look(health, clock, after_s=STILL_MAX_S + 1, reads=0)

    assert said == "nobody has asked the log for 16 s"
    assert look(health, clock, after_s=1) == []


def test_read_models_that_take_nothing_are_said(clock: Clock) -> None:
    health = at_work(a_hand(), dirty=True)
    look(health, clock, after_s=1)

    (said,) = look(health, clock, after_s=STILL_MAX_S + 1)

    assert "the read models have not taken what was read" in said


def test_a_hand_whose_facts_the_log_does_not_take_is_said(clock: Clock) -> None:
    health = at_work(a_hand(doing=Doing(since_s=clock.now_s), has_to_do=True, queued=4))
    look(health, clock, after_s=1)

    (said,) = look(health, clock, after_s=STILL_MAX_S + 1)

    assert "the log, which does not take its facts" in said
    assert said.endswith("4 files wait")


def test_a_file_may_take_as_long_as_it_is_allowed_to_and_no_longer(clock: Clock) -> None:
    started = UploadStarted(
        batch_id="019c13a8-7b6e-7a31-9d5e-3f0c6b1d2a00",
        upload_id="019c13a8-7b6f-7c52-8e0a-5d4b9c7e1f00",
        attempt=1,
        epoch=3,
    )
    health = at_work(a_hand(doing=Doing(clock.now_s, started), has_to_do=True))
    look(health, clock, after_s=1)

    within = look(health, clock, after_s=health.work_timeout_s)
    (beyond,) = look(health, clock, after_s=WORK_GRACE_S + 1)
    in_work = health.condition().in_work

    assert within == []
    assert "at one file for 151 s" in beyond
    assert in_work is not None
    assert (in_work.upload_id, in_work.attempt, in_work.seconds) == (started.upload_id, 1, 152.0)


def test_files_that_wait_while_the_hand_does_nothing_are_said(clock: Clock) -> None:
    health = at_work(a_hand(has_to_do=True, queued=2))
    look(health, clock, after_s=1)

    (said,) = look(health, clock, after_s=STILL_MAX_S + 1)

    assert said == "the lane's hand has been at nothing for 16 s, and 2 files wait"


@pytest.mark.parametrize(
    ("state", "held", "problem", "said"),
    [
        ("working", True, None, []),
        ("working", False, None, ["the lane's lock is lost: another holds it"]),
        ("standing by", False, None, []),
        ("standing by", False, "no answer", ["the lane's lock cannot be asked for: no answer"]),
    ],
)
def test_who_cannot_ask_for_the_lock_says_so_and_who_stands_by_for_another_does_not(
    *, state: str, held: bool, problem: str | None, said: list[str]
) -> None:
    health = Health()
    health.state = state
    health.lane_lock = SimpleNamespace(held=held, problem=problem)  # type: ignore[assignment]  # as far as it is asked

    assert health.problems() == said
