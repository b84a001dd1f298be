"""Processes that surely stand still: SIGSTOP is only on its way when `os.kill` returns, and a thread on another core
may answer one more request meanwhile.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """The process stands still, all its threads, as long as the block lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        while not _stands_still(pid):
            time.sleep(0)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _stands_still(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task")
    if not threads.is_dir():
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return all(_state(thread) in "TtZX" for thread in threads.iterdir())


def _state(thread: Path) -> str:
    try:
        # The name in the second field may hold blanks and brackets; the state follows it.
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"  # it ended meanwhile
