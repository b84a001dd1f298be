"""The disk of the blob store fills up: what does not fit is refused, what fits is kept, and room mends it."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.real.clients import a_picture
from tests.faults.real.scene import ALL, Places, a_scene

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine

SIZE_BYTES = 160_000_000
"""Services start with 100 MB of room."""


@pytest.fixture
async def small_disk(tmp_path: Path) -> AsyncIterator[Path]:
    """A folder on a disk of its own; skipped where we may not mount one."""
    mount, folder = shutil.which("mount"), tmp_path / "small"
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    folder.mkdir()
    process = await asyncio.create_subprocess_exec(mount, "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", folder)
    if await process.wait() != 0:
        pytest.skip("a tmpfs may not be mounted here")
    yield folder
    process = await asyncio.create_subprocess_exec("umount", "--lazy", folder)
    assert await process.wait() == 0


async def test_a_full_disk_refuses_files_and_loses_none(places: Places, small_disk: Path) -> None:
    async with a_scene(replace(places, blobs=small_disk), seed=4) as scene:
        # Given a disk with little room left
        await scene.start(*ALL)
        (client, *_) = await scene.join(users=["ada"])
        await client.open_batch(puts=2, posts=2)
        await scene.settle()
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 300_000)

        # When files come that do not fit
        batch_id = await client.create()
        assert batch_id is not None
        scene.strike("blobs: disk full")
        large = a_picture("large") + b"\0" * 1_000_000
        refused = [await client.put_once(batch_id, large) for _ in range(3)]

        # Then they are refused, and taken when there is room
        assert {(asked.outcome, asked.code) for asked in refused} == {("fail", "storage_unavailable")}
        ballast.unlink()
        taken = await client.put_once(batch_id, large)
        assert (taken.outcome, taken.code) == ("ok", None)
        await client.tell(batch_id, "seal")
        await scene.settle()
        assert await scene.reckoning() == []
