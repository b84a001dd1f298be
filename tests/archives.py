"""A log worth archiving, and processes that are killed while they export or import it.

Run as a program it does one export or import and kills itself in front of the Nth thing that it would write into a
partition: `python -m tests.archives export|import BOOTSTRAP TOPIC FOLDER PARTITION N`.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.events import Envelope, LogEvent, encode
from schemas.records import NewRecord, StoredRecord
from services.archive.exporting import Exporter, Progress
from services.archive.importing import Imported, Importer
from services.archive.manifest import Manifest
from services.archive.places import Folder
from services.archive.selecting import Selection, Whole
from services.eventlog import EventLog, LogSettings, LogWriter, records_between
from services.eventlog.restoring import Restoration
from tests.examples import (
    OTHER_USER,
    USER,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_finished_batch,
    a_lane_claimed,
    an_id,
    an_upload_failed,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
)

ROOT = Path(__file__).parents[1]
PARTITIONS = 2
SEGMENT_BYTES_MAX = 4_000
GROUP_BYTES_MAX = 3_000
ADAS = an_id("ada's", partition=1)
"""A batch of USER whose upload fails under one epoch, and succeeds when retried under the next."""
GRACES = an_id("grace's", partition=1)
"""A batch of OTHER_USER in the same lane, with which USER tried something."""


@dataclass(slots=True)
class Archived:
    """A topic, and what is done with it."""

    log: EventLog
    writer: LogWriter
    news: list[Progress] = field(default_factory=list)

    async def append(self, *events: LogEvent | NewRecord, partition: int = 0) -> None:
        records = [
            event
            if isinstance(event, NewRecord)
            else encode(event, Envelope(id=an_id("event", index, partition), source="/sluice/tests", time=""))
            for index, event in enumerate(events)
        ]
        await self.writer.append(partition, records, timeout_s=10)

    async def records(self) -> list[list[StoredRecord]]:
        """All there is, by partition."""
        reader = self.log.reader(range(PARTITIONS))
        ends = await reader.ends()
        await reader.close()
        return [
            [record async for records in records_between(self.log, number, 0, ends[number]) for record in records]
            for number in range(PARTITIONS)
        ]

    async def exported(self, folder: Path, selection: Selection | None = None) -> Manifest:
        exporter = Exporter(
            self.log, Folder(folder), selection or Whole(), self.news.append, segment_bytes_max=SEGMENT_BYTES_MAX
        )
        return await exporter.run()

    async def imported(self, folder: Path) -> Imported:
        return await Importer(self.log, Folder(folder), self.news.append, group_bytes_max=GROUP_BYTES_MAX).run()


@contextlib.asynccontextmanager
async def a_topic(kafka: str, name: str) -> AsyncIterator[Archived]:
    """A topic that nobody made yet."""
    settings = LogSettings(bootstrap_servers=kafka, topic=name, progress_topic=f"{name}.progress")
    async with EventLog.open(settings) as log:
        yield Archived(log, log.writer())


@contextlib.asynccontextmanager
async def a_used_log(kafka: str, name: str) -> AsyncIterator[Archived]:
    """A log of two lanes and two users, with claims that follow each other, and with poison."""
    async with a_topic(kafka, name) as used:
        await used.log.ensure_topics(partitions=PARTITIONS)
        await used.log.ensure_created(partitions=PARTITIONS, source="/sluice/tests")
        await used.append(a_lane_claimed(), *in_lane_0())
        await used.append(*in_lane_1(), partition=1)
        yield used


def in_lane_0() -> list[LogEvent | NewRecord]:
    events: list[LogEvent | NewRecord] = []
    for number in range(20):
        user_id = USER if number % 2 else OTHER_USER
        batch_id, upload_id = an_id("many", number), an_id("one of many", number)
        events += [
            a_batch_created(batch_id, user_id=user_id, name=f"{user_id} {number}"),
            an_upload_queued(upload_id, batch_id, user_id=user_id),
            a_batch_sealed(batch_id, user_id=user_id),
            an_upload_started(upload_id, batch_id),
            an_upload_succeeded(upload_id, batch_id),
            a_batch_completed(batch_id),
        ]
    poison: tuple[LogEvent | NewRecord, ...] = (
        NewRecord(key=None, value=None, headers=()),
        NewRecord(
            key=b"\xff\x00", value=b"\x00\xff{", headers=(("ce_type", b"\xfe"), ("ce_type", b""), ("ü", b"\xc3"))
        ),
    )
    return [*events, *poison, *a_finished_batch(an_id("last"), [an_id("upload of last")])]


def in_lane_1() -> list[LogEvent | NewRecord]:
    """Offsets are from 1; the epochs are 1 and 12."""
    upload, other = an_id("upload of ada's", partition=1), an_id("upload of grace's", partition=1)
    failed = {"status": "failed", "total_uploads": 1, "successful_uploads": 0, "failed_uploads": 1}
    doomed = an_id("doomed", partition=1)
    return [
        a_lane_claimed(),
        a_batch_created(GRACES, user_id=OTHER_USER, name="grace's own"),
        a_batch_created(ADAS, name="a secret of ada's", metadata={"secret": "of ada's"}),
        an_upload_queued(upload, ADAS, filename="secret.jpg"),
        a_batch_sealed(ADAS),
        an_upload_queued(other, GRACES, user_id=OTHER_USER),
        a_batch_cancelled(GRACES),
        an_upload_started(upload, ADAS, epoch=1),
        an_upload_failed(upload, ADAS, epoch=1),
        a_batch_completed(ADAS, epoch=1, **failed),
        an_upload_retried(upload, ADAS),
        a_lane_claimed(after=1, worker_id="worker-2"),
        a_lane_claimed(after=1, worker_id="worker-3"),
        an_upload_started(upload, ADAS, attempt=2, epoch=1),
        an_upload_started(upload, ADAS, attempt=2, epoch=12),
        an_upload_succeeded(upload, ADAS, attempt=2, epoch=12),
        a_batch_completed(ADAS, epoch=12),
        NewRecord(key=ADAS.encode(), value=b'{"a secret": "of ada\'s"', headers=(("ce_type", b"unknown"),)),
        an_upload_started(other, GRACES, epoch=12),
        a_batch_created(doomed),
        a_batch_deleted(doomed),
    ]


async def killed(what: str, kafka: str, topic: str, folder: Path, *, partition: int, nth: int) -> None:
    """Export or import in a process of its own, which is killed in front of its Nth segment or record batch."""
    command = (sys.executable, "-m", "tests.archives", what, kafka, topic, str(folder), str(partition), str(nth))
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    assert await process.wait() == -signal.SIGKILL


async def _main(what: str, kafka: str, topic: str, folder: str, partition: str, nth: str) -> None:
    if what == "export":
        _die_at(Folder, "put", int(nth), lambda name: name.startswith(f"segments/{partition}/"))
    else:
        _die_at(Restoration, "append", int(nth), lambda records: records[0].partition == int(partition))
    async with a_topic(kafka, topic) as archived:
        await (archived.exported(Path(folder)) if what == "export" else archived.imported(Path(folder)))


def _die_at(owner: type, name: str, nth: int, counts: Callable[[Any], bool]) -> None:
    real = getattr(owner, name)
    calls = iter(range(1, nth + 1))

    async def dying(self: object, first: Any, *more: object) -> None:
        if counts(first) and next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        await real(self, first, *more)

    setattr(owner, name, dying)


def names(folder: Path) -> Sequence[str]:
    """The segments' files."""
    return sorted(str(file.relative_to(folder)) for file in folder.glob("segments/*/*"))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
