"""Folders that servers live in: made, checked, locked; and the ports beside them.

Invariants: a locked folder is used by one server at a time. The lock (flock) goes with the open file, which the server
inherits, so it is held until the last process that uses the folder has ended, even when the starter was killed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from services.embedded.errors import EmbeddedError

FREE_BYTES_MIN = 300_000_000  # Kafka preallocates indexes, Postgres its log; both fail in ugly ways on a full disk
PORTS_BEGIN, PORTS_END = 20_000, 32_000  # below the ports that systems hand out to clients (Linux: from 32768)
LOCK_WAIT_S = 45.0  # a server or service whose starter was killed is given this long to stop: more than its grace
LOCK_POLL_S = 0.05


def make_folder(folder: Path, *, purpose: str) -> None:
    """Make the folder, parents too, and see that it can be written. Raises EmbeddedError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EmbeddedError(
            f"{folder} cannot be written ({error.strerror}), but it is {purpose}: name another folder, or make "
            f"this one writable for user {os.geteuid()}."
        ) from error


def require_free_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES_MIN:
        raise EmbeddedError(
            f"the disk of {folder} has {free / 1e6:.0f} MB left and the servers need {FREE_BYTES_MIN / 1e6:.0f} MB to "
            f"start: make room, or name a folder on another disk."
        )


@dataclass(slots=True)
class FolderLock:
    """An flock on `folder`/lock; its file names the process that took it."""

    descriptor: int

    def release(self) -> None:
        """Let our hold go; a server that inherited the lock keeps its own until it has ended."""
        os.close(self.descriptor)


async def lock_folder(folder: Path, *, ours_ended: bool = False) -> FolderLock:
    """Take the folder; where its last user was killed and the server is still stopping, wait. Raises EmbeddedError.

    `ours_ended`: the last user is this very process, whose server has ended.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with ExitStack() as undo:
        undo.callback(os.close, descriptor)
        deadline = time.monotonic() + LOCK_WAIT_S
        while not try_lock(descriptor):
            owner = os.pread(descriptor, 20, 0).decode().strip()
            ended = not _is_alive(owner) or (ours_ended and owner == str(os.getpid()))
            if not ended or time.monotonic() > deadline:
                raise EmbeddedError(
                    f"{folder} is in use by process {owner or 'unknown'}: two servers in one folder would damage it. "
                    f"Stop that one, or name another data folder."
                )
            await asyncio.sleep(LOCK_POLL_S)  # flock can only be awaited in a thread that cannot be cancelled
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        undo.pop_all()
    return FolderLock(descriptor)


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return True  # it has the lock and has not written its number yet
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_promised: set[int] = set()  # to servers of this process, which may not have bound them yet


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free, never given twice, and that no client's socket will be given meanwhile."""
    ports: list[int] = []
    while len(ports) < count:
        port = PORTS_BEGIN + secrets.randbelow(PORTS_END - PORTS_BEGIN)
        if port not in _promised and _refusal(port) is None:
            _promised.add(port)
            ports.append(port)
    return ports


def _refusal(port: int) -> OSError | None:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        return error
    return None


def require_free_port(port: int, *, server: str) -> None:
    if error := _refusal(port):
        raise EmbeddedError(
            f"port {port}, asked for {server}, cannot be had ({error.strerror}): name another one, or 0 for any."
        )


def last_lines(file: Path, *, after_byte: int = 0, lines_max: int = 15) -> str:
    """The end of a log, indented; "" where there is none."""
    try:
        with file.open("rb") as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(max(after_byte, size - 16_384))
            text = content.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines()[-lines_max:])
