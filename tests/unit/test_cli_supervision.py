"""What `up` does when a part dies: how long it waits, what it says, and that nothing makes it give up."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from services.cli.errors import CliError
from services.cli.part_logs import followed
from services.cli.parts import Patience, Service, how
from services.cli.supervision import Pace, PartEnded, Parts, Supervisor
from services.embedded import EmbeddedError
from services.embedded.folders import FolderLock
from services.embedded.process import GuardedProcess

SOON_S = 30
QUICK = Pace(first_s=0.001, longest_s=0.002, well_after_s=60)


class Scripted:
    """A part whose ends come as they are told, and whose starts fail as the script says."""

    name = "processor"
    followed = False

    def __init__(self, folder: Path, *failures: Exception | None) -> None:
        self.log_file = folder / "processor.log"
        self.log_file.write_text("an old line\nthe last words\n")
        self.log_began = len("an old line\n")
        self.starts = 0
        self.never_ready = False
        self._failures = list(failures)
        self._pids = itertools.count(101)
        self.pid: int | None = 100
        self._ends: asyncio.Queue[str] = asyncio.Queue()

    def ends(self, ended: str) -> None:
        self._ends.put_nowait(ended)

    async def start_again(self) -> None:
        self.starts += 1
        failure = self._failures.pop(0) if self._failures else None
        if failure:
            raise failure
        self.pid = next(self._pids)

    async def ready(self, http: httpx.AsyncClient) -> str:  # noqa: ARG002  # as parts are asked
        if self.never_ready:
            self.never_ready = False
            raise CliError("processor was not ready within 90 s: no lane")
        return "http://here"

    async def end(self, http: httpx.AsyncClient) -> str:  # noqa: ARG002  # as parts are asked
        ended = await self._ends.get()
        self.pid = None
        return ended


class Told:
    """Remembers what was said, and lets one wait for it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = asyncio.Condition()

    def __call__(self, part: str, line: str) -> None:
        self.lines.append(f"{part}: {line}")
        self._news = asyncio.ensure_future(self._wake())

    async def _wake(self) -> None:
        async with self._more:
            self._more.notify_all()

    async def until(self, words: str) -> str:
        async with asyncio.timeout(SOON_S), self._more:
            await self._more.wait_for(lambda: any(words in line for line in self.lines))
        return next(line for line in self.lines if words in line)


@contextlib.asynccontextmanager
async def kept(
    part: Scripted, told: Told, *, pace: Pace = QUICK, noted: list[int | None] | None = None
) -> AsyncIterator[Supervisor]:
    """A supervisor at work on one part; `noted` gets its process at each change."""

    def note() -> None:
        if noted is None:
            raise OSError(28, "No space left on device")
        noted.append(part.pid)

    async with httpx.AsyncClient() as http:
        supervisor = Supervisor(http=http, say=told, changed=note, pace=pace)
        keeping = asyncio.create_task(supervisor.keep([part]))
        yield supervisor
        assert not keeping.done()
        keeping.cancel()
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(keeping, return_exceptions=True)


def test_each_wait_is_twice_the_one_before_up_to_a_limit() -> None:
    pace = Pace(first_s=0.5, longest_s=30.0)

    waits = [pace.pause_s(ends) for ends in range(1, 10)]

    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert pace.pause_s(1_000_000) == 30


async def test_what_died_is_started_again_and_every_step_is_told(tmp_path: Path) -> None:
    part, told, noted = Scripted(tmp_path), Told(), list[int | None]()

    async with kept(part, told, noted=noted) as supervisor:
        part.ends("by SIGKILL")
        await told.until("ready again at http://here")

    assert re.search(
        r"ended by SIGKILL, \d+\.\d s after it was ready; restart 1 in 0\.001 s\. The end of", told.lines[0]
    )
    assert told.lines[1:2] == ["processor:   the last words"]
    assert noted == [None, 101]
    assert supervisor.restarts == {"processor": 1}


async def test_a_part_that_dies_again_and_again_is_tried_at_the_slowest_pace_for_ever(tmp_path: Path) -> None:
    failures = [EmbeddedError("the disk is full\nThe end of its log"), OSError(28, "No space left on device")]
    part, told = Scripted(tmp_path, *failures), Told()

    async with kept(part, told, noted=[]) as supervisor:
        part.ends("with code 1")
        await told.until("(restart 3)")
        for count in range(4, 9):
            part.ends("with code 2")
            await told.until(f"(restart {count})")

    waits = [line.partition(" in ")[2].partition(" s.")[0] for line in told.lines if "; restart" in line]
    assert waits == ["0.001", *["0.002"] * 7]
    assert any("could not be started: the disk is full; restart 2" in line for line in told.lines)
    assert any("could not be started: [Errno 28] No space left on device; restart 3" in line for line in told.lines)
    assert supervisor.restarts == {"processor": 8}


