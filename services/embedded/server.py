"""What Kafka and Postgres have in common: a locked folder, a log file, a guarded process, a start that fails cleanly.

A server keeps its data in `data_dir/<name>` and its output in `data_dir/logs/<name>.log`. `start` returns when the
server answers in its own protocol, and raises EmbeddedError with the last lines of that output when it does not; `stop`
may be called at any time and any number of times. `async with` does both.
What is special to each: `kafka.py`, `postgres.py`; how no process is left behind: `process.py`, `guard.py`.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from services.embedded.errors import EmbeddedError
from services.embedded.folders import (
    FolderLock,
    free_ports,
    last_lines,
    lock_folder,
    make_folder,
    require_free_port,
    require_free_space,
)
from services.embedded.process import GuardedProcess

START_TIMEOUT_S = 120.0  # after a crash, files are looked through first
READY_POLL_S = 0.02
LOG_BYTES_MAX = 20_000_000

logger = logging.getLogger("sluice.embedded")


class EmbeddedServer(abc.ABC):
    """A real server as our child. Subclasses say how it is prepared, launched and asked whether it is ready."""

    name: ClassVar[str]
    ports_needed: ClassVar[int] = 1

    def __init__(self, *, data_dir: Path, port: int = 0, log: Callable[[str], None] | None = None) -> None:
        """`port` 0 stands for any free one, anew at each start. `log` gets a line for a person at each step."""
        self.data_dir = data_dir.absolute()
        self.folder = self.data_dir / self.name
        self.log_file = self.data_dir / "logs" / f"{self.name}.log"
        self.log_began = 0  # where this start's lines begin in it
        self.ports: list[int] = []
        self._asked_port = port
        self._log = log or logger.info
        self._lock: FolderLock | None = None
        self._process: GuardedProcess | None = None

    @abc.abstractmethod
    async def _prepare(self, lock: FolderLock) -> None:
        """Bring the folder into the state that the server can be launched on. Raises EmbeddedError."""

    @abc.abstractmethod
    async def _launch(self, lock: FolderLock) -> GuardedProcess: ...

    @abc.abstractmethod
    async def _is_ready(self) -> bool:
        """Ask this very server, not whoever else may listen on its port. False or OSError: not yet."""

    @property
    def port(self) -> int:
        assert self.ports, f"{self.name} has not been started"
        return self.ports[0]

    @property
    def pid(self) -> int:
        """The server's own process, not its guard's."""
        assert self._process is not None, f"{self.name} has not been started"
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.exit_code is None

    async def start(self) -> None:
        """Return when the server answers. Raises EmbeddedError; then everything is as it was before."""
        await self._start(ports=[])

    async def start_again(self) -> None:
        """After its end, on the data and the ports it had: who knows its address finds it there. Raises EmbeddedError.

        What a killed server leaves (a Postgres session in its work, say) may hold the folder for a while: waited for.
        """
        await self.stop()
        await self._start(ports=self.ports)

    async def _start(self, *, ports: list[int]) -> None:
        assert self._process is None, f"{self.name} has been started already"
        began = time.monotonic()
        try:
            await self._start_steps(ports)
        except OSError as error:
            await self.stop()
            raise EmbeddedError(
                f"{self.name} could not be started in {self.folder}: {error}. Look at its owner, and at the disk."
            ) from error
        except BaseException:
            await self.stop()
            raise
        self._log(f"{self.name} answers on 127.0.0.1:{self.port} after {time.monotonic() - began:.2f} s")

    async def _start_steps(self, ports: list[int]) -> None:
        for folder in (self.folder, self.log_file.parent):
            make_folder(folder, purpose=f"where {self.name} keeps its data and log")
        require_free_space(self.folder)
        self._lock = await lock_folder(self.folder, ours_ended=bool(ports))
        self._choose_ports(ports)
        self.log_began = self._begin_log()
        try:
            await self._prepare(self._lock)
            self._process = await self._launch(self._lock)
            await self._become_ready(self._process)
        except EmbeddedError as error:
            shown = last_lines(self.log_file, after_byte=self.log_began)
            raise EmbeddedError(f"{error}\nThe end of {self.log_file}:\n{shown}" if shown else str(error)) from error

    def _choose_ports(self, kept: list[int]) -> None:
        for port in kept:
            require_free_port(port, server=self.name)
        if kept:
            return
        if self._asked_port:
            require_free_port(self._asked_port, server=self.name)
        self.ports = free_ports(self.ports_needed)
        if self._asked_port:
            self.ports[0] = self._asked_port

    def _begin_log(self) -> int:
        """Where this start's output begins in the log file, which is begun anew when it has grown too long."""
        size = self.log_file.stat().st_size if self.log_file.exists() else 0
        if size > LOG_BYTES_MAX:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
            return 0
        return size

    async def _become_ready(self, process: GuardedProcess) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._answers():
                    if process.exit_code is not None:
                        raise EmbeddedError(f"{self.name} ended with code {process.exit_code} while it was starting.")
                    await asyncio.sleep(READY_POLL_S)  # a port that is not listened on cannot be awaited
        except TimeoutError as error:
            raise EmbeddedError(
                f"{self.name} did not answer on 127.0.0.1:{self.port} within {START_TIMEOUT_S:.0f} s: the machine may "
                f"be too busy; look at the log, then start again."
            ) from error

    async def _answers(self) -> bool:
        try:
            return await self._is_ready()
        except (OSError, EOFError):
            return False

    async def stop(self) -> None:
        """End the server and give its folder back. Bounded; a second call does nothing."""
        process, self._process = self._process, None
        lock, self._lock = self._lock, None
        try:
            if process is not None:
                await process.stop()
        finally:
            if lock is not None:
                lock.release()

    async def wait(self) -> int:
        """Return the exit code when the server ends by itself: 128 + N where signal N ended it."""
        assert self._process is not None, f"{self.name} has not been started"
        return await self._process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
