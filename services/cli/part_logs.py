"""The log files of the parts of `up`: where a start begins in them, and their new lines as they come.

A service writes to data_dir/logs/NAME.log itself and whoever wants to see its lines reads them there, so a terminal
that is held up never holds up a service.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from services.embedded.server import LOG_BYTES_MAX
from services.lifecycle import cancelled

FOLLOW_POLL_S = 0.2
Say = Callable[[str, str], None]
"""Tell a person a line of a part: its name, and the line."""


def begin_log(log_file: Path) -> int:
    """Where this start's lines begin in the file, which is begun anew when it has grown too long."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    size = log_file.stat().st_size if log_file.exists() else 0
    if size > LOG_BYTES_MAX:
        log_file.replace(log_file.with_suffix(".log.1"))
        size = 0
    log_file.touch()
    return size


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
        try:
            with self._file.open("rb") as content:
                if content.seek(0, os.SEEK_END) < self._at:
                    self._at = 0  # it was begun anew
                content.seek(self._at)
                whole, newline, _ = content.read().rpartition(b"\n")
        except FileNotFoundError:
            return []  # somebody cleared it away; the next start makes it again
        self._at += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines() if whole else []
