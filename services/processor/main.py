"""The processor: one lane of the log, worked strictly one upload at a time.

Read `run` first, then down: open what is needed, take the lane, claim it in the log, then read, write and work side by
side until a signal, a newer claim or a broken promise ends it. A lost lane ends this process; a new one begins from
what Postgres holds.
"""

import asyncio
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from starlette.applications import Starlette

from schemas.records import StoredRecord
from services.blobs import BlobStore
from services.database import DatabaseUnavailable
from services.eventlog import LogReader, LogRefused, LogUnavailable
from services.faults import arm, reach
from services.lifecycle import StartError, cancelled, closing, first_of, run_service, run_until_told, stopwatch
from services.observability import LOG_LAG, configure_logging, logger
from services.opening import Stores, open_blobs, open_stores
from services.processor import storage, taking, workbench
from services.processor.clock import LogClock
from services.processor.health import Health
from services.processor.lane import RETRY_INTERVAL_S, LaneWorker, LookBack
from services.processor.lock import LaneLock, sessions_of
from services.processor.presence import Presence, Worker
from services.processor.projection import GenerationChangedError, Projection
from services.processor.work.port import WorkerUnavailable
from services.processor.work.process import WorkerProcess
from services.recognising import Recogniser
from services.serving import LOST, health_routes, serving
from services.settings import Settings, load

_log = logger("processor")
T = TypeVar("T")

UNFLUSHED_RECORDS_MAX = 20_000
FLUSH_PAUSE_S = 0.005
HOUSEKEEPING_INTERVAL_S = 2.0
SCRATCH_PREFIX = "sluice-work-"


def run() -> None:
    """Start, work, stop."""
    run_service(main)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What lanes are worked with, for as long as this process lives; `scratch` is a folder of our own."""

    settings: Settings
    stores: Stores
    blobs: BlobStore
    worker: WorkerProcess
    scratch: Path


async def main() -> None:
    settings = load(needs=("blob_url",))
    configure_logging(service="processor", log_format=settings.log_format, log_level=settings.log_level)
    arm(settings.fault)
    await run_until_told(functools.partial(_serve, settings))


async def _serve(settings: Settings, stop: asyncio.Event, ready: asyncio.Event) -> None:
    health = Health()
    async with _serving_health(settings, health), _opened(settings) as shop:
        ready.set()
        health.degraded, health.work_timeout_s = shop.worker.degraded, settings.work_timeout_s
        _log.info("processor_ready", partition=settings.partition, log_id=shop.stores.log_id)
        working = asyncio.create_task(_work_lanes(shop, health, stop), name="lane")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await first_of(working, stopping)
            async with asyncio.timeout(settings.stop_timeout_s):
                await working
        except TimeoutError:
            _log.warning("stop_took_too_long", seconds=settings.stop_timeout_s)
        finally:
            await cancelled(working, stopping)


@contextlib.asynccontextmanager
async def _serving_health(settings: Settings, health: Health) -> AsyncIterator[None]:
    app = Starlette(routes=health_routes(health.problems, lambda: health.degraded), exception_handlers=LOST)
    async with serving(app, host=settings.host, port=settings.processor_port, stop_timeout_s=1):
        yield


@contextlib.asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Workshop]:
    async with contextlib.AsyncExitStack() as stack:
        async with stopwatch("blob store reached"):
            blobs = await stack.enter_async_context(open_blobs(settings))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")))
        _clear_scratch_of_the_dead()
        async with stopwatch("child process warm"):
            worker = await _start_worker(settings)
            await stack.enter_async_context(closing("child process ended", worker.stop, timeout_s=5))
        stores = await stack.enter_async_context(
            open_stores(settings, service="processor", sessions=sessions_of(settings.partition, Worker.this_process()))
        )
        yield Workshop(settings, stores, blobs, worker, scratch)


def _clear_scratch_of_the_dead() -> None:
    """Who was killed could not remove its folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        owner = folder.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


async def _start_worker(settings: Settings) -> WorkerProcess:
    worker = WorkerProcess(
        options={"image": {"pixels_max": settings.pixels_max}}, memory_bytes_max=settings.work_memory_bytes
    )
    try:
        await worker.start()
    except WorkerUnavailable as error:
        raise StartError(str(error)) from error
    if not worker.content_types:
        await worker.stop()
        raise StartError(f"no file could be worked: {'; '.join(worker.degraded)}; install again with `make setup`")
    for reason in worker.degraded:
        _log.warning("mode_degraded", reason=reason)
    return worker


