"""A service as a process that is looked after: it dies and is started again, it stops itself and is sent on its way.

`faults` are the values of SLUICE_FAULT for its next starts, one each; what struck is remembered. Whoever looks after it
here does what a supervisor would, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

import psutil

RESTART_PAUSE_S = 0.2
STOP_TIMEOUT_S = 60.0
WAIT_S = 150.0
MARK = "SLUICE_FAULT: "


class Service:
    """One process of `python -m services.KIND`, kept running until the block of `running` is left.

    `pause_s`: how long it stays stopped when a fault stopped it. `on_strike` is told each fault, as `kill at POINT`.
    """

    def __init__(
        self,
        name: str,
        *,
        url: str,
        environment: Mapping[str, str],
        log_file: Path,
        pause_s: float,
        on_strike: Callable[[str], None],
    ) -> None:
        self.name = name
        self.url = url
        self.faults: deque[str] = deque()
        self.struck: list[str] = []
        self.exits: list[int] = []
        self.lines: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self._environment = dict(environment)
        self._log_file = log_file
        self.pause_s = pause_s
        self._on_strike = on_strike
        self._changed = asyncio.Condition()
        self._keeping = True
        self._continuing: set[asyncio.Task[None]] = set()

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} was not started"
        return self.process.pid

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """Started, and started again whenever it ends, until the block is left; then ended as by a deploy."""
        keeping = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        try:
            yield self
        finally:
            self._keeping = False
            await self._end()
            await keeping

    async def _keep(self) -> None:
        while self._keeping:
            await self._run_once()
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _run_once(self) -> None:
        fault = self.faults.popleft() if self.faults else ""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"services.{self.kind}"),
            env={**environment, **self._environment, "SLUICE_FAULT": fault},
            stderr=asyncio.subprocess.PIPE,
        )
        if not self._keeping:  # the end came while it was being started
            self.send(signal.SIGTERM)
        await self._listen(self.process)
        self.exits.append(await self.process.wait())
        await self._tell()

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with self._log_file.open("a", encoding="utf-8") as log:
            async for raw in process.stderr:
                line = raw.decode(errors="replace")
                self.lines.append(line)
                log.write(line)
                log.flush()
                if line.startswith(MARK):
                    self._note(line.removeprefix(MARK).strip(), process)
                await self._tell()

    def _note(self, fault: str, process: asyncio.subprocess.Process) -> None:
        self.struck.append(fault)
        self._on_strike(fault)
        if fault.startswith("stop "):
            task = asyncio.create_task(self._continue(process, after_s=self.pause_s))
            self._continuing.add(task)
            task.add_done_callback(self._continuing.discard)

    async def _continue(self, process: asyncio.subprocess.Process, *, after_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), after_s)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until the condition holds, looked at whenever the process says something or ends."""
        try:
            async with asyncio.timeout(WAIT_S), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            raise AssertionError(f"{self.name}: {what} did not come within {WAIT_S:.0f} s\n{self.tail()}") from None

    async def until_struck(self, times: int = 1) -> None:
        """Wait until so many faults struck since the scene began."""
        await self.until(lambda: len(self.struck) >= times, f"fault {times} (armed: {list(self.faults)})")

    async def said(self, words: str, times: int = 1) -> None:
        """Wait until it said these words so many times."""
        await self.until(lambda: sum(words in line for line in self.lines) >= times, repr(words))

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    async def pause(self, seconds: float) -> None:
        """Stop it for so long, or until it ends."""
        process = self.process
        self.send(signal.SIGSTOP)
        if process is not None:
            await self._continue(process, after_s=seconds)

    def arm(self, faults: Iterable[str]) -> None:
        """From its next start on: a value of SLUICE_FAULT for each start."""
        self.faults.extend(faults)

    async def _end(self) -> None:
        for task in list(self._continuing):
            task.cancel()
        if self.process is None:
            return
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise AssertionError(f"{self.name} did not stop within {STOP_TIMEOUT_S:.0f} s\n{self.tail()}") from None

    def tail(self) -> str:
        return "".join(self.lines[-30:])

    def usage(self) -> tuple[int, int] | None:
        """Memory in bytes and open descriptors; None where it does not run just now."""
        try:
            process = psutil.Process(self.pid)
            return process.memory_info().rss, process.num_fds()
        except psutil.Error:
            return None
