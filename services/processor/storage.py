"""The lane and the blob store, beside the work: whether it is there, and the files of what was deleted.

While the store is away nothing is started, so no file is taken up and given back again and again. What was deleted is
removed some uploads at a time, so that a slow store does not keep the projection waiting; what is missed here, by a
stop or while the store is away, is left to the sweeper.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from services.blobs import BlobStore, StorageUnavailable
from services.lifecycle import cancelled, first_of
from services.processor.health import Health

PART = "blobs"
LOOK_INTERVAL_S = 1.0
REMOVALS_MAX = 10_000
REMOVED_AT_ONCE = 16


class Storage:
    """See the module's text. `on_change` is called when the store is back."""

    def __init__(self, blobs: BlobStore, health: Health, on_change: Callable[[], None]) -> None:
        self._blobs = blobs
        self._health = health
        self._on_change = on_change
        self._removals: asyncio.Queue[str] = asyncio.Queue(maxsize=REMOVALS_MAX)

    async def keep(self) -> None:
        """Look and remove, until cancelled."""
        tasks = asyncio.create_task(self._watch()), asyncio.create_task(self._remove())
        try:
            await first_of(*tasks)
        finally:
            await cancelled(*tasks)

    async def remove(self, upload_ids: Sequence[str]) -> None:
        """These uploads were deleted: remove their files in a while. Waits only where very many are waiting."""
        for upload_id in upload_ids:
            await self._removals.put(upload_id)

    async def _watch(self) -> None:
        while True:
            try:
                await self._blobs.check()
            except StorageUnavailable as error:
                self._health.lost(PART, error)
            else:
                if PART in self._health.parts:
                    self._health.back(PART)
                    self._on_change()
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _remove(self) -> None:
        while True:
            upload_ids = [await self._removals.get()]
            while len(upload_ids) < REMOVED_AT_ONCE and not self._removals.empty():
                upload_ids.append(self._removals.get_nowait())
            await asyncio.gather(*map(self._remove_one, upload_ids))

    async def _remove_one(self, upload_id: str) -> None:
        with contextlib.suppress(StorageUnavailable):
            await self._blobs.delete_upload(upload_id)
