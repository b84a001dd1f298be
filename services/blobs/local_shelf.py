"""The shelf of a local folder. The trash is a hidden folder beside the blobs, so that moving there costs nothing."""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from services.blobs.naming import NAME, UPLOAD_ID, known_name
from services.blobs.shelf import Lying

T = TypeVar("T")

TRASH = ".trash"
_FOLDERS_AT_ONCE = 500


class Run(Protocol):
    """Does something with files in a thread."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


class LocalShelf:
    """See `Shelf`. `run` is the store's."""

    def __init__(self, folder: Path, run: Run) -> None:
        self._folder = folder
        self._run = run

    async def lying(self) -> AsyncIterator[list[Lying]]:
        uploads = await self._run(lambda: iter(os.scandir(self._folder)))
        while some := await self._run(functools.partial(_some, uploads)):
            yield some

    async def size(self, name: str) -> int | None:
        return await self._run(functools.partial(_size, self._folder / known_name(name)))

    async def sha256(self, name: str) -> str | None:
        return await self._run(functools.partial(_sha256, self._folder / known_name(name)))

    async def discard(self, name: str, *, sweep_s: int) -> None:
        await self._run(functools.partial(self._discard, name, sweep_s))

    async def bring_back(self, name: str) -> bool:
        return await self._run(functools.partial(self._bring_back, name))

    async def empty_trash(self, *, before_s: float) -> int:
        return await self._run(functools.partial(self._empty_trash, before_s))

    def _discard(self, name: str, sweep_s: int) -> None:
        source = self._folder / known_name(name)
        target = self._folder / TRASH / str(sweep_s) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody removed it first
            source.rename(target)
        _remove_if_empty(source.parent)

    def _bring_back(self, name: str) -> bool:
        target = self._folder / known_name(name)
        for sweep in self._sweeps():
            if (found := sweep / name).is_file():
                target.parent.mkdir(exist_ok=True)
                found.rename(target)
                _remove_if_empty(found.parent)
                return True
        return False

    def _empty_trash(self, before_s: float) -> int:
        removed = 0
        for sweep in self._sweeps():
            if int(sweep.name) < before_s:
                removed += sum(1 for path in sweep.rglob("*") if path.is_file())
                shutil.rmtree(sweep)
        return removed

    def _sweeps(self) -> list[Path]:
        trash = self._folder / TRASH
        return [folder for folder in trash.iterdir() if folder.name.isdigit()] if trash.is_dir() else []


def _some(uploads: "Iterator[os.DirEntry[str]]") -> list[Lying]:
    """What lies in the next folders that hold anything; empty at the end."""
    found: list[Lying] = []
    while not found and (entries := list(islice(uploads, _FOLDERS_AT_ONCE))):
        for entry in entries:
            if UPLOAD_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                found += _files(entry)
    return found


def _files(folder: "os.DirEntry[str]") -> list[Lying]:
    """What is a blob by its name; the rest is not ours. Others may be removing it meanwhile."""
    found: list[Lying] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder.path) as entries:
        for entry in entries:
            name = f"{folder.name}/{entry.name}"
            with contextlib.suppress(FileNotFoundError):
                if NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                    found.append(Lying(name, entry.stat().st_size, entry.stat().st_mtime))
    return found


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
