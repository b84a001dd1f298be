"""The port between the lane and the work on one file: what a handler gets, gives and may raise.

A handler is plain synchronous code. It runs in a child process of its own (`process`, `child`), one file at a time,
with limits on time and memory, because the bytes come from strangers and decoders crash. It is named by a Python entry
point of the group `sluice.work` (`registry`) and chosen by the content type of the upload. Built in:
`images` and `videos`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from schemas.errors import WorkCode

MESSAGE_CHARACTERS_MAX = 1_000

Progress = Callable[[str, int], None]
"""Called by the work itself, never by a clock: the stage just reached (a word), and the percentage done (0 to 100)."""


@dataclass(frozen=True, slots=True)
class Job:
    """One file to work. `path` holds its bytes on this machine; a handler may write a JPEG to `thumbnail_path`."""

    upload_id: str
    batch_id: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    path: Path
    thumbnail_path: Path


class WorkError(Exception):
    """The work on one file failed. `final`: a second try cannot mend it.

    The message is for the person whose file it is: no paths of this machine stand in it. It is cleaned of what the
    log cannot hold and cut to the contract's 1,000 characters.
    """

    def __init__(self, code: WorkCode, message: str, *, final: bool = False) -> None:
        self.code = code
        self.message = storable(message)[:MESSAGE_CHARACTERS_MAX]
        self.final = final
        super().__init__(f"{code}: {self.message}")


class WorkCancelled(Exception):  # noqa: N818  # not an error: somebody wanted the work to end
    """The work was stopped from outside (a cancelled batch, a shutdown); nothing is known about the file."""


class WorkerUnavailable(Exception):  # noqa: N818  # says what is so, and is about this machine, not about the file
    """No child process could be started, so no file can be worked now; the file is unharmed. The message says why."""


class Handler(Protocol):
    """What an entry point of `sluice.work` names: an object with these members.

    `warm_up` runs once in a fresh child, before the memory limit is set: import, load and prepare there what every file
    needs. Its argument holds the handler's settings, by name. `work` returns the contract's `result` (at most 32 kB of
    JSON, no NUL, no NaN), or raises WorkError; MemoryError and any other exception are reported under their own codes.
    """

    @property
    def content_types(self) -> frozenset[str]: ...

    def warm_up(self, options: Mapping[str, Any]) -> None: ...

    def work(self, job: Job, progress: Progress) -> dict[str, Any]: ...


def storable(text: str) -> str:
    """The text without what the log and Postgres cannot hold or people cannot read: control characters, surrogates."""
    return "".join(" " if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 else c for c in text).strip()  # noqa: PLR2004  # code points
