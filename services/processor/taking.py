"""Taking a lane: its rows as the read models hold them, and a claim in the log whose offset is the epoch of the work;
and looking back at what was begun before it.

Everything here waits for a log and a database that are away, and ends only where the log is refused.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping

from schemas.batch import Changed
from schemas.events import Fact, LaneClaimed, UploadInterrupted, UploadStarted, decode, encode
from schemas.records import StoredRecord
from services.database import DatabaseUnavailable, ReadModelsGone
from services.eventlog import Log, LogOutcomeUnknown, LogReader, LogRefused, LogUnavailable, LogWriter
from services.lifecycle import StartError
from services.observability import logger
from services.opening import Stores
from services.processor import decisions
from services.processor.health import Health
from services.processor.lane import APPEND_TIMEOUT_S, RETRY_INTERVAL_S, envelope
from services.processor.presence import Worker
from services.processor.projection import Projection
from services.processor.rows import Rows

_log = logger("processor")

READ_RECORDS_MAX = 2_000
READ_TIMEOUT_MS = 200
LOOK_BACK_RECORDS_MAX = 20_000
"""Less than a second's reading; a copy of what was sent lands within minutes of it, or never."""
CATCH_UP_REPORT_S = 5.0


async def take(
    stores: Stores, partition: int, reader: LogReader, writer: LogWriter, health: Health
) -> tuple[Projection, int]:
    """The lane's rows, and the epoch under which it is ours."""
    projection = await _patiently_open(stores, partition)
    await _seek(reader, partition, projection.lane.next_offset)
    return projection, await claim(reader, writer, projection, health)


async def _patiently_open(stores: Stores, partition: int) -> Projection:
    while True:
        try:
            rows = await Rows.live(stores.database)
            projection = await Projection.open(rows, partition=partition, log_id=stores.log_id)
            first = projection.lane.next_offset
            projection.quarantined = await rows.quarantined(partition, log_id=stores.log_id, first=first)
        except DatabaseUnavailable as error:
            if isinstance(error, ReadModelsGone):
                with contextlib.suppress(DatabaseUnavailable):
                    await stores.database.migrate()
            await asyncio.sleep(RETRY_INTERVAL_S)
        else:
            return projection


async def _seek(reader: LogReader, partition: int, offset: int) -> None:
    while True:
        try:
            await reader.seek(partition, offset)
        except LogUnavailable:
            await asyncio.sleep(RETRY_INTERVAL_S)
        except LogRefused as error:
            raise StartError(str(error)) from error
        else:
            return


async def claim(reader: LogReader, writer: LogWriter, projection: Projection, health: Health) -> int:
    """Catch up, say that the lane is ours, and read on until our own claim comes back effective: its offset is our
    epoch. Everything read by then is in Postgres afterwards."""
    worker_id = Worker.this_process().worker_id
    partition = projection.lane.partition
    while True:
        if health.holds_lane:
            await _catch_up(reader, projection, health)
        if not health.holds_lane:  # who lost it writes nothing, and answers no newer claim with its own
            await asyncio.sleep(RETRY_INTERVAL_S)
            continue
        said = envelope()
        event = LaneClaimed(worker_id=worker_id, after=projection.lane.epoch)
        try:
            await writer.append(partition, [encode(event, said)], timeout_s=APPEND_TIMEOUT_S)
        except (LogUnavailable, LogOutcomeUnknown) as error:
            health.lost("log", error)
            await asyncio.sleep(RETRY_INTERVAL_S)
        for fact in await _catch_up(reader, projection, health):
            if fact.id == said.id:
                return fact.offset


async def landed_late(
    log: Log, partition: int, health: Health, epoch: int, in_work: Mapping[str, int]
) -> frozenset[str]:
    """Which of the attempts that were in work at the claim `epoch` a late copy of a start began; see `decisions`."""
    next_offset = max(0, epoch - LOOK_BACK_RECORDS_MAX)
    facts: list[Fact] = []
    reader = log.reader([partition])
    try:
        while next_offset <= epoch:
            try:
                await reader.seek(partition, next_offset)
                records = await next_records(reader)
            except LogUnavailable as error:
                health.lost("log", error)
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            health.back("log")
            next_offset += len(records)
            read = (fact for fact in map(decode, records) if isinstance(fact, Fact) and fact.offset <= epoch)
            facts += [fact for fact in read if isinstance(fact.event, LaneClaimed | UploadStarted | UploadInterrupted)]
    except LogRefused as error:
        _log.warning("look_back_refused", partition=partition, next_offset=next_offset, reason=str(error))
        return frozenset()
    finally:
        await reader.close()
    return decisions.landed_late(facts, in_work, claim=epoch)


async def next_records(reader: LogReader) -> list[StoredRecord]:
    """What the log brings next, as much as is folded in one go; empty where nothing comes for a moment."""
    return await reader.read(records_max=READ_RECORDS_MAX, timeout_ms=READ_TIMEOUT_MS)


async def _catch_up(reader: LogReader, projection: Projection, health: Health) -> list[Fact]:
    """Read and write to where the log ends at the call; returns the effective claims among what was read."""
    claims: list[Fact] = []
    reported = began = time.monotonic()
    end: int | None = None
    records: list[StoredRecord] = []  # kept until they are folded: the reader does not bring them again
    while end is None or projection.lane.next_offset < end or projection.dirty:
        try:
            if end is None:
                end = (await reader.ends())[projection.lane.partition]
            if projection.lane.next_offset < end:
                records = records or await next_records(reader)
                folded = await projection.fold(records)
                records = []
                effective = (each.fact for each in folded if isinstance(each.outcome, Changed))
                claims += [fact for fact in effective if isinstance(fact.event, LaneClaimed)]
            await projection.flush()
        except (LogUnavailable, DatabaseUnavailable) as error:
            health.lost("catching up", error)
            await asyncio.sleep(RETRY_INTERVAL_S)
            continue
        health.back("catching up")
        health.back("log")
        if time.monotonic() - reported > CATCH_UP_REPORT_S:
            reported = time.monotonic()
            _report_catching_up(projection, end, reported - began)
    return claims


def _report_catching_up(projection: Projection, end: int, seconds: float) -> None:
    _log.info(
        "catching_up",
        partition=projection.lane.partition,
        next_offset=projection.lane.next_offset,
        records_left=end - projection.lane.next_offset,
        seconds=round(seconds, 1),
    )
