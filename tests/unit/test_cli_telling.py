"""What is told of a long step: seldom, with the pace of the last seconds, for people and for programs."""

import pytest

from services.cli import telling
from services.cli.telling import News, Teller

Told = list[tuple[News, float]]


class Clock:
    """What time it is; a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def a_teller(clock: Clock, *, interval_s: float) -> tuple[Teller, Told]:
    told: Told = []
    return Teller(interval_s, lambda news, rate_per_s: told.append((news, rate_per_s)), clock), told


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    teller, told = a_teller(clock, interval_s=0.0)

    done = 0
    for step in [100] * 20 + [500] * 10:
        teller(News("exporting", done, 10_000))
        done, clock.now_s = done + step, clock.now_s + 1
    teller(News("exporting", done, 10_000))

    rates = [rate_per_s for _, rate_per_s in told]
    assert (rates[0], rates[1], rates[20], rates[-1]) == (0.0, 100.0, 100.0, 500.0)


def test_what_was_there_before_a_step_says_nothing_about_its_pace() -> None:
    clock = Clock()
    teller, told = a_teller(clock, interval_s=0.0)

    for news in (News("checking", 9_000, 9_000), News("exporting", 1_000, 41_000), News("exporting", 5_000, 41_000)):
        clock.now_s += 4
        teller(news)

    assert [rate_per_s for _, rate_per_s in told] == [0.0, 0.0, 1_000.0]


def test_what_goes_back_has_no_pace() -> None:
    clock = Clock()
    teller, told = a_teller(clock, interval_s=0.0)

    for done in (500, 100):
        teller(News("folding the log", done, 1_000))
        clock.now_s += 1

    assert [rate_per_s for _, rate_per_s in told] == [0.0, 0.0]


def test_a_new_step_is_told_at_once_and_else_seldom() -> None:
    clock = Clock()
    teller, told = a_teller(clock, interval_s=5.0)

    for done in range(12):
        teller(News("folding the log", done, 100))
        clock.now_s += 1
    teller(News("switching", 12, 100))

    assert [(news.step, news.done) for news, _ in told] == [
        ("folding the log", 0),
        ("folding the log", 5),
        ("folding the log", 10),
        ("switching", 12),
    ]


@pytest.mark.parametrize(
    ("news", "rate_per_s", "said"),
    [
        (News("beginning", 0, 0), 0.0, "beginning"),
        (News("exporting", 1_000, 41_000), 0.0, "exporting: 1,000 of 41,000 records"),
        (News("exporting", 5_000, 41_000), 999.6, "exporting: 5,000 of 41,000 records, 1,000 records/s, 0:37 left"),
        (News("checking", 2_000_000, 8_000_000, "bytes"), 1e6, "checking: 2.0 MB of 8.0 MB, 1.0 MB/s, 0:06 left"),
    ],
)
def test_people_are_told_a_sentence(news: News, rate_per_s: float, said: str) -> None:
    assert telling.sentence(news, rate_per_s) == said


def test_programs_are_told_numbers() -> None:
    assert telling.as_data(News("folding the log", 200, 1_000), 100.0) == {
        "step": "folding the log",
        "records": 200,
        "records_in_all": 1_000,
        "records_per_s": 100.0,
        "left_s": 8.0,
    }
    assert telling.as_data(News("beginning", 0, 0), 0.0)["left_s"] is None
