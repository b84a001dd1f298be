"""A lane under test: a real processor process, its log, its database and its blob folder, without api and notifier.

Facts are appended straight to the log, so that a test decides every one of them; what became of them is read from the
read models and from the log itself.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.batch import Batch, Upload
from schemas.events import BatchCreated, BatchSealed, Envelope, Fact, Limits, LogEvent, UploadQueued, decode, encode
from schemas.ids import new_id
from services.database import Database
from services.eventlog import EventLog, LogSettings, LogUnavailable

PICTURES = Path(__file__).parent.parent / "services" / "demo" / "pictures"
WAIT_S = 80.0
"""Longer than a batch takes on a machine that is busy with other things, and stands still now and then."""


def a_new_id() -> str:
    return new_id(now_ms=time.time_ns() // 1_000_000, random=os.urandom(9))


@dataclass
class Lane:
    """Where a processor works; `start` runs one, several may be started."""

    log: EventLog
    database: Database
    blobs: Path
    environment: dict[str, str]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, **extra: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.processor",
            env={**os.environ, **self.environment, **extra},
            stderr=asyncio.subprocess.PIPE,
        )
        self.processes.append(process)
        self.listeners.append(asyncio.create_task(self._listen(process)))
        return process

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self.lines.append(line.decode())
            sys.stderr.write(self.lines[-1])
            self.heard.set()

    async def said(self, *either: str) -> None:
        """Wait until a processor said one of these in its log; fails the test after WAIT_S."""
        async with asyncio.timeout(WAIT_S):
            while not any(words in line for line in self.lines for words in either):
                self.heard.clear()
                await self.heard.wait()

    async def append(self, events: Sequence[LogEvent]) -> None:
        writer = self.log.writer()
        records = [encode(event, Envelope(id=a_new_id(), source="test", time="")) for event in events]
        await writer.append(0, records, timeout_s=WAIT_S)
        await writer.close()

    async def queue_pictures(self, names: Sequence[str], *, user_id: str = "ada", seal: bool = True) -> str:
        """A batch of shipped pictures, appended in one record batch; its id."""
        batch_id = a_new_id()
        limits = Limits(files_max=1000, batch_bytes_max=10**10, file_bytes_max=10**8)
        events: list[LogEvent] = [BatchCreated(batch_id=batch_id, user_id=user_id, limits=limits)]
        events += [self._queued(batch_id, user_id, PICTURES / name) for name in names]
        await self.append([*events, BatchSealed(batch_id=batch_id, user_id=user_id)] if seal else events)
        return batch_id

    def _queued(self, batch_id: str, user_id: str, picture: Path) -> UploadQueued:
        upload_id = a_new_id()
        blob = f"{upload_id}/original"
        (self.blobs / upload_id).mkdir(parents=True)
        shutil.copy(picture, self.blobs / blob)
        return UploadQueued(
            batch_id=batch_id,
            user_id=user_id,
            upload_id=upload_id,
            filename=picture.name,
            content_type={".png": "image/png", ".webp": "image/webp", ".gif": "image/gif", ".heic": "image/heic"}.get(
                picture.suffix, "image/jpeg"
            ),
            size_bytes=picture.stat().st_size,
            sha256=hashlib.sha256(picture.read_bytes()).hexdigest(),
            blob=blob,
        )

    async def until(self, batch_id: str, condition: Callable[[Batch, dict[str, Upload]], bool]) -> Batch:
        """The batch as soon as the read models say so; fails the test after WAIT_S."""
        return (await self.snapshot_when(batch_id, condition))[0]

    async def snapshot_when(
        self, batch_id: str, condition: Callable[[Batch, dict[str, Upload]], bool]
    ) -> tuple[Batch, dict[str, Upload]]:
        projected, lost = asyncio.Event(), asyncio.Event()
        connection = await self.database.listen(lambda _partition, _offset: projected.set(), lost)
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    projected.clear()
                    snapshot = await self.database.snapshot(batch_id)
                    if snapshot.batch is not None and condition(snapshot.batch, snapshot.uploads):
                        return snapshot.batch, snapshot.uploads
                    await projected.wait()
        finally:
            await connection.close()

    async def lock_is_free(self) -> None:
        """Wait until nobody holds the lane's lock any more; fails the test after WAIT_S."""
        async with asyncio.timeout(WAIT_S), self.database.connection() as connection:
            held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 20942 AND granted"
            held += " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            while await connection.fetchval(held):  # noqa: ASYNC110  # Postgres tells nobody that a lock became free
                await asyncio.sleep(0.1)

    async def facts(self) -> list[Fact]:
        """Every fact of the log so far."""
        reader = self.log.reader([0])
        await reader.seek(0, 0)
        end = (await reader.ends())[0]
        records = []
        while len(records) < end:
            with contextlib.suppress(LogUnavailable):
                records += await reader.read(records_max=10_000, timeout_ms=1_000)
        await reader.close()
        return [fact for fact in map(decode, records) if isinstance(fact, Fact)]


@contextlib.asynccontextmanager
async def a_lane(*, kafka: str, database_url: str, unique: str, folder: Path) -> AsyncIterator[Lane]:
    """A lane whose topics, tables and folder exist; processors started on it are killed at the end."""
    settings = LogSettings(
        bootstrap_servers=kafka, topic=unique, progress_topic=f"{unique}.progress", request_timeout_ms=20_000
    )
    blobs = folder / "blobs"
    blobs.mkdir()
    async with EventLog.open(settings) as log:
        await log.ensure_topics(partitions=1)
        await log.ensure_created(partitions=1, source="test")
        database = await Database.open(database_url)
        await database.migrate()
        lane = Lane(
            log,
            database,
            blobs,
            {
                "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
                "SLUICE_DATABASE_URL": database_url,
                "SLUICE_LOG_TOPIC": unique,
                "SLUICE_PROGRESS_TOPIC": f"{unique}.progress",
                "SLUICE_BLOB_URL": blobs.as_uri(),
                "SLUICE_PROCESSOR_PORT": "0",
            },
        )
        try:
            yield lane
        finally:
            for process in lane.processes:
                if process.returncode is None:
                    process.send_signal(signal.SIGCONT)
                    process.kill()
                await process.wait()
            await asyncio.gather(*lane.listeners)
            await database.close()
