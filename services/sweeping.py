"""The sweep of the blob store: what nobody refers to goes into the trash, what is missing or damaged is reported.

Which blobs are wanted is what the read models say once they include the log's end as of the sweep's beginning; a blob
is let lie for a day before it counts as unwanted, so that none is taken whose fact is still to be appended. Blobs of
uploads that are named in a record nobody could decode are spared. What is wanted and lies in the trash is brought back.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from services.blobs import BlobMissing, BlobStore, Lying, Shelf
from services.database import Database
from services.eventlog import EventLog, records_at

CAUGHT_UP_TIMEOUT_S = 30.0
ROWS_AT_ONCE = 500
QUARANTINED_MAX = 1_000
_FIRST_ID = "00000000-0000-0000-0000-000000000000"
_COLUMNS = (
    "id, batch_id, filename, blob, size_bytes, sha256, status, attempts, "
    "coalesce(json_typeof(result->'thumbnail') = 'object', false) AS has_thumbnail"
)


class SweepRefused(Exception):  # noqa: N818  # reads as what happened
    """It cannot be told which blobs are wanted; nothing was touched. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is wanted and is not there as it should be. `problem`: `missing` or `damaged`, and how."""

    upload_id: str
    batch_id: str
    filename: str
    problem: str
    detail: str


@dataclass(slots=True)
class Report:
    """What a sweep found and did so far. `young`: unwanted, but not old enough yet; `checked`: files looked into."""

    dry_run: bool
    step: str = "waiting for the read models"
    blobs: int = 0
    bytes: int = 0
    young: int = 0
    spared: int = 0
    discarded: list[str] = field(default_factory=list)
    discarded_bytes: int = 0
    emptied: int = 0
    uploads: int = 0
    uploads_in_all: int | None = None
    brought_back: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeper:
    """One sweep. `age_s`: how old an unwanted blob must be; `trash_s`: how long it stays in the trash then;
    `contents`: whether bytes are read and compared, or their number only."""

    log: EventLog
    database: Database
    store: BlobStore
    age_s: float
    trash_s: float
    dry_run: bool
    contents: bool
    on_step: Callable[[Report], None]

    async def run(self) -> Report:
        """Sweep; raises SweepRefused, and what log, database and blob store raise where they are away."""
        now_s = time.time()
        report = Report(dry_run=self.dry_run)
        shelf = self.store.shelf()
        self.on_step(report)
        await self._caught_up()
        await self._discard_unwanted(shelf, report, now_s=now_s)
        await self._check_wanted(shelf, report)
        if not self.dry_run:
            report.emptied = await shelf.empty_trash(before_s=now_s - self.trash_s)
        report.step = "done"
        self.on_step(report)
        return report

    async def _caught_up(self) -> None:
        """Return when the read models include what the log holds now. Raises SweepRefused."""
        log_id, found = await self.log.identify(), await self.log.inspect()
        if log_id is None or found is None:
            raise SweepRefused(f"there is no log {self.log.settings.topic}: is this the Kafka of this blob store?")
        reader = self.log.reader(range(found.partitions))
        try:
            ends = await reader.ends()
        finally:
            await reader.close()
        projected, lost = asyncio.Event(), asyncio.Event()
        connection = await self.database.listen(lambda _partition, _offset: projected.set(), lost)
        try:
            async with asyncio.timeout(CAUGHT_UP_TIMEOUT_S):
                while await self._behind(log_id, ends):
                    await projected.wait()
                    projected.clear()
        except TimeoutError:
            raise SweepRefused(
                f"after {CAUGHT_UP_TIMEOUT_S:.0f} s the read models still lack facts of the log, so it cannot be told "
                f"which blobs are wanted: is the processor of every lane running?"
            ) from None
        finally:
            await connection.close()

    async def _behind(self, log_id: str, ends: dict[int, int]) -> bool:
        lanes = await self.database.positions()
        if any(lane.log_id != log_id for lane in lanes.values()):
            raise SweepRefused(
                "the read models are of another log than the one in Kafka: check SLUICE_DATABASE_URL and "
                "SLUICE_KAFKA_BOOTSTRAP_SERVERS"
            )
        return any(number not in lanes or lanes[number].next_offset < end for number, end in ends.items())

    async def _discard_unwanted(self, shelf: Shelf, report: Report, *, now_s: float) -> None:
        report.step = "looking for blobs that nobody refers to"
        undecoded = await self._undecoded()
        async for lying in shelf.lying():
            report.blobs += len(lying)
            report.bytes += sum(each.size_bytes for each in lying)
            wanted = await self._uploads({each.upload_id for each in lying})
            for upload_id, group in groupby(lying, key=lambda each: each.upload_id):
                for each in unwanted(list(group), wanted.get(upload_id)):
                    if any(upload_id.encode() in value for value in undecoded):
                        report.spared += 1
                    elif each.written_s > now_s - self.age_s:
                        report.young += 1
                    else:
                        await self._discard(shelf, each, report, now_s=now_s)
            self.on_step(report)

    async def _discard(self, shelf: Shelf, each: Lying, report: Report, *, now_s: float) -> None:
        if not self.dry_run:
            await shelf.discard(each.name, sweep_s=int(now_s))
        report.discarded.append(each.name)
        report.discarded_bytes += each.size_bytes

    async def _check_wanted(self, shelf: Shelf, report: Report) -> None:
        report.step = "checking the files that are wanted"
        (counted,) = await self.database.read("SELECT count(*) AS uploads FROM {generation}.uploads")
        report.uploads_in_all = counted["uploads"]
        suspects: list[Fault] = []
        async for uploads in self._all_uploads():
            for upload in uploads:
                suspects += await self._faults(shelf, upload, report)
                report.uploads += 1
            self.on_step(report)
        if suspects:  # a batch may have been deleted meanwhile, its files before its rows
            await self._caught_up()
            still = await self._uploads({fault.upload_id for fault in suspects})
            report.faults = [fault for fault in suspects if fault.upload_id in still]

    async def _faults(self, shelf: Shelf, upload: Any, report: Report) -> list[Fault]:
        """What is wrong with the bytes of an upload and of its thumbnail."""
        problems: list[tuple[str, str]] = []
        size_bytes = await shelf.size(upload["blob"])
        if size_bytes is None and not self.dry_run and await shelf.bring_back(upload["blob"]):
            report.brought_back.append(upload["blob"])
            size_bytes = await shelf.size(upload["blob"])
        if size_bytes is None:
            problems.append(("missing", "its bytes are not in the blob store"))
        elif size_bytes != upload["size_bytes"]:
            problems.append(("damaged", f"it holds {size_bytes} bytes instead of {upload['size_bytes']}"))
        elif self.contents and await shelf.sha256(upload["blob"]) != upload["sha256"]:
            problems.append(("damaged", "its bytes are not those that were sent: their SHA-256 is another one"))
        if upload["status"] == "completed" and upload["has_thumbnail"]:
            try:
                await self.store.thumbnail(upload["id"], attempt=upload["attempts"])
            except BlobMissing:
                problems.append(("missing", "its thumbnail is not in the blob store"))
        return [Fault(upload["id"], upload["batch_id"], upload["filename"], *problem) for problem in problems]

    async def _uploads(self, upload_ids: Iterable[str]) -> dict[str, Any]:
        rows = await self.database.read(
            f"SELECT {_COLUMNS} FROM {{generation}}.uploads WHERE id = ANY($1)",  # noqa: S608  # the names are ours
            list(upload_ids),
        )
        return {row["id"]: row for row in rows}

    async def _all_uploads(self) -> AsyncIterator[list[Any]]:
        last_id = _FIRST_ID
        while rows := await self.database.read(
            f"SELECT {_COLUMNS} FROM {{generation}}.uploads WHERE id > $1 ORDER BY id LIMIT $2",  # noqa: S608  # ours
            last_id,
            ROWS_AT_ONCE,
        ):
            yield rows
            last_id = rows[-1]["id"]

    async def _undecoded(self) -> list[bytes]:
        """The values of the records in quarantine. Raises SweepRefused where they are too many to look into."""
        rows = await self.database.read(
            "SELECT partition, record_offset FROM sluice_ops.quarantine WHERE log_id = $1 LIMIT $2",
            await self.log.identify(),
            QUARANTINED_MAX + 1,
        )
        if len(rows) > QUARANTINED_MAX:
            raise SweepRefused(f"more than {QUARANTINED_MAX} records are in quarantine: mend that first")
        places = [(row["partition"], row["record_offset"]) for row in rows]
        async with aclosing(records_at(self.log, places)) as records:
            return [record.value async for record in records if record.value is not None]


def unwanted(lying: Sequence[Lying], upload: Any) -> list[Lying]:
    """Of what lies under one upload's name, what nobody refers to: all but its file and its newest thumbnail.

    `upload`: its row (`blob`, `status`, `attempts`), None where there is no such upload (any more).
    """
    if upload is None:
        return list(lying)
    wanted = {upload["blob"]}
    epochs = {
        each.thumbnail_of[0]: each.name
        for each in lying
        if each.thumbnail_of is not None and each.thumbnail_of[1] == upload["attempts"]
    }
    if upload["status"] == "completed" and epochs:
        wanted.add(epochs[max(epochs)])
    return [each for each in lying if each.name not in wanted]
