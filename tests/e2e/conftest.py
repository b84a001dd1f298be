"""Sluice as its users have it: the command line as a program, in a folder of its own, with nothing of it left behind.

`sluice` runs commands; `sluice.up()` is a running `sluice up`. Every process that one of them started must be gone when
it has ended, which is checked each time.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90
COMMAND_TIMEOUT_S = 100
STOP_TIMEOUT_S = 40
ANY_PORTS = ("--api-port", "0", "--notifier-port", "0")


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that came to its end."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(slots=True)
class Up:
    """A `sluice up` that is ready."""

    process: asyncio.subprocess.Process
    endpoints: dict[str, Any]
    err_file: Path
    family: list[psutil.Process] = field(default_factory=list)

    def service(self, name: str) -> psutil.Process:
        """The process of a service itself, not its guard's."""
        (found,) = (member for member in self.servers() if member.cmdline()[-1] == f"services.{name}")
        return found

    def servers(self) -> list[psutil.Process]:
        """What the guards guard, and what that started."""
        return [member for member in self.family if not any(part.endswith("guard.py") for part in member.cmdline())]

    async def ended(self) -> Ended:
        """Wait until it has ended by itself, and see that it left no process behind."""
        out = await asyncio.wait_for(self.process.stdout.read(), STOP_TIMEOUT_S) if self.process.stdout else b""
        code = await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        await asyncio.to_thread(require_gone, self.family)
        return Ended(code, out.decode(), self.err_file.read_text())

    async def stopped(self, number: signal.Signals = signal.SIGTERM) -> Ended:
        self.family = family_of(self.process)
        self.process.send_signal(number)
        return await self.ended()


@dataclass(frozen=True, slots=True)
class Sluice:
    """The program, with a data folder."""

    data_dir: Path

    async def run(self, *arguments: str | Path) -> Ended:
        process = await self.start(*arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        out, err = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())

    async def start(self, command: str | Path, *arguments: str | Path, **streams: Any) -> asyncio.subprocess.Process:
        """`command` may be of two words, such as `log tail`."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", *str(command).split(), "--data-dir", self.data_dir, *arguments),
            env=environment(),
            stdin=asyncio.subprocess.DEVNULL,
            **streams,
        )

    @contextlib.asynccontextmanager
    async def up(self, *options: str) -> AsyncIterator[Up]:
        """Everything, ready; ended at the latest when the block is left."""
        err_file = self.data_dir.with_suffix(".err")
        with err_file.open("wb") as err:
            process = await self.start(
                *("up", "--json", *ANY_PORTS, *options), stdout=asyncio.subprocess.PIPE, stderr=err
            )
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
            assert line, f"`sluice up` did not start:\n{err_file.read_text()}"
            yield Up(process, json.loads(line), err_file, family_of(process))
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)


def environment() -> dict[str, str]:
    """Ours without any setting of Sluice; ports that are free for services that have no option for it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return kept | {"SLUICE_PROCESSOR_PORT": "0", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def family_of(process: asyncio.subprocess.Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def require_gone(family: list[psutil.Process]) -> None:
    """Every one of these processes has ended or does within the bound; one that nobody has buried yet has ended."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    alive = family
    while alive and time.monotonic() < deadline:
        _, waited_for = psutil.wait_procs(alive, timeout=0.1)
        alive = [process for process in waited_for if not is_zombie(process)]
    assert alive == []


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def sluice() -> Iterator[Sluice]:
    """Not pytest's own temporary folder, of which it keeps three runs: these are hundreds of megabytes."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-e2e-"))
    yield Sluice(folder / "data")
    shutil.rmtree(folder)
