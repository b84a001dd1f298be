"""What api and notifier share around their tail: opened from the settings, and served on until told to stop.

Neither can go on without it: a tail that failed ends the service with a sentence, and a new one begins where the read
models are.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from services.database import DatabaseUnavailable
from services.eventlog import LogRefused, LogUnavailable
from services.lifecycle import StartError, cancelled, first_of
from services.opening import Stores
from services.settings import Settings
from services.tail import Past, Tail

CAUGHT_UP_WAIT_S = 10.0


@contextlib.asynccontextmanager
async def open_tail(settings: Settings, stores: Stores, *, past: Past | None = None) -> AsyncIterator[Tail]:
    """A tail that reads on until the block is left; raises StartError."""
    try:
        async with Tail.open(
            log=stores.log,
            database=stores.database,
            log_id=stores.log_id,
            partitions=settings.partitions,
            facts_max=settings.tail_facts_max,
            batches_max=settings.tail_batches_max,
            past=past,
        ) as tail:
            yield tail
    except (DatabaseUnavailable, LogUnavailable, LogRefused) as error:
        raise StartError(str(error)) from error


async def soon_caught_up(tail: Tail) -> None:
    """Wait until the tail has read to the log's end, but not so long that nobody hears what it waits for: a service
    that serves says so itself (/readyz), and does what it can."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CAUGHT_UP_WAIT_S):
            await tail.caught_up()


async def serve_until(stop: asyncio.Event, *, tail: Tail, needed: asyncio.Task[None], service: str) -> None:
    """Return when `stop` is set; raises StartError where the tail or the other task it needs ended before."""
    told = asyncio.create_task(stop.wait(), name="stop")
    failed = asyncio.create_task(tail.failure(), name="tail_failure")
    try:
        await first_of(told, failed, needed)
    except Exception as error:
        raise StartError(f"the {service} cannot go on: {error}") from error
    finally:
        await cancelled(told, failed)
