"""When read models that do not move are a reason to say so."""

from schemas.position import Position
from services.standstill import Standstill


def at(offset: int) -> Position:
    return Position.of("1f3a9c02", {0: offset})


def test_nothing_stands_still_while_nothing_waits() -> None:
    still = Standstill()

    assert [still.look(at(1), waiting=False, now_s=float(second)) for second in range(3)] == [0.0, 0.0, 0.0]


def test_it_stands_still_from_when_facts_were_first_seen_to_wait() -> None:
    still = Standstill()
    still.look(at(1), waiting=False, now_s=0.0)

    assert [still.look(at(1), waiting=True, now_s=second) for second in (10.0, 11.5, 20.0)] == [0.0, 1.5, 10.0]


def test_every_step_forward_counts_as_movement() -> None:
    still = Standstill()

    assert [still.look(at(n), waiting=True, now_s=10.0 * n) for n in range(4)] == [0.0] * 4
    assert still.look(at(3), waiting=True, now_s=31.0) == 1.0


def test_what_caught_up_begins_anew() -> None:
    still = Standstill()
    still.look(at(1), waiting=True, now_s=0.0)
    still.look(at(1), waiting=False, now_s=5.0)

    assert still.look(at(1), waiting=True, now_s=6.0) == 0.0
