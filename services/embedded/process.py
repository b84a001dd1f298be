"""A child process behind a guard: it ends when told, when its guard is killed, and when we are killed.

`GuardedProcess` starts `guard.py`, which starts the server; the pipe to the guard is the lease. Letting the lease go is
the one way to stop a server, in peace (`stop`) and in disaster (the kernel closes it): each stop tests the other.
The guard leads a session of its own: a terminal's Ctrl-C reaches Sluice and not Kafka, which the drain still needs.
What a server is and when it is ready: `server.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.embedded.errors import EmbeddedError
from services.embedded.folders import FolderLock

GUARD = Path(__file__).with_name("guard.py")
HELPER_TIMEOUT_S = 120.0  # initdb and its kind take seconds; a slow disk may make them a minute
STOP_MARGIN_S = 3.0  # what a guard may take beyond the server's grace before it is killed itself
# Variables that would change what the servers do; the rest of the caller's environment is passed on as it is.
FOREIGN_PREFIXES = ("PG", "JAVA_", "_JAVA_", "JDK_JAVA_", "KAFKA_", "CLASSPATH", "LC_", "SLUICE_")


@dataclass(frozen=True, slots=True)
class User:
    """Whom a server runs as, where it is not ourselves."""

    name: str
    uid: int
    gid: int


class GuardedProcess:
    def __init__(self, *, guard: asyncio.subprocess.Process, pid: int, grace_s: float) -> None:
        self.pid = pid
        self._guard = guard
        self._grace_s = grace_s

    @classmethod
    async def start(
        cls,
        command: Sequence[str | Path],
        *,
        log_file: Path,
        lock: FolderLock,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace_s: float = 0.0,
        user: User | None = None,
        stdin: Path = Path(os.devnull),
        environment: Mapping[str, str] | None = None,
    ) -> GuardedProcess:
        """Start `command`, its output appended to `log_file`, `environment` added to what is passed on of ours.

        Raises EmbeddedError when it cannot even be executed.
        """
        identity = ["--user", str(user.uid), "--group", str(user.gid)] if user else []
        with log_file.open("ab") as log:
            guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", GUARD),
                *("--parent-pid", str(os.getpid()), "--stop-signal", str(int(stop_signal)), "--grace-s", str(grace_s)),
                *("--stdin", stdin),
                *identity,
                *("--", *map(str, command)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**clean_environment(), **(environment or {})},
                pass_fds=(lock.descriptor,),
                start_new_session=True,
            )
        try:
            pid = await _read_pid(guard)
        except BaseException:
            guard.kill()
            raise
        if pid is None:
            raise EmbeddedError(f"{command[0]} could not be executed.")
        return cls(guard=guard, pid=pid, grace_s=grace_s)

    @property
    def exit_code(self) -> int | None:
        return self._guard.returncode

    async def wait(self) -> int:
        """The server's exit code when it has ended; 128 + N where signal N ended it."""
        code = await self._guard.wait()
        return code if code >= 0 else 128 - code  # negative: the guard itself was killed, and took the server along

    async def stop(self, *, within_s: float | None = None) -> int:
        """End the server, within its grace and a little more (or `within_s`), and wait until it has ended."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            return await asyncio.wait_for(self._guard.wait(), within_s or self._grace_s + STOP_MARGIN_S)
        except TimeoutError:
            self._kill()
            return await self._guard.wait()

    def kill(self) -> None:
        """End the server at once; its guard tells how it ended, and goes."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _kill(self) -> None:
        self.kill()
        with contextlib.suppress(ProcessLookupError):
            self._guard.kill()


async def _read_pid(guard: asyncio.subprocess.Process) -> int | None:
    """The server's process id, the first thing that a guard writes; None where there will be none."""
    assert guard.stdout is not None
    line = await guard.stdout.readline()
    if not line:
        await guard.wait()
        return None
    return int(line)


async def run_guarded(
    command: Sequence[str | Path],
    *,
    name: str,
    log_file: Path,
    lock: FolderLock,
    user: User | None = None,
    stdin: Path = Path(os.devnull),
    within_s: float = HELPER_TIMEOUT_S,
) -> int:
    """Run a short helper program to its end. Answers its exit code; it dies with us, like a server.

    Raises EmbeddedError where it does not end `within_s`; then it is killed.
    """
    process = await GuardedProcess.start(command, log_file=log_file, lock=lock, user=user, stdin=stdin)
    try:
        return await asyncio.wait_for(process.wait(), within_s)
    except TimeoutError as error:
        raise EmbeddedError(
            f"{name} did not end within {within_s:g} s, so it was killed: the machine may be too busy, or its disk may "
            "hang; look at the log, then start again."
        ) from error
    finally:
        await process.stop()


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
    utf8 = "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"  # Java can open no other names under plain C
    return kept | {"LC_ALL": utf8}