async def _work_lanes(shop: Workshop, health: Health, stop: asyncio.Event) -> None:
    """Work the lane until `stop`; where other read models took the place of those it wrote, take it anew from these."""
    while not stop.is_set():
        try:
            await _work_lane(shop, health, stop)
        except GenerationChangedError as changed:
            _log.warning("lane_begins_anew", partition=shop.settings.partition, reason=str(changed))
            health.projection = health.hand = health.lane_lock = None
        else:
            return


async def _work_lane(shop: Workshop, health: Health, stop: asyncio.Event) -> None:
    """Take the lane, then work it until `stop`; raises StartError where it is lost."""
    settings, stores = shop.settings, shop.stores
    async with contextlib.AsyncExitStack() as stack:
        identity, database = Worker.this_process(), stores.database
        lock = await stack.enter_async_context(LaneLock.open(database, identity, partition=settings.partition))
        health.lane_lock, health.state = lock, "standing by"
        presence = await stack.enter_async_context(
            Presence.open(database, identity, partition=settings.partition, look=health.condition)
        )
        health.on_change = presence.wake
        reader, writer = stores.log.reader([settings.partition]), stores.log.writer()
        stack.push_async_callback(writer.close)
        stack.push_async_callback(reader.close)
        watching = asyncio.create_task(_watch_log(reader, health), name="lane.log")
        stack.push_async_callback(cancelled, watching)
        if await _unless_stopped(lock.take(), stop) is None:
            return
        await cancelled(watching)
        reach("processor.after_lock")
        health.state = "catching up"
        keeping = asyncio.create_task(lock.keep(), name="lane.lock")
        stack.push_async_callback(cancelled, keeping)
        async with stopwatch(f"lane {settings.partition} claimed"):
            taken = await _unless_stopped(taking.take(stores, settings.partition, reader, writer, health), stop)
        if taken is None:
            return
        reach("processor.after_claim")
        projection, epoch = taken
        projection.epoch = epoch
        bench = workbench.Workbench(
            shop.worker, shop.blobs, health, scratch=shop.scratch, work_timeout_s=settings.work_timeout_s
        )
        hand = LaneWorker(
            epoch=epoch,
            log=stores.log,
            writer=writer,
            projection=projection,
            bench=bench,
            may_start=lambda: lock.held and not health.parts.keys() & {"database", storage.PART, workbench.PART},
        )
        recogniser = Recogniser(reader, topic=settings.log_topic, log_id=stores.log_id)
        lock.on_change = bench.on_change = hand.wake
        health.projection, health.hand = projection, hand
        look_back = functools.partial(taking.landed_late, stores.log, settings.partition, health, epoch)
        if await _unless_stopped(_load(hand, health, look_back), stop) is None:
            return
        health.back("database")  # it may have been lost to the lane before this one, and nothing need be written now
        health.state = "working"
        _log.info("lane_taken", partition=settings.partition, epoch=epoch, queued=hand.queued)
        store = storage.Storage(shop.blobs, health, hand.wake)
        await _go_on(settings, Lane(reader, projection, hand, store, health, recogniser), keeping, stop)
        # Others may have the lane now, before the rest is closed; first the row, so that nobody waits for us.
        await cancelled(keeping)
        await presence.leave()
        await lock.give_back()


@dataclass(frozen=True, slots=True)
class Lane:
    """The parts of a lane that is being worked."""

    reader: LogReader
    projection: Projection
    hand: LaneWorker
    storage: storage.Storage
    health: Health
    recogniser: Recogniser


