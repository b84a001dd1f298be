"""What is done when a part of `up` ends by itself: all is stopped (`Parts`), or it is started again (`Supervisor`).

While all is started for the first time the end of one is the end of all, since what cannot start now (a wrong setting,
a damaged file) could not start in a minute. From then on a supervisor never gives up: whatever comes back, a disk that
has room again say, is used, and until then the attempts are rare.
How a part is started and how it ends: `parts.py`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import httpx

from services.cli.errors import CliError
from services.cli.part_logs import Say
from services.cli.parts import Part, how
from services.embedded import EmbeddedError
from services.embedded.folders import last_lines
from services.lifecycle import cancelled

LAST_LINES = 15
LAST_LINES_OF_RESTARTED = 5
T = TypeVar("T")


class PartEnded(CliError):  # noqa: N818  # it is the news, whether or not something was wrong
    """A part ended that should not have."""


@dataclass(slots=True)
class Parts:
    """The parts that run, watched: when one ends by itself, whoever waits here learns it."""

    _ends: dict[asyncio.Task[int], Part] = field(default_factory=dict)

    def watch(self, part: Part, wait: Callable[[], Coroutine[Any, Any, int]]) -> None:
        self._ends[asyncio.create_task(wait())] = part

    async def forget(self) -> None:
        """From here on an end is a wanted one, or somebody else's to wait for."""
        ends, self._ends = list(self._ends), {}
        await cancelled(*ends)

    async def until_one_ends(self) -> NoReturn:
        """Raises PartEnded when a part ends. Waits for ever where there are no parts."""
        if not self._ends:
            await asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait(self._ends, return_when=asyncio.FIRST_COMPLETED)
        ended = next(iter(done))
        part = self._ends[ended]
        ending = f"{part.name} ended {how(ended.result())}, so all is stopped."
        raise PartEnded("\n".join(_with_last_words(ending, part, lines_max=LAST_LINES)))

    async def unless_one_ends(self, work: Awaitable[T]) -> T:
        """The result of `work`; PartEnded when a part ends before it is there."""
        working = asyncio.ensure_future(work)
        watching = asyncio.create_task(self.until_one_ends())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await watching
            return await working
        finally:
            watching.cancel()
            working.cancel()
            await asyncio.gather(watching, working, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to wait before a part is started again: twice as long each time, up to a limit, and the shortest again
    once it has done its work for a while.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    well_after_s: float = 60.0

    def pause_s(self, ends_in_a_row: int) -> float:
        """Before the start that follows this many ends (from 1 on), none of which came after a good while."""
        return min(self.longest_s, self.first_s * 2.0 ** min(ends_in_a_row - 1, 30))


@dataclass(slots=True)
class Kept:
    """A part that is kept running. `since`: when its newest run began, or when that was ready."""

    part: Part
    since: float
    ready: bool = True
    ends_in_a_row: int = 0
    restarts: int = 0


class Supervisor:
    """Starts again what ends, each part on its own, and says so.

    `changed` is called when other processes do the work than before; what it raises of OSError is said and no more.
    """

    def __init__(
        self, *, http: httpx.AsyncClient, say: Say, changed: Callable[[], None], pace: Pace | None = None
    ) -> None:
        self.restarts: dict[str, int] = {}
        self._http = http
        self._say = say
        self._changed = changed
        self._pace = pace or Pace()

    async def keep(self, parts: Iterable[Part]) -> None:
        """Keep these parts running, which are ready now. Never returns; cancel it before they are to be stopped."""
        async with asyncio.TaskGroup() as keeping:
            for part in parts:
                keeping.create_task(self._keep_one(Kept(part, since=time.monotonic())))

    async def _keep_one(self, kept: Kept) -> NoReturn:
        ended = await self._ended(kept)
        while True:
            await self._pause(kept, ended)
            ended = await self._start_again(kept)

    async def _pause(self, kept: Kept, ended: str) -> None:
        """Say that it ended and when it is tried again, and wait for that."""
        well = kept.ready and time.monotonic() - kept.since >= self._pace.well_after_s
        kept.ends_in_a_row = 1 if well else kept.ends_in_a_row + 1
        pause_s = self._pace.pause_s(kept.ends_in_a_row)
        ending = f"{ended}; restart {kept.restarts + 1} in {pause_s:g} s."
        self._tell(kept, *_with_last_words(ending, kept.part, lines_max=LAST_LINES_OF_RESTARTED))
        self._tell_others(kept)
        await asyncio.sleep(pause_s)

    async def _start_again(self, kept: Kept) -> str:
        """See it through a whole life: started, ready, ended. Answers how it ended."""
        kept.since, kept.ready = time.monotonic(), False
        kept.restarts += 1
        self.restarts[kept.part.name] = kept.restarts
        try:
            await kept.part.start_again()
        except (EmbeddedError, OSError) as error:
            reason, _, _ = str(error).partition("\n")  # what follows is the end of its log
            return f"could not be started: {reason.rstrip('.')}"
        self._tell_others(kept)
        telling = asyncio.create_task(self._tell_when_ready(kept))
        try:
            return await self._ended(kept)
        finally:
            await cancelled(telling)

    async def _ended(self, kept: Kept) -> str:
        how_it_ended = await kept.part.end(self._http)
        ran_s = time.monotonic() - kept.since
        return f"ended {how_it_ended}, " + (
            f"{ran_s:.1f} s after it was ready" if kept.ready else f"{ran_s:.1f} s after its start and never ready"
        )

    async def _tell_when_ready(self, kept: Kept) -> None:
        while not kept.ready:
            try:
                where = await kept.part.ready(self._http)
            except CliError as error:
                self._tell(kept, str(error))
            else:
                now = time.monotonic()
                self._tell(kept, f"ready again at {where} after {now - kept.since:.1f} s (restart {kept.restarts})")
                kept.since, kept.ready = now, True

    def _tell_others(self, kept: Kept) -> None:
        try:
            self._changed()
        except OSError as error:
            self._tell(kept, f"its process could not be noted: {error}")

    def _tell(self, kept: Kept, *texts: str) -> None:
        for line in "\n".join(texts).rstrip().splitlines():
            self._say(kept.part.name, line)


def _with_last_words(ending: str, part: Part, *, lines_max: int) -> tuple[str, ...]:
    """How a part ended, and the end of its log unless its lines are told anyway as they come."""
    if part.followed:
        return (f"{ending} Its lines are in {part.log_file}",)
    last = last_lines(part.log_file, after_byte=part.log_began, lines_max=lines_max)
    return f"{ending} The end of {part.log_file}:", last
