"""How a long step is told while it goes on: how far, how fast of late, how long it will take.

It goes to standard error: one line that changes on a terminal, a line every few seconds elsewhere, JSON lines where
they are asked for. A new step is told at once, and whatever was counted before it says nothing about its pace.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from services.cli.display import console_of, duration, size

LINE_INTERVAL_S = 5.0
JSON_INTERVAL_S = 1.0
STATUS_INTERVAL_S = 0.2
RATE_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class News:
    """How far a step is, `done` of so many; `of` is 0 where that is not known yet."""

    step: str
    done: int
    of: int
    unit: Literal["records", "bytes"] = "records"


Tell = Callable[[News], None]


@dataclass(slots=True)
class Teller:
    """Passes on what is new no more often than each `interval_s`, with how much is done in a second."""

    interval_s: float
    tell: Callable[[News, float], None]
    clock: Callable[[], float] = time.monotonic
    _step: str = ""
    _marks: list[tuple[float, int]] = field(default_factory=list)

    def __call__(self, news: News) -> None:
        now_s = self.clock()
        if news.step != self._step:
            self._step, self._marks = news.step, []
        elif now_s - self._marks[-1][0] < self.interval_s:
            return
        self._marks.append((now_s, news.done))
        while len(self._marks) > 2 and now_s - self._marks[0][0] > RATE_WINDOW_S:  # noqa: PLR2004  # a rate needs two
            self._marks.pop(0)
        self.tell(news, self._rate_per_s)

    @property
    def _rate_per_s(self) -> float:
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return max(0.0, (last - first) / (last_s - first_s)) if last_s > first_s else 0.0


@contextlib.contextmanager
def told_meanwhile(*, as_json: bool = False) -> Iterator[Tell]:
    """What to call with news."""
    console = console_of(stderr=True)
    if as_json:
        yield Teller(JSON_INTERVAL_S, lambda news, rate_per_s: _write(json.dumps(as_data(news, rate_per_s))))
    elif console.is_terminal:
        with console.status("") as status:
            yield Teller(STATUS_INTERVAL_S, lambda news, rate_per_s: status.update(sentence(news, rate_per_s)))
    else:
        yield Teller(LINE_INTERVAL_S, lambda news, rate_per_s: _write(sentence(news, rate_per_s)))


def sentence(news: News, rate_per_s: float) -> str:
    if not news.of:
        return news.step
    done = size(news.done) if news.unit == "bytes" else f"{news.done:,}"
    said = f"{news.step}: {done} of {_amount(news.of, news.unit)}"
    left_s = _left_s(news, rate_per_s)
    return said if left_s is None else f"{said}, {_amount(rate_per_s, news.unit)}/s, {duration(left_s)} left"


def as_data(news: News, rate_per_s: float) -> dict[str, Any]:
    left_s = _left_s(news, rate_per_s)
    return {
        "step": news.step,
        news.unit: news.done,
        f"{news.unit}_in_all": news.of,
        f"{news.unit}_per_s": round(rate_per_s, 1),
        "left_s": None if left_s is None else round(left_s, 1),
    }


def _left_s(news: News, rate_per_s: float) -> float | None:
    return max(0, news.of - news.done) / rate_per_s if rate_per_s else None


def _amount(number: float, unit: str) -> str:
    return size(number) if unit == "bytes" else f"{number:,.0f} {unit}"


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
