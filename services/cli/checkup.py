"""What a check of `sluice doctor` is: what it looks at, what it says, and how it says that something is wrong.

A check says what it found, or raises `Ailing` with the way to mend it, or `NotNeeded` where it says nothing here. None
changes anything. The checks: `ailments_here.py`, `ailments_there.py`; who makes them: `doctor.py`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.settings import Settings

State = Literal["ok", "warning", "wrong", "skipped"]


class Ailing(Exception):  # noqa: N818  # a finding, not a mistake of ours
    """Something is not as it should be: what was found, and what to do. `bearable`: a start works all the same."""

    def __init__(self, found: str, mend: str, *, bearable: bool = False) -> None:
        super().__init__(found)
        self.mend = mend
        self.bearable = bearable


class NotNeeded(Exception):  # noqa: N818  # a finding
    """The check says nothing here; the text says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `mend` is None where there is nothing to mend."""

    check: str
    state: State
    found: str
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined. `endpoints`: of the `up` that runs in `data_dir`, empty where none does; `settings`: the
    services', completed by those; `external`: the servers that settings name."""

    data_dir: Path
    settings: Settings
    endpoints: dict[str, Any]
    external: frozenset[str]

    @property
    def runs(self) -> bool:
        return bool(self.endpoints)


Check = Callable[[Patient], Awaitable[str]]
