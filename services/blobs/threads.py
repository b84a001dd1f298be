"""Threads of a store's own: what blocks runs there, and it is always waited for, whoever is cancelled meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.blobs.store import StorageUnavailable

T = TypeVar("T")

_THREADS_MAX = 8


class Threads:
    """Until `close`. `place` names the store in errors."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._pool = ThreadPoolExecutor(max_workers=_THREADS_MAX, thread_name_prefix="blobs")

    async def run(self, work: Callable[[], T]) -> T:
        """Do something with files in a thread; its OSError becomes StorageUnavailable."""
        try:
            return await finished(asyncio.get_running_loop().run_in_executor(self._pool, work))
        except OSError as error:
            raise StorageUnavailable(f"{self._place} cannot be used: {error.strerror or error}") from error

    def close(self) -> None:
        self._pool.shutdown()


async def finished(working: "asyncio.Future[T]") -> T:
    """What the work comes to. It goes on when the caller is cancelled, and the caller waits for it: nobody cleans up
    what is still being written."""
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise
