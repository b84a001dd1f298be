"""What every service opens first, in this order: Postgres ‖ Kafka, versions, tables, topics, LogCreated.

A part that is late is waited for within a bound and named meanwhile; one that is wrong ends the start with a sentence.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from schemas.batch import Lane
from schemas.position import Position
from schemas.views import rfc3339
from services.auth import Authenticator
from services.blobs import BlobStore, LocalBlobs, S3Blobs, StorageUnavailable
from services.database import Database, DatabaseUnavailable
from services.eventlog import EventLog, Log, LogIdentity, LogRefused, LogSettings, LogUnavailable, records_at
from services.keys import KeysUnavailable
from services.lifecycle import StartError, closing, stopwatch
from services.observability import logger
from services.settings import Settings

_log = logger("opening")
T = TypeVar("T")

PART_WAIT_S = 60.0
PART_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Stores:
    """The log and the database, checked and belonging together."""

    log: Log
    identity: LogIdentity
    database: Database
    topic_complaint: Callable[[], Awaitable[str | None]]
    """What is wrong with the settings of the log's topic now, None where nothing is; raises LogUnavailable."""

    @property
    def log_id(self) -> str:
        return self.identity.log_id


@contextlib.asynccontextmanager
async def open_stores(settings: Settings, *, service: str, sessions: str = "sluice") -> AsyncIterator[Stores]:
    """Open both; raises StartError with what was found and what to do. `sessions`: what those in Postgres are named."""
    async with contextlib.AsyncExitStack() as stack:
        log = await stack.enter_async_context(_open_log(settings, service))
        async with stopwatch("Postgres and Kafka reached, versions checked"):
            url = settings.database_url.get_secret_value()
            database, _ = await _both(
                _patiently("Postgres", lambda: Database.open(url, sessions=sessions)),
                _patiently("Kafka", log.check_version),
            )
        await stack.enter_async_context(
            closing("database connections closed", database.close, timeout_s=settings.stop_timeout_s)
        )
        async with stopwatch("tables ensured"):
            await _patiently("Postgres", database.migrate)
        async with stopwatch("topics ensured"):
            await _patiently("Kafka", lambda: _ensure_topics(log, settings))
            identity = await _patiently(
                "Kafka", lambda: log.ensure_created(partitions=settings.partitions, source=f"sluice/{service}")
            )
        async with stopwatch("log and read models belong together"):
            await _patiently("Postgres", lambda: _check_same_log(database, identity.log_id, topic=settings.log_topic))
            await _check_same_past(database, log, partitions=settings.partitions)
        yield Stores(log, identity, database, functools.partial(_topic_complaint, log, settings))


@contextlib.asynccontextmanager
async def open_authenticator(settings: Settings) -> AsyncIterator[Authenticator]:
    """What checks tokens; raises StartError where the keys for that do not come."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with stopwatch("keys of tokens at hand"):
                authenticator = await stack.enter_async_context(Authenticator.open(settings))
        except KeysUnavailable as error:
            raise StartError(f"SLUICE_JWKS_URL: {error}") from error
        yield authenticator


@contextlib.asynccontextmanager
async def open_blobs(settings: Settings) -> AsyncIterator[BlobStore]:
    """The blob store that SLUICE_BLOB_URL names; raises StartError where it cannot be used."""
    bucket = settings.blob_bucket
    async with contextlib.AsyncExitStack() as stack:
        try:
            blobs: BlobStore = await stack.enter_async_context(
                LocalBlobs.open(settings.blob_folder, fsync=settings.fsync)
                if bucket is None
                else S3Blobs.open(bucket.name, prefix=bucket.prefix)
            )
        except StorageUnavailable as error:
            raise StartError(f"SLUICE_BLOB_URL: {error}") from error
        yield blobs


@contextlib.asynccontextmanager
async def _open_log(settings: Settings, service: str) -> AsyncIterator[EventLog]:
    log_settings = LogSettings(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        topic=settings.log_topic,
        progress_topic=settings.progress_topic,
        client_id=f"sluice-{service}",
    )
    try:
        async with EventLog.open(log_settings) as log:
            yield log
    except LogRefused as error:
        raise StartError(str(error)) from error


async def _both(database: Awaitable[Database], version: Awaitable[str]) -> tuple[Database, str]:
    opened, found = await asyncio.gather(database, version, return_exceptions=True)
    if isinstance(found, BaseException) or isinstance(opened, BaseException):
        if isinstance(opened, Database):
            await opened.close()
        raise opened if isinstance(opened, BaseException) else found if isinstance(found, BaseException) else OSError
    return opened, found


async def _ensure_topics(log: Log, settings: Settings) -> None:
    await log.ensure_topics(
        partitions=settings.partitions, replication_factor=settings.replication_factor, fsync=settings.fsync
    )


async def _topic_complaint(log: EventLog, settings: Settings) -> str | None:
    found = await log.inspect(fsync=settings.fsync)
    return f"{settings.log_topic} is gone from Kafka" if found is None else found.complaint


async def _check_same_log(database: Database, log_id: str, *, topic: str) -> None:
    for lane in (await database.positions()).values():
        if lane.log_id != log_id:
            raise StartError(
                f"the read models are of the log {Position.of(lane.log_id, {}).log}, but {topic} in Kafka is the log "
                f"{Position.of(log_id, {}).log}: if SLUICE_DATABASE_URL and SLUICE_KAFKA_BOOTSTRAP_SERVERS are right, "
                "make the read models anew from this log with `sluice replay`, or bring the other log back with "
                "`sluice log import`"
            )


async def _check_same_past(database: Database, log: Log, *, partitions: int) -> None:
    positions = await _patiently("Postgres", database.positions)
    lanes = {number: lane for number, lane in positions.items() if number < partitions}
    if found := await _patiently("Kafka", lambda: grown_again(log, lanes)):
        raise StartError(
            f"{found}: rebuild the read models from the log as it is with `sluice replay`, or bring back what it was "
            "with `sluice log import`"
        )


async def grown_again(log: Log, lanes: Mapping[int, Lane]) -> str | None:
    """A sentence where the log lost its end and reaches as far as the read models again, with other records: none that
    they include is newer than the newest time they know, and one that came in its place is. Raises LogUnavailable."""
    for number, lane in lanes.items():
        if lane.next_offset == 0:
            continue
        with contextlib.suppress(LogRefused):  # it does not reach so far; who reads on from there says so
            async with contextlib.aclosing(records_at(log, [(number, lane.next_offset - 1)])) as records:
                async for record in records:
                    if record.timestamp_ms > lane.time_ms:
                        return (
                            f"{log.settings.topic} lost its end and grew again: the read models include its record "
                            f"{number}-{record.offset} as it was by {rfc3339(lane.time_ms)}, the one that is there was "
                            f"appended {rfc3339(record.timestamp_ms)}"
                        )
    return None


async def _patiently(part: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until the part is there, for PART_WAIT_S at most."""
    began = time.monotonic()
    waiting_said = False
    while True:
        try:
            return await attempt()
        except (DatabaseUnavailable, LogUnavailable) as error:
            if time.monotonic() - began > PART_WAIT_S:
                raise StartError(f"{part} did not come within {PART_WAIT_S:.0f} s: {error}") from error
            if not waiting_said:
                _log.warning("waiting_for_part", part=part, reason=str(error))
                waiting_said = True
            await asyncio.sleep(PART_RETRY_S)
