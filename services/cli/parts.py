"""A part of `up`: one of Sluice's services as a guarded child, or an embedded server; how it is started again and ends.

No part outlives this process: see `services/embedded/guard.py`. Who waits for their ends, and what is done then:
`supervision.py`. Their log lines: `part_logs.py`.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx

import services
from services.cli.errors import CliError
from services.cli.part_logs import Say, begin_log
from services.embedded import EmbeddedKafka, EmbeddedPostgres
from services.embedded.folders import FolderLock, last_lines
from services.embedded.process import GuardedProcess
from services.lifecycle import cancelled

READY_TIMEOUT_S = 90.0  # a service gives Kafka and Postgres a minute
READY_POLL_S = 0.1
GRACE_MARGIN_S = 10.0  # the limit is for the drain; closing what was opened comes after it


class Part(Protocol):
    """What is kept running, a service or a server. Its log lines since its newest start begin at `log_began`."""

    @property
    def name(self) -> str: ...

    @property
    def log_file(self) -> Path: ...

    @property
    def log_began(self) -> int: ...

    @property
    def followed(self) -> bool:
        """Whether its log lines are told as they come."""

    @property
    def pid(self) -> int | None:
        """The part's own process, not its guard's; None while it does not run."""

    async def start_again(self) -> None:
        """After its end. Raises EmbeddedError or OSError; then it does not run."""

    async def ready(self, http: httpx.AsyncClient) -> str:
        """Where it answers, once it does its work. Raises CliError with what is missing when that takes too long."""

    async def end(self, http: httpx.AsyncClient) -> str:
        """How it ended, once it did."""


@dataclass(frozen=True, slots=True)
class Server:
    """Kafka or Postgres. One that is paused or hangs is left to its clients, which say so; a kill would lose nothing,
    but what looks like a hang may be a recovery.
    """

    server: EmbeddedKafka | EmbeddedPostgres

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def log_file(self) -> Path:
        return self.server.log_file

    @property
    def log_began(self) -> int:
        return self.server.log_began

    @property
    def followed(self) -> bool:
        return False

    @property
    def pid(self) -> int | None:
        return self.server.pid if self.server.runs else None

    async def start_again(self) -> None:
        await self.server.start_again()

    async def ready(self, http: httpx.AsyncClient) -> str:  # noqa: ARG002  # it answers once it has started
        return f"127.0.0.1:{self.server.port}"

    async def end(self, http: httpx.AsyncClient) -> str:  # noqa: ARG002  # as above
        return how(await self.server.wait())


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a service may give no sign of life before it is killed. Asked for in rounds, which are counted: a pause
    of this whole machine, or of `up`, is none of the service's.
    """

    round_s: float = 5.0
    rounds_max: int = 6
    first_rounds_max: int = 20  # until its first answer: it waits a minute for Kafka and Postgres before it listens


@dataclass(slots=True)
class Service:
    """One service as our child. `url`: where it answers."""

    name: str
    url: str
    log_file: Path
    process: GuardedProcess
    log_began: int
    lock: FolderLock
    environment: Mapping[str, str]
    grace_s: float
    followed: bool = False
    patience: Patience = field(default_factory=Patience)
    has_answered: bool = False  # since its newest start

    @classmethod
    async def start(
        cls,
        name: str,
        *,
        url: str,
        log_file: Path,
        lock: FolderLock,
        environment: Mapping[str, str],
        grace_s: float,
        followed: bool = False,
    ) -> "Service":
        """Start `python -m services.NAME` (of further lanes `processor-1` and so on); ready is another matter."""
        log_began = begin_log(log_file)
        process = await _launch(name, log_file=log_file, lock=lock, environment=environment, grace_s=grace_s)
        return cls(name, url, log_file, process, log_began, lock, environment, grace_s, followed)

    async def start_again(self) -> None:
        await self.process.stop()
        self.has_answered = False
        self.log_began = begin_log(self.log_file)
        self.process = await _launch(
            self.name, log_file=self.log_file, lock=self.lock, environment=self.environment, grace_s=self.grace_s
        )

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process.exit_code is None else None

    async def wait(self) -> int:
        return await self.process.wait()

    async def end(self, http: httpx.AsyncClient) -> str:
        """How it ended; one that gives no sign of life any more is killed."""
        killing = asyncio.create_task(self._kill_when_hung(http))
        try:
            ended = how(await self.process.wait())
        finally:
            why = "" if not killing.done() or killing.exception() else f" ({killing.result()})"
            await cancelled(killing)
        return ended + why

    async def _kill_when_hung(self, http: httpx.AsyncClient) -> str:
        """Kill it when /livez has not answered for too long; answers that it did."""
        silent_rounds = 0
        while silent_rounds < (self.patience.rounds_max if self.has_answered else self.patience.first_rounds_max):
            next_round = time.monotonic() + self.patience.round_s
            if await self._lives(http):
                silent_rounds, self.has_answered = 0, True
            else:
                silent_rounds += 1
            await asyncio.sleep(max(0.0, next_round - time.monotonic()))
        self.process.kill()
        return f"killed, since {self.url}/livez had not answered for {silent_rounds * self.patience.round_s:.0f} s"

    async def _lives(self, http: httpx.AsyncClient) -> bool:
        try:
            async with asyncio.timeout(self.patience.round_s):
                return (await http.get(f"{self.url}/livez")).is_success
        except (httpx.TransportError, TimeoutError):
            return False

    async def ready(self, http: httpx.AsyncClient) -> str:
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
                            self.has_answered = True
                            return self.url
                        answer = response.text.strip()
                    await asyncio.sleep(READY_POLL_S)  # readiness can only be asked for
        except TimeoutError:
            raise CliError(
                f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s: {answer}\n"
                f"The end of {self.log_file}:\n{last_lines(self.log_file, after_byte=self.log_began)}"
            ) from None


async def stop(service: Service, *, say: Say, within_s: float | None = None) -> bool:
    """End a service in peace, within its grace; whether it did so itself and well, had it not ended before."""
    if service.pid is None:
        return True
    began = time.monotonic()
    code = await service.process.stop(within_s=within_s)
    say(service.name, f"stopped after {time.monotonic() - began:.1f} s" + ("" if code == 0 else f", {how(code)}"))
    return code == 0


def how(code: int) -> str:
    """An exit code for people; above 128 it is a signal's number."""
    if code > 128:  # noqa: PLR2004  # as a shell gives it
        try:
            return f"by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"with code {code}"


async def _launch(
    name: str, *, log_file: Path, lock: FolderLock, environment: Mapping[str, str], grace_s: float
) -> GuardedProcess:
    return await GuardedProcess.start(
        (sys.executable, "-P", "-m", f"services.{name.partition('-')[0]}"),
        log_file=log_file,
        lock=lock,
        stop_signal=signal.SIGTERM,
        grace_s=grace_s + GRACE_MARGIN_S,
        environment={**environment, "PYTHONPATH": _import_path()},
    )


def _import_path() -> str:
    """Where our own packages lie: the child starts in another folder."""
    ours = str(Path(services.__file__ or "").parent.parent)
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
