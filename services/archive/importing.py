"""Writing an archive into an empty topic, which then is a log of its own: the same facts at the same positions.

Record 0 of each partition is made anew: a LogCreated with a new log id and the logs it comes from. The gaps of a slice
are filled with LogCreated records: anywhere but at offset 0 they mean nothing, and every reader ignores them.
Partitions are written from the last to the first. As long as one is missing, every service refuses the log: partition 0
is empty, or ends below what its own first record names. So an import that was interrupted is run again, and goes on.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

import zstandard

from schemas.events import Envelope, LogCreated, encode
from schemas.ids import derived_id
from schemas.position import Position
from schemas.records import StoredRecord
from services.archive.exporting import OnProgress, Progress
from services.archive.lines import DamagedLineError, Gap, Item, read
from services.archive.manifest import ArchiveRefused, Manifest, Segment, checked, load, malformed, unpacked
from services.archive.places import Place
from services.eventlog import EventLog, LogRefused, records_between
from services.eventlog.identity import imported_created, log_created, random_log_id
from services.eventlog.restoring import Restoration, size_of

GROUP_BYTES_MAX = 1024 * 1024
GROUP_RECORDS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Imported:
    """`written`: how many records this run wrote; 0 where all was there already."""

    log_id: str
    previous_log_id: str
    partitions: int
    records: int
    written: int


@dataclass(slots=True)
class Importer:
    """One import from `place` into the topic of `log`."""

    log: EventLog
    place: Place
    on_progress: OnProgress
    replication_factor: int = 1
    fsync: bool = False
    group_bytes_max: int = GROUP_BYTES_MAX
    _log_id: str = ""
    _filler: tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...]] = (None, None, ())
    _ends: dict[int, int] = field(default_factory=dict)

    async def run(self) -> Imported:
        """Import, or go on with an import of this archive. Raises ArchiveRefused, PlaceUnavailable, LogError."""
        manifest = await self._sound()
        # An archive of a log with a widened partition that nobody had written to yet leaves that to the first start.
        present = {partition: end for partition, end in manifest.ends.items() if end}
        await self._look(manifest, present)
        written = sum(end - self._ends.get(partition, 0) for partition, end in present.items())
        found = await self.log.inspect()
        if written or found is None or found.complaint is not None:
            opened = Restoration.open(
                self.log.settings, partitions=len(manifest.ends), replication_factor=self.replication_factor
            )
            async with opened as topic:
                for partition in sorted(present, reverse=True):
                    await self._restore(topic, manifest, partition)
                await topic.settle(fsync=self.fsync)
        return Imported(self._log_id, manifest.log_id, len(manifest.ends), manifest.records, written)

    async def _sound(self) -> Manifest:
        """The manifest of an archive that is finished and undamaged."""
        manifest = await load(self.place)
        if manifest is None:
            raise ArchiveRefused(f"{self.place} holds no export of a log: there is no manifest.json")
        if not manifest.finished:
            raise ArchiveRefused(f"the export in {self.place} is unfinished: run `sluice log export` there again")
        if not manifest.ends.get(0):
            raise ArchiveRefused(f"the export in {self.place} has no partition 0: export anew")
        checked_bytes = 0
        for segment in manifest.segments:
            await checked(self.place, segment)
            checked_bytes += segment.size_bytes
            self.on_progress(Progress("checking", checked_bytes, manifest.size_bytes, "bytes"))
        return manifest

    async def _look(self, manifest: Manifest, present: dict[int, int]) -> None:
        """What the topic holds: nothing, or the beginning of an import of this very archive."""
        topic = self.log.settings.topic
        found = await self.log.inspect()
        firsts: dict[int, StoredRecord] = {}
        if found is not None:
            reader = self.log.reader(range(found.partitions))
            try:
                self._ends = await reader.ends()
                firsts = {p: first for p in self._ends if (first := await reader.first(p)) is not None}
            finally:
                await reader.close()
        for partition, first in sorted(firsts.items()):
            created = self._import_of(first, manifest) if partition in present else None
            if created is None or self._ends[partition] > present[partition]:
                raise ArchiveRefused(
                    f"the topic {topic} of Kafka at {self.log.settings.bootstrap_servers} is not empty: partition "
                    f"{partition} has {self._ends[partition]} records that no import of {self.place} as it is now "
                    "wrote. Name another topic with SLUICE_LOG_TOPIC, or import into a Kafka without one"
                )
            self._log_id = created.log_id
        self._log_id = self._log_id or _another_log_id(manifest.log_id)
        self._filler = _filler(self._log_id)

    def _import_of(self, first: StoredRecord, manifest: Manifest) -> LogCreated | None:
        """The first record of a partition, if an import of this archive as it is now wrote it."""
        try:
            created = log_created(first, topic=self.log.settings.topic)
        except LogRefused:
            return None
        expected = (manifest.log_id, manifest.ends[first.partition])
        *_, newest = created.previous or (None,)
        return created if newest is not None and (newest.log_id, newest.next_offset) == expected else None

    async def _restore(self, topic: Restoration, manifest: Manifest, partition: int) -> None:
        """Write what is missing of a partition, record 0 alone: it says what the rest is."""
        done = sum(end for number, end in manifest.ends.items() if number > partition)
        begin = self._ends.get(partition, 0)
        await self._compare_last(manifest, partition, begin)
        group: list[StoredRecord] = []
        group_bytes = 0
        async with aclosing(self._records(manifest, partition, begin)) as records:
            async for record in records:
                size_bytes = size_of(record)
                full = group_bytes + size_bytes > self.group_bytes_max or len(group) >= GROUP_RECORDS_MAX
                if group and (full or group[-1].offset == 0):
                    await topic.append(group)
                    self.on_progress(Progress("importing", done + record.offset, manifest.records))
                    group, group_bytes = [], 0
                group.append(record)
                group_bytes += size_bytes
        if group:
            await topic.append(group)
        self.on_progress(Progress("importing", done + manifest.ends[partition], manifest.records))

    async def _compare_last(self, manifest: Manifest, partition: int, end: int) -> None:
        """The last record that an earlier run wrote must be the one that the archive has there."""
        if end == 0:
            return
        async with aclosing(self._records(manifest, partition, end - 1)) as records:
            expected = await anext(records)
        async with aclosing(records_between(self.log, partition, end - 1, end)) as groups:
            ((found,),) = [records async for records in groups]
        if found != expected:
            raise ArchiveRefused(
                f"{self.log.settings.topic}/{partition} has another record at offset {end - 1} than {self.place}: "
                "somebody else wrote there; delete the topic and begin the import anew"
            )

    async def _records(self, manifest: Manifest, partition: int, begin: int) -> AsyncGenerator[StoredRecord]:
        """The records of a partition from an offset on, as they are to be written."""
        for segment in manifest.of_partition(partition):
            if segment.last_offset < begin:
                continue
            for item in _items(segment, await self._lines(segment)):
                for record in self._filled(item, begin):
                    yield record if record.offset else self._first(record, manifest)

    def _filled(self, item: Item, begin: int) -> Iterator[StoredRecord]:
        if isinstance(item, StoredRecord):
            if item.offset >= begin:
                yield item
            return
        for offset in range(max(begin, item.first), item.last + 1):
            yield StoredRecord(item.partition, offset, item.timestamp_ms, *self._filler)

    def _first(self, record: StoredRecord, manifest: Manifest) -> StoredRecord:
        return imported_created(
            record,
            topic=str(self.place),
            log_id=self._log_id,
            previous_log_id=manifest.log_id,
            next_offset=manifest.ends[record.partition],
        )

    async def _lines(self, segment: Segment) -> list[bytes]:
        data = await checked(self.place, segment)
        try:
            return await asyncio.to_thread(unpacked, data)
        except zstandard.ZstdError as error:
            raise malformed(segment, str(error)) from error


def _items(segment: Segment, lines: list[bytes]) -> Iterator[Item]:
    """What the lines of a segment say. Raises ArchiveRefused where they are not what the manifest promises."""
    expected = segment.first_offset
    for line in lines:
        try:
            item = read(line, segment.partition)
        except DamagedLineError as error:
            raise malformed(segment, str(error)) from error
        first, last = (item.first, item.last) if isinstance(item, Gap) else (item.offset, item.offset)
        if first != expected or last < first:
            raise malformed(segment, f"offset {first} stands where {expected} should")
        expected = last + 1
        yield item
    if expected != segment.last_offset + 1:
        raise malformed(segment, f"it ends before offset {expected}, not after {segment.last_offset}")


def _another_log_id(previous: str) -> str:
    """A new log id whose positions do not look like those of the log it is imported from."""
    while Position.of(log_id := random_log_id(), {}).log == Position.of(previous, {}).log:
        pass
    return log_id


def _filler(log_id: str) -> tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...]]:
    """Key, value and headers of a record that means nothing, and tells nobody anything."""
    envelope = Envelope(id=derived_id(log_id, "filler", partition=0), source="sluice/import", time="")
    record = encode(LogCreated(log_id=log_id), envelope)
    return record.key, record.value, record.headers
