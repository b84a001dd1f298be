"""Start and stop of a service: steps on one exit stack, each logged with its time, undone in reverse.

A failing step undoes what was started before it and says what to do. A stop runs the same stack backwards within
`stop_timeout_s`. What the steps are stands in each service's main.py.
"""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from services.observability import logger
from services.settings import SettingsError

_log = logger("lifecycle")
T = TypeVar("T")

EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2


class StartError(Exception):
    """A service that cannot start or go on; the message says what was found and what to do."""


@contextlib.asynccontextmanager
async def stopwatch(step: str) -> AsyncIterator[None]:
    """Log a step of the start with its time, or why it failed."""
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        _log.error("start_step_failed", step=step, seconds=_since(began), error=str(error))  # one line
        raise
    _log.info("start_step_done", step=step, seconds=_since(began))


@contextlib.asynccontextmanager
async def closing(step: str, close: Callable[[], Awaitable[None]], *, timeout_s: float) -> AsyncIterator[None]:
    """Run `close` at the end, log it with its time, and never let it hang or hide the error that ended us."""
    try:
        yield
    finally:
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await close()
            _log.info("stop_step_done", step=step, seconds=_since(began))
        except Exception as error:  # noqa: BLE001  # the steps below must still be closed
            _log.warning("stop_step_failed", step=step, seconds=_since(began), error=repr(error))


@contextlib.contextmanager
def stop_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def first_of(*tasks: asyncio.Task[Any]) -> None:
    """Wait until one of the tasks ends; raise its error if it failed. The others go on."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until they ended; errors they raise while ending are passed over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_until_told(serve: Callable[[asyncio.Event, asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `serve(stop, ready)` to its end; SIGTERM and SIGINT set `stop`.

    It sets `ready` when it has started, and from then on ends by itself when `stop` is set. Before, it may be waiting
    for a part that is away: then it is cancelled, which undoes what it opened.
    """
    stop, ready = asyncio.Event(), asyncio.Event()
    with stop_signals(stop):
        serving = asyncio.create_task(serve(stop, ready), name="serve")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await first_of(serving, stopping)
            if ready.is_set():
                await serving
            elif not serving.done():
                _log.info("stopped_while_starting")
        finally:
            await cancelled(serving, stopping)


def run_service(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a service's `main` to its end; a failed start is one readable message and a non-zero exit."""
    try:
        asyncio.run(main())
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_BAD_SETTINGS)
    except StartError as error:
        _log.error("service_failed", error=str(error))  # the message says all; a trace would bury it
        sys.exit(EXIT_FAILED)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
