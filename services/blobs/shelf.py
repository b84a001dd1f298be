"""The blob store as the sweeper goes through it: what lies there, what is in it, and the trash.

The trash is a folder beside the blobs, with one folder for each sweep, named by its time in seconds since 1970; what
lies there keeps its name, so it can be brought back, until its folder is older than the grace time. A blob that nobody
wants is moved, never removed at once, and never over another.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from services.blobs.store import NAME, THUMBNAIL, BlobStore

TRASH = ".trash"
_FOLDERS_AT_ONCE = 500
_UPLOAD_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Lying:
    """A blob or thumbnail in the store. `written_s`: when it was last written, in seconds since 1970."""

    name: str
    size_bytes: int
    written_s: float

    @property
    def upload_id(self) -> str:
        return self.name.partition("/")[0]

    @property
    def thumbnail_of(self) -> tuple[int, int] | None:
        """Epoch and attempt of a thumbnail; None for a file."""
        match = THUMBNAIL.fullmatch(self.name.partition("/")[2])
        return (int(match[1]), int(match[2])) if match else None


class Shelf:
    """See the module's text. Every method raises StorageUnavailable where the folder cannot be used."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def lying(self) -> AsyncIterator[list[Lying]]:
        """All that lies in the store, some uploads at a time, each upload's whole."""
        uploads = await self._store.run(lambda: iter(os.scandir(self._store.folder)))
        while some := await self._store.run(functools.partial(_some, uploads)):
            yield some

    async def size(self, name: str) -> int | None:
        """The bytes of a blob; None where there is none."""
        return await self._store.run(functools.partial(_size, self._store.path(name)))

    async def sha256(self, name: str) -> str | None:
        """Hex SHA-256 of a blob's bytes, read in pieces; None where there is none."""
        return await self._store.run(functools.partial(_sha256, self._store.path(name)))

    async def discard(self, name: str, *, sweep_s: int) -> None:
        """Move a blob into the trash of the sweep of this time."""
        await self._store.run(functools.partial(self._discard, name, sweep_s))

    async def bring_back(self, name: str) -> bool:
        """Take a blob out of the trash, if it lies there."""
        return await self._store.run(functools.partial(self._bring_back, name))

    async def empty_trash(self, *, before_s: float) -> int:
        """Remove for good what was discarded before this time; how many blobs it was."""
        return await self._store.run(functools.partial(self._empty_trash, before_s))

    def _discard(self, name: str, sweep_s: int) -> None:
        source = self._store.path(name)
        target = self._store.folder / TRASH / str(sweep_s) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody removed it first
            source.rename(target)
        _remove_if_empty(source.parent)

    def _bring_back(self, name: str) -> bool:
        target = self._store.path(name)
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
        trash = self._store.folder / TRASH
        return [folder for folder in trash.iterdir() if folder.name.isdigit()] if trash.is_dir() else []


def _some(uploads: "Iterator[os.DirEntry[str]]") -> list[Lying]:
    """What lies in the next folders that hold anything; empty at the end."""
    found: list[Lying] = []
    while not found and (entries := list(islice(uploads, _FOLDERS_AT_ONCE))):
        for entry in entries:
            if _UPLOAD_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
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
