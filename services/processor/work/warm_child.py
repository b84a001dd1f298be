"""One child process as its parent holds it: its pipes, its answers, its end.

The protocol end of `child`, on asyncio's transports: frames go in by standard input and come back by standard output;
of standard error a tail is kept, for the log. Its environment holds none of the service's settings and secrets.
Which child works and what its death means for a file is decided in `process`.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self, cast

from schemas.errors import WorkCode
from services.observability import logger
from services.processor.work import frames
from services.processor.work.port import storable

_STOP_TIMEOUT_S: Final = 2.0
_STDERR_BYTES_MAX: Final = 8_192
_CODE_FOLDER: Final = Path(__file__).resolve().parents[3]
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_MEMORY_WORDS: Final = (b"bad_alloc", b"MemoryError", b"out of memory", b"Out of memory")

_log = logger("work")

OnProgress = Callable[[str, int], None]


class ChildDiedError(Exception):
    """The child ended by itself; `code` is what that means for the file it had in work."""

    def __init__(self, code: WorkCode, message: str) -> None:
        self.code = code
        super().__init__(message)


class WarmChild(asyncio.SubprocessProtocol):
    """One child process: its pipes, its answers, its end."""

    def __init__(self) -> None:
        self.files = 0
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._on_progress: OnProgress = lambda _stage, _percent: None
        self._ready: dict[str, Any] = {}
        self._splitter = frames.Splitter()
        self._stderr = bytearray()
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def spawn(cls, start_message: Mapping[str, Any]) -> Self:
        """A child that has loaded its handlers and waits for a file; raises OSError, ChildDiedError."""
        starting = asyncio.ensure_future(
            asyncio.get_running_loop().subprocess_exec(
                cls,
                *(sys.executable, "-P", "-m", "services.processor.work.child"),
                env=_environment(),
                start_new_session=True,  # so a Ctrl-C in the terminal is the parent's alone to handle
            )
        )
        try:
            _, child = await asyncio.shield(starting)
        except asyncio.CancelledError:
            _, child = await starting  # it takes milliseconds, and cancelled halfway asyncio would wait for ever
            await child.kill()
            raise
        try:
            await child.warm_up(start_message)
        except BaseException:
            await child.kill()
            raise
        return child

    async def warm_up(self, start_message: Mapping[str, Any]) -> None:
        self._send(dict(start_message))
        self._ready = await self._answer

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    @property
    def answered(self) -> bool:
        return self._answer.done() and not self._answer.cancelled() and self._answer.exception() is None

    def capabilities(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Content types by handler, and why other handlers are not running."""
        return self._ready["ready"], self._ready["failures"]

    def ask(self, command: dict[str, Any], on_progress: OnProgress) -> asyncio.Future[dict[str, Any]]:
        """Sends the file in; the future brings the answer, or ChildDiedError."""
        self._answer = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress
        self._stderr.clear()
        self._send(command)
        return self._answer

    async def kill(self) -> None:
        """SIGKILL, and waits for the end (which the system may delay while a disk hangs, so not for ever)."""
        self._answer.cancel()
        if self._transport is not None and not self.is_gone:
            with suppress(ProcessLookupError):  # it may have ended already, its pipes not being read to the end yet
                self._transport.kill()
            await asyncio.wait({self._gone}, timeout=_STOP_TIMEOUT_S)

    async def end(self) -> None:
        """Lets an idle child go: its input ends, and so does it."""
        if self._transport is not None and not self.is_gone:
            stdin = self._transport.get_pipe_transport(0)
            assert stdin is not None
            stdin.close()
            await asyncio.wait({self._gone}, timeout=_STOP_TIMEOUT_S)
        await self.kill()

    def stderr_tail(self) -> str:
        return storable(self._stderr.decode(errors="replace"))

    def epitaph(self) -> str:
        """How it ended, for people."""
        returncode = None if self._transport is None else self._transport.get_returncode()
        if returncode is None:
            return "it closed its pipes"
        if returncode >= 0:
            return f"it ended with exit code {returncode}"
        by = "was killed, perhaps by the system for want of memory" if returncode == -signal.SIGKILL else "crashed"
        return f"it {by} ({signal.Signals(-returncode).name})"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != 1:
            self._stderr += data
            del self._stderr[:-_STDERR_BYTES_MAX]
            return
        try:
            for message in self._splitter.feed(data):
                self._receive(message)
        except frames.BrokenFrameError as error:
            self._fail(ChildDiedError(WorkCode.WORKER_CRASHED, f"it sent what cannot be read: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio calls it so
        """The process has ended and all its pipes are read."""
        assert self._transport is not None
        self._transport.close()
        starved = any(words in self._stderr for words in _MEMORY_WORDS)
        self._fail(ChildDiedError(WorkCode.OUT_OF_MEMORY if starved else WorkCode.WORKER_CRASHED, self.epitaph()))
        self._gone.set_result(None)

    def _receive(self, message: dict[str, Any]) -> None:
        if "progress" in message:
            self._report(*message["progress"])
        elif not self._answer.done():
            self._answer.set_result(message)

    def _report(self, stage: str, percent: int) -> None:
        try:
            self._on_progress(stage, percent)
        except Exception:  # noqa: BLE001  # a listener's mistake is the listener's; the work goes on
            _log.exception("worker_progress_lost", stage=stage, percent=percent)

    def _fail(self, death: ChildDiedError) -> None:
        if not self._answer.done():
            self._answer.set_exception(death)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._transport is not None
        stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))
        stdin.write(frames.encode(message))


def _environment() -> dict[str, str]:
    """What the child may know: where code and libraries are, none of the service's secrets."""
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        "PYTHONPATH": str(_CODE_FOLDER),
        "MALLOC_ARENA_MAX": "2",  # each arena takes 64 MB of the address space that is limited
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