async def test_the_wait_is_short_again_after_a_part_has_run_well_for_a_while(tmp_path: Path) -> None:
    part, told = Scripted(tmp_path), Told()

    async with kept(part, told, noted=[], pace=Pace(first_s=0.001, longest_s=1, well_after_s=0)):
        for count in range(1, 6):
            part.ends("with code 1")
            await told.until(f"(restart {count})")

    assert [line for line in told.lines if "; restart" in line and " in 0.001 s" not in line] == []


async def test_a_part_that_does_not_become_ready_is_waited_for_and_its_reason_told(tmp_path: Path) -> None:
    part, told = Scripted(tmp_path), Told()
    part.never_ready = True

    async with kept(part, told, noted=[]):
        part.ends("with code 1")
        await told.until("ready again")

    assert "processor: processor was not ready within 90 s: no lane" in told.lines
    assert part.starts == 1


async def test_a_disk_without_room_for_the_note_of_processes_stops_nothing(tmp_path: Path) -> None:
    part, told = Scripted(tmp_path), Told()

    async with kept(part, told):
        part.ends("by SIGKILL")
        await told.until("ready again")

    assert any("its process could not be noted: [Errno 28]" in line for line in told.lines)


async def test_a_stop_during_the_longest_wait_is_not_waited_for(tmp_path: Path) -> None:
    part, told = Scripted(tmp_path), Told()

    async with kept(part, told, noted=[], pace=Pace(first_s=3600, longest_s=3600)):
        part.ends("with code 1")
        await told.until("restart 1 in 3600 s")

    assert part.starts == 0


async def test_without_restarts_the_first_end_is_told_with_its_last_lines(tmp_path: Path) -> None:
    parts = Parts()

    async def ended() -> int:
        return 2

    parts.watch(Scripted(tmp_path), ended)

    with pytest.raises(PartEnded, match=r"(?s)processor ended with code 2, so all is stopped\. .*:\n  the last words$"):
        await parts.until_one_ends()


async def test_lines_that_are_told_as_they_come_are_not_told_again_at_the_end(tmp_path: Path) -> None:
    part, told, parts = Scripted(tmp_path), Told(), Parts()
    part.followed = True

    async def ended() -> int:
        return 2

    async with kept(part, told, noted=[]):
        part.ends("with code 1")
        await told.until("ready again")
    parts.watch(part, ended)
    with pytest.raises(PartEnded) as end:
        await parts.until_one_ends()

    assert told.lines[0].endswith(f"restart 1 in 0.001 s. Its lines are in {part.log_file}")
    assert "the last words" not in str([told.lines, end.value])


@pytest.mark.parametrize(
    ("code", "said"), [(0, "with code 0"), (2, "with code 2"), (137, "by SIGKILL"), (255, "with code 255")]
)
def test_an_end_is_told_by_its_signal_or_its_code(code: int, said: str) -> None:
    assert how(code) == said


async def test_lines_are_followed_into_a_file_that_is_begun_anew(tmp_path: Path) -> None:
    log_file, told = tmp_path / "api.log", Told()
    log_file.write_text("a long line of an older start\n")

    async with followed("api", log_file, log_file.stat().st_size, told):
        log_file.write_text("anew\n")
        await told.until("anew")
        log_file.unlink()

    assert told.lines == ["api: anew"]


class Unheard(GuardedProcess):
    """A process that ends only when it is killed."""

    def __init__(self) -> None:
        self.pid = 1
        self._killed = asyncio.Event()

    async def wait(self) -> int:
        await self._killed.wait()
        return 137

    def kill(self) -> None:
        self._killed.set()


async def test_a_service_that_gives_no_sign_of_life_is_killed_and_one_that_does_again_is_not(tmp_path: Path) -> None:
    # Given a service that answers late at first, misses some rounds, answers again, and then no more.
    answers = [None, None, None, 200, None, 503, 200, None, None]
    asked = 0

    def answer(_request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        found = answers.pop(0) if answers else None
        if found is None:
            raise httpx.ReadTimeout("nothing came")
        return httpx.Response(found)

    service = Service(
        "api",
        *("http://here", tmp_path / "api.log", Unheard(), 0, FolderLock(0), {}, 1.0),
        patience=Patience(round_s=0.001, rounds_max=3, first_rounds_max=4),
    )

    # When its end is waited for.
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http, asyncio.timeout(SOON_S):
        ended = await service.end(http)

    # Then it was killed after the third silent round in a row.
    assert re.fullmatch(r"by SIGKILL \(killed, since http://here/livez had not answered for \d+ s\)", ended)
    assert asked == 10
