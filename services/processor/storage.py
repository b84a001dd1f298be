"""The lane and the blob store, beside the work: whether it is there, and the files of what was deleted.

While the store is away nothing is started, so no file is taken up and given back again and again. What was deleted is
removed some uploads at a time, and while the store is away not at all; the projection never waits for it. What is
missed here, by a stop or because too many are waiting, is left to the sweeper.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from schemas.errors import WorkCode
from services.blobs import BlobStore, StorageUnavailable
from services.lifecycle import cancelled, first_of
from services.observability import logger
from services.processor.work.port import WorkError

if TYPE_CHECKING:
    from services.processor.health import Health  # which knows the lane, which knows this

_log = logger("storage")

PART = "blobs"
LOOK_INTERVAL_S = 1.0
REMOVALS_MAX = 100_000
REMOVED_AT_ONCE = 16
GIVEN_BACK_MAX = 5
REMEMBERED_MAX = 1_000


def unreadable() -> WorkError:
    """Why a file has failed that cannot be read, again and again, while the store is there."""
    return WorkError(
        WorkCode.INTERNAL_ERROR, "Its bytes could not be read from the blob store, though the store is there."
    )


class Storage:
    """See the module's text. `on_change` is called when the store is back."""

    def __init__(self, blobs: BlobStore, health: "Health", on_change: Callable[[], None]) -> None:
        self._blobs = blobs
        self._health = health
        self._on_change = on_change
        self._removals: asyncio.Queue[str] = asyncio.Queue(maxsize=REMOVALS_MAX)
        self._dropping = False
        self._there = asyncio.Event()
        self._there.set()

    async def keep(self) -> None:
        """Look and remove, until cancelled."""
        tasks = asyncio.create_task(self._watch()), asyncio.create_task(self._remove())
        try:
            await first_of(*tasks)
        finally:
            await cancelled(*tasks)

    def remove(self, upload_ids: Sequence[str]) -> None:
        """These uploads were deleted: remove their files in a while. Where very many are waiting, these are left to the
        sweeper."""
        for number, upload_id in enumerate(upload_ids):
            try:
                self._removals.put_nowait(upload_id)
            except asyncio.QueueFull:
                if not self._dropping:  # said once, until the queue is empty again
                    _log.warning("removals_left_to_the_sweeper", waiting=REMOVALS_MAX, left=len(upload_ids) - number)
                self._dropping = True
                return

    async def _watch(self) -> None:
        while True:
            try:
                await self._blobs.check()
            except StorageUnavailable as error:
                self._there.clear()
                self._health.lost(PART, error)
            else:
                self._there.set()
                if PART in self._health.parts:
                    self._health.back(PART)
                    self._on_change()
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _remove(self) -> None:
        while True:
            upload_ids = [await self._removals.get()]
            await self._there.wait()
            while len(upload_ids) < REMOVED_AT_ONCE and not self._removals.empty():
                upload_ids.append(self._removals.get_nowait())
            self._dropping = self._dropping and not self._removals.empty()
            await asyncio.gather(*map(self._remove_one, upload_ids))

    async def _remove_one(self, upload_id: str) -> None:
        with contextlib.suppress(StorageUnavailable):
            await self._blobs.delete_upload(upload_id)


class Patience:
    """How often a file that cannot be brought from the store is given back unharmed: it waits for a store that is away,
    but one file that cannot be read must not keep the lane busy for ever."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._given_back: dict[str, int] = {}

    async def ends_with(self, upload_id: str) -> bool:
        """Whether this file, which could not be read just now, is to blame and not the store: then it has failed."""
        if upload_id not in self._given_back and len(self._given_back) >= REMEMBERED_MAX:
            self._given_back.clear()
        self._given_back[upload_id] = times = self._given_back.get(upload_id, 0) + 1
        if times <= GIVEN_BACK_MAX:
            return False
        try:
            await self._blobs.check()
        except StorageUnavailable:
            return False
        del self._given_back[upload_id]
        return True
