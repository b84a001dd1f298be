"""A part of `up`: one of Sluice's services as a guarded child, its log lines, and the news that a part has ended.

A service writes to data_dir/logs/NAME.log itself and whoever wants to see its lines reads them there, so a terminal
that is held up never holds up a service. No service outlives this process: see `services/embedded/guard.py`.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx

import services
from services.cli.errors import CliError
from services.embedded.folders import FolderLock, last_lines
from services.embedded.process import GuardedProcess
from services.embedded.server import LOG_BYTES_MAX
from services.lifecycle import cancelled

READY_TIMEOUT_S = 90.0  # a service gives Kafka and Postgres a minute
READY_POLL_S = 0.1
FOLLOW_POLL_S = 0.2
GRACE_MARGIN_S = 10.0  # the limit is for the drain; closing what was opened comes after it
LAST_LINES = 15
T = TypeVar("T")
Say = Callable[[str, str], None]
"""Tell a person a line of a part: its name, and the line."""


class PartEnded(CliError):  # noqa: N818  # it is the news, whether or not something was wrong
    """A part ended that should not have."""


@dataclass(slots=True)
class Service:
    """One service as our child. `url`: where it answers."""

    name: str
    url: str
    log_file: Path
    process: GuardedProcess
    log_began: int

    @classmethod
    async def start(
        cls, name: str, *, url: str, log_file: Path, lock: FolderLock, environment: Mapping[str, str], grace_s: float
    ) -> "Service":
        """Start `python -m services.NAME` (of further lanes `processor-1` and so on); ready is another matter."""
        log_began = _begin_log(log_file)
        process = await GuardedProcess.start(
            (sys.executable, "-P", "-m", f"services.{name.partition('-')[0]}"),
            log_file=log_file,
            lock=lock,
            stop_signal=signal.SIGTERM,
            grace_s=grace_s + GRACE_MARGIN_S,
            environment={**environment, "PYTHONPATH": _import_path()},
        )
        return cls(name, url, log_file, process, log_began)

    async def wait(self) -> int:
        return await self.process.wait()

    async def ready(self, http: httpx.AsyncClient) -> None:
        """Return when /readyz says so. Raises CliError with the failing checks when that takes too long."""
        answer = "nothing was heard from it"
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while True:
                    try:
                        response = await http.get(f"{self.url}/readyz")
                    except httpx.TransportError as error:
                        answer = str(error) or type(error).__name__
                    else:
                        if response.is_success:
                            return
                        answer = response.text.strip()
                    await asyncio.sleep(READY_POLL_S)  # readiness can only be asked for
        except TimeoutError:
            raise CliError(
                f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s: {answer}\n"
                f"The end of {self.log_file}:\n{last_lines(self.log_file, after_byte=self.log_began)}"
            ) from None


@dataclass(slots=True)
class Parts:
    """The parts that run, watched: when one ends by itself, whoever waits here learns it."""

    _ends: dict[asyncio.Task[int], tuple[str, Path, int]] = field(default_factory=dict)

    def watch(self, name: str, wait: Callable[[], Coroutine[Any, Any, int]], *, log_file: Path, log_began: int) -> None:
        self._ends[asyncio.create_task(wait())] = (name, log_file, log_began)

    async def forget(self) -> None:
        """From here on an end is a wanted one."""
        ends, self._ends = list(self._ends), {}
        await cancelled(*ends)

    async def until_one_ends(self) -> NoReturn:
        """Raises PartEnded when a part ends, with its last lines. Waits for ever where there are no parts."""
        if not self._ends:
            await asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait(self._ends, return_when=asyncio.FIRST_COMPLETED)
        ended = next(iter(done))
        name, log_file, log_began = self._ends[ended]
        lines = last_lines(log_file, after_byte=log_began, lines_max=LAST_LINES)
        raise PartEnded(f"{name} ended {_how(ended.result())}, so all is stopped. The end of {log_file}:\n{lines}")

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


@asynccontextmanager
async def followed(name: str, log_file: Path, log_began: int, say: Say) -> AsyncIterator[None]:
    """Tell the lines that come into a log file, those written while it was being left too."""
    lines = _NewLines(log_file, log_began)

    async def follow() -> None:
        while True:
            for line in lines.read():
                say(name, line)
            await asyncio.sleep(FOLLOW_POLL_S)  # a file's growth cannot be awaited

    following = asyncio.create_task(follow())
    try:
        yield
    finally:
        await cancelled(following)
        for line in lines.read():
            say(name, line)


class _NewLines:
    """The whole lines that were written to a file since the last look."""

    def __init__(self, file: Path, began: int) -> None:
        self._file = file
        self._at = began

    def read(self) -> list[str]:
        with self._file.open("rb") as content:
            content.seek(self._at)
            whole, newline, _ = content.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines() if whole else []


async def stop(service: Service, *, say: Say) -> bool:
    """End a service in peace, within its grace; whether it did so itself and well."""
    began = time.monotonic()
    code = await service.process.stop()
    say(service.name, f"stopped after {time.monotonic() - began:.1f} s" + ("" if code == 0 else f", {_how(code)}"))
    return code == 0


def _how(code: int) -> str:
    """An exit code for people; above 128 it is a signal's number."""
    if code > 128:  # noqa: PLR2004  # as a shell gives it
        try:
            return f"by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"with code {code}"


def _begin_log(log_file: Path) -> int:
    """Where this start's lines begin in the file, which is begun anew when it has grown too long."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    size = log_file.stat().st_size if log_file.exists() else 0
    if size > LOG_BYTES_MAX:
        log_file.replace(log_file.with_suffix(".log.1"))
        size = 0
    log_file.touch()
    return size


def _import_path() -> str:
    """Where our own packages lie: the child starts in another folder."""
    ours = str(Path(services.__file__ or "").parent.parent)
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