async def _go_on(settings: Settings, lane: Lane, keeping: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Read, write and work side by side until `stop`, then let the hand finish and write what was read."""
    reading = asyncio.create_task(_read(lane), name="lane.read")
    flushing = asyncio.create_task(_flush(lane), name="lane.flush")
    working = asyncio.create_task(lane.hand.run(), name="lane.work")
    housekeeping = asyncio.create_task(_keep_house(lane, settings.idle_seal_s), name="lane.housekeeping")
    storing = asyncio.create_task(lane.storage.keep(), name="lane.storage")
    mending = asyncio.create_task(lane.hand.bench.keep(), name="lane.bench")
    stopping = asyncio.create_task(stop.wait(), name="lane.stop")
    tasks = (reading, flushing, working, housekeeping, storing, mending, stopping)
    try:
        await first_of(*tasks, keeping)
        await lane.hand.stop()
        await first_of(working, reading, flushing)
        await lane.hand.read_back()
        _log.info("lane_given_back", epoch=lane.hand.epoch, next_offset=lane.projection.lane.next_offset)
    except (LogRefused, LogUnavailable) as error:
        raise StartError(str(error)) from error
    except GenerationChangedError:
        await lane.hand.stop()
        await asyncio.wait({working})  # the file in work ends or is given back: this costs it no attempt
        raise
    finally:
        await cancelled(*tasks)
        with contextlib.suppress(DatabaseUnavailable, GenerationChangedError):
            await lane.projection.flush()


async def _load(hand: LaneWorker, health: Health, look_back: LookBack) -> bool:
    """Let the hand begin with what the read models hold, however long that takes."""
    while True:
        try:
            await hand.load(look_back)
        except DatabaseUnavailable as error:
            health.lost("database", error)
            await asyncio.sleep(RETRY_INTERVAL_S)
        else:
            return True


async def _watch_log(reader: LogReader, health: Health) -> None:
    """Say whether the log is there while nothing is read: who stands by is of use only with it."""
    while True:
        try:
            await reader.ends()
            health.back("log")
        except LogUnavailable as error:
            health.lost("log", error)
        await asyncio.sleep(HOUSEKEEPING_INTERVAL_S)


async def _read(lane: Lane) -> None:
    """Fold what comes and show it to the hand; never far ahead of what Postgres holds."""
    reader, projection, health = lane.reader, lane.projection, lane.health
    records: list[StoredRecord] = []
    while True:
        health.reads += 1
        if projection.lane.next_offset - projection.committed > UNFLUSHED_RECORDS_MAX:
            await asyncio.sleep(FLUSH_PAUSE_S)
            continue
        try:
            records = records or await taking.next_records(reader)
            health.back("log")
            folded = await projection.fold(records)
            records = []
            for projected in folded:
                lane.hand.see(projected)
        except LogUnavailable as error:
            health.lost("log", error)
            await asyncio.sleep(RETRY_INTERVAL_S)
        except DatabaseUnavailable as error:
            health.lost("database", error)
            await asyncio.sleep(RETRY_INTERVAL_S)


async def _flush(lane: Lane) -> None:
    """Bring what was folded into Postgres, a transaction each few milliseconds, and remove the files of what was
    deleted once its deletion stands there."""
    while True:
        await lane.projection.folded.wait()
        lane.projection.folded.clear()
        while lane.projection.dirty:
            try:
                removed = await lane.projection.flush()
            except DatabaseUnavailable as error:
                lane.health.lost("database", error)
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            lane.health.back("database")
            lane.storage.remove(removed)
            await asyncio.sleep(FLUSH_PAUSE_S)


async def _keep_house(lane: Lane, idle_seal_s: float) -> None:
    """What depends on the clock: open batches nobody adds to are sealed; how far behind we are is measured."""
    partition, clock = lane.projection.lane.partition, LogClock()
    while True:
        with contextlib.suppress(DatabaseUnavailable):
            now_ms = clock.now_ms(lane.projection.lane)
            await lane.hand.seal_idle(now_ms - int(idle_seal_s * 1000))
        try:
            await lane.recogniser.look()
            if lane.recogniser.complaint is not None:
                lane.health.lost("the log's beginning", lane.recogniser.complaint)
            else:
                lane.health.back("the log's beginning")
            end = (await lane.reader.ends())[partition]
            LOG_LAG.labels(partition).set(max(0, end - lane.projection.lane.next_offset))
            lane.health.back("the log's end")
        except LogUnavailable as error:
            lane.health.lost("the log's end", error)
        lane.hand.wake()
        await asyncio.sleep(HOUSEKEEPING_INTERVAL_S)


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """What the work comes to; None where `stop` comes first."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await first_of(task, stopping)
        return task.result() if task.done() else None
    finally:
        await cancelled(task, stopping)
