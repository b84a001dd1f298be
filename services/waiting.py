"""What callers of the tail wait for: a condition that becomes true as it reads on, or the facts of their own write.

Nothing here polls: `Conditions.wake` is called whenever something may have changed, and looks at each condition.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from services.folding import Folded


class ReadBack:
    """The facts of one write, awaited from the log. Made before they are appended, so none can be missed."""

    def __init__(self, waiting: dict[str, "asyncio.Future[Folded]"], event_ids: Sequence[str]) -> None:
        self._waiting = waiting
        loop = asyncio.get_running_loop()
        self._futures = {event_id: loop.create_future() for event_id in event_ids}
        waiting.update(self._futures)

    async def wait(self, timeout_s: float) -> list[Folded]:
        """What became of each fact, in the order they were named; raises TimeoutError."""
        try:
            async with asyncio.timeout(timeout_s):
                return [await future for future in self._futures.values()]
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Wait no longer."""
        for event_id, future in self._futures.items():
            self._waiting.pop(event_id, None)
            future.cancel()


class Conditions:
    """Who waits for what."""

    def __init__(self) -> None:
        self._conditions: dict[asyncio.Future[None], Callable[[], bool]] = {}

    def wake(self) -> None:
        """Something changed: let those go on whose condition is true now."""
        for future, condition in list(self._conditions.items()):
            if not future.done() and condition():
                future.set_result(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it is true."""
        if condition():
            return
        future = asyncio.get_running_loop().create_future()
        self._conditions[future] = condition
        try:
            await future
        finally:
            del self._conditions[future]

    async def within(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it is true within so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.until(condition)
        return condition()
