"""A small disk, which can be made full and be given room again: a tmpfs, where mounting one is allowed.

It is made full by being cut down to what it holds, so nothing can be added anywhere on it, and no memory is spent on
ballast. Whoever writes to it meets what a full disk says (ENOSPC).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.embedded.folders import make_folder

FILLED_WITHIN_S = 5.0
PAGE_BYTES = 4_096
"""No limit at all is what a size of 0 means."""


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """`folder` is all of it."""

    folder: Path
    size_bytes: int

    @classmethod
    @contextlib.asynccontextmanager
    async def mounted(cls, folder: Path, *, size_bytes: int) -> AsyncIterator[SmallDisk]:
        """A new one on this folder, until the block is left. Skips the test where we may not mount one."""
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("only root can mount a small tmpfs")
        make_folder(folder, purpose="where a small disk is mounted")
        if not await _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0755", "tmpfs", folder):
            pytest.skip("a tmpfs may not be mounted here")
        try:
            yield cls(folder, size_bytes)
        finally:
            assert await _run("umount", "--lazy", folder)

    @classmethod
    @contextlib.asynccontextmanager
    async def where_allowed(cls, folder: Path, *, size_bytes: int) -> AsyncIterator[SmallDisk | None]:
        """A new one on this folder, until the block is left; None where we may not mount one."""
        async with contextlib.AsyncExitStack() as stack:
            disk = None
            with contextlib.suppress(pytest.skip.Exception):
                disk = await stack.enter_async_context(cls.mounted(folder, size_bytes=size_bytes))
            yield disk

    async def fill(self) -> None:
        """Leave no room at all, or a page on an empty one. Where something is written at that moment, that is tried
        again."""
        async with asyncio.timeout(FILLED_WITHIN_S):
            while not await self._resize(max(PAGE_BYTES, shutil.disk_usage(self.folder).used)):
                pass

    async def clear(self) -> None:
        """Give it its room again."""
        assert await self._resize(self.size_bytes)

    async def _resize(self, size_bytes: int) -> bool:
        return await _run("mount", "-o", f"remount,size={size_bytes}", self.folder)


async def _run(*command: str | Path) -> bool:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait() == 0
