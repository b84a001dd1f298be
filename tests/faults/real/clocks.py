"""Wall clocks of processes that can be set while they run, by libfaketime, which is a tool of these tests alone.

The library is loaded by the environment, and reads a file of ours whenever the process asks for the time. Monotonic
clocks and the times of files stay as they are, as they do where somebody sets a machine's clock. Child processes have
their parent's clock.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

INSTALL = "there is no libfaketime here to set clocks with: `apt-get install faketime`"
LIBRARIES = ("usr/lib/*/faketime", "usr/lib/faketime", "usr/lib64/faketime", "usr/local/lib/faketime")
SHARED_MEMORY = Path("/dev/shm")  # where the library puts it
LEFT_BEHIND = ("faketime_shm_", "sem.faketime_sem_")


def library() -> Path | None:
    """Where it is installed, in its version for programs with threads."""
    found = (path for folder in LIBRARIES for path in Path("/").glob(f"{folder}/libfaketimeMT.so.1"))
    return next(found, None)


class Clocks:
    """A clock for each process that was started with its environment."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self._folder = folder

    @classmethod
    @contextlib.contextmanager
    def kept_in(cls, folder: Path) -> Iterator["Clocks | None"]:
        """Clocks whose files are in this folder, or None where there is no library."""
        found = library()
        try:
            yield cls(found, folder) if found is not None else None
        finally:
            _remove_what_the_dead_left()

    def environment(self, name: str) -> dict[str, str]:
        """What a process must be started with; its clock is right at first."""
        file = self._file(name)
        if not file.exists():
            self.set(name, ahead_s=0)
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, name: str, *, ahead_s: int) -> None:
        """From now on this clock is so much ahead; behind where negative."""
        file = self._file(name)
        new = file.with_suffix(".new")
        new.write_text(f"{ahead_s:+d}\n")
        new.replace(file)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"


def _remove_what_the_dead_left() -> None:
    """The library never cleans up behind a process that was killed, and then fails in the next one of that number."""
    for prefix in LEFT_BEHIND:
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            pid = path.name.removeprefix(prefix)
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                with contextlib.suppress(OSError):  # another's, or another was faster
                    path.unlink()
