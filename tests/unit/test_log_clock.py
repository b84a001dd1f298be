"""What time a lane takes it to be: Kafka's, whatever the clock of this machine says."""

from dataclasses import dataclass

import pytest

from schemas.batch import Lane
from services.processor import clock as module
from services.processor.clock import LogClock

NOON_MS = 1_800_000_000_000


@dataclass
class Machine:
    """`monotonic_s` always goes on; its wall clock is not to be asked."""

    monotonic_s: float = 500.0

    def monotonic(self) -> float:
        return self.monotonic_s

    def time(self) -> float:
        raise AssertionError("the clock of this machine was asked")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module, "time", machine)
    return machine


def test_it_is_as_late_as_the_newest_record_says_and_goes_on_from_there(machine: Machine) -> None:
    clock = LogClock()
    assert clock.now_ms(Lane(0, next_offset=7, time_ms=NOON_MS)) == NOON_MS

    machine.monotonic_s += 90

    assert clock.now_ms(Lane(0, next_offset=7, time_ms=NOON_MS)) == NOON_MS + 90_000


def test_a_newer_record_sets_it(machine: Machine) -> None:
    clock = LogClock()
    clock.now_ms(Lane(0, next_offset=7, time_ms=NOON_MS))
    machine.monotonic_s += 90

    assert clock.now_ms(Lane(0, next_offset=8, time_ms=NOON_MS + 91_000)) == NOON_MS + 91_000


def test_after_kafkas_clock_was_set_back_it_does_not_run_ahead_of_the_newest_record(machine: Machine) -> None:
    clock = LogClock()
    clock.now_ms(Lane(0, next_offset=7, time_ms=NOON_MS))

    for next_offset in range(8, 100):  # the running maximum stays where it was
        machine.monotonic_s += 90
        assert clock.now_ms(Lane(0, next_offset=next_offset, time_ms=NOON_MS)) == NOON_MS
