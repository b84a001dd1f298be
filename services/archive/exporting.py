"""Writing a log, or a part of it, into an archive, while the log is in use.

What was there when the export began is exported. Run again, it checks what is there and goes on after the last whole
segment of each partition, up to the log's end as of now: so an interrupted export is finished, and a finished one
brought up to date. It goes on only where the log still has the last record that the archive has. The segment goes first
and then the manifest that names it, so a kill loses one segment at most. A finished archive stays one all the while:
the ends it promises move on only with the segments that reach them.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

import zstandard

from schemas.records import StoredRecord
from services.archive.lines import DamagedLineError, Gap, Item, read, written
from services.archive.manifest import ArchiveRefused, Manifest, Segment, checked, load, malformed, save, unpacked
from services.archive.places import Place
from services.archive.selecting import Selection
from services.eventlog import EventLog, records_between

SEGMENT_BYTES_MAX = 32 * 1024 * 1024
"""Of lines before compression: what is held in memory, and what a kill loses at most."""
LEVEL = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is, `done` of so many records or bytes."""

    step: str
    done: int
    of: int
    unit: Literal["records", "bytes"] = "records"


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Exporter:
    """One export of `log` to `place`."""

    log: EventLog
    place: Place
    selection: Selection
    on_progress: OnProgress
    segment_bytes_max: int = SEGMENT_BYTES_MAX

    async def run(self) -> Manifest:
        """Export; the manifest of the finished archive. Raises ArchiveRefused, PlaceUnavailable, LogError."""
        found = await self.log.inspect()
        log_id = None if found is None else await self.log.identify()
        if log_id is None or found is None:
            raise ArchiveRefused(f"there is no log {self.log.settings.topic} yet: nothing to export")
        reader = self.log.reader(range(found.partitions))
        try:
            ends = await reader.ends()
        finally:
            await reader.close()
        manifest = await self._begun(log_id, ends)
        wanted = await self.selection.prepare(self._scan, ends)
        promised = wanted
        if manifest.ends and manifest.finished:  # a partition that is new to it is one without records at first
            promised = dict.fromkeys(wanted, 0) | manifest.ends
        manifest = manifest.model_copy(update={"ends": promised, "exported_at": datetime.now(UTC).isoformat()})
        await save(self.place, manifest)
        for partition in sorted(wanted):
            manifest = await self._export(manifest, partition, wanted)
        return manifest

    async def _begun(self, log_id: str, ends: dict[int, int]) -> Manifest:
        """What the place holds already, as far as it is whole, or a new manifest."""
        kind, of = self.selection.kind, self.selection.of
        manifest = await load(self.place)
        if manifest is None:
            return Manifest(log_id=log_id, kind=kind, of=of, exported_at="", ends={})
        if (manifest.log_id, manifest.kind, manifest.of) != (log_id, kind, of):
            raise ArchiveRefused(
                f"{self.place} holds another export ({manifest.kind}, of the log {manifest.log_id}; this one is "
                f"{kind}, of the log {log_id}): name another folder"
            )
        for partition in manifest.ends:
            if manifest.reached(partition) > ends.get(partition, 0):
                raise ArchiveRefused(
                    f"partition {partition} of the log ends at {ends.get(partition, 0)}, but {self.place} holds "
                    f"records up to {manifest.reached(partition) - 1}: the log lost its end; keep this export, and "
                    "import it"
                )
        manifest = manifest.model_copy(update={"segments": await self._whole(manifest)})
        for partition in manifest.ends:
            await self._compare_last(manifest, partition)
        return manifest

    async def _whole(self, manifest: Manifest) -> tuple[Segment, ...]:
        """The segments that are as they were written; those of a partition from the first damaged one on are exported
        again, since the log still has what they held."""
        whole: list[Segment] = []
        broken: set[int] = set()
        read_bytes = 0
        for segment in manifest.segments:
            read_bytes += segment.size_bytes
            self.on_progress(Progress("checking what is there", read_bytes, manifest.size_bytes, "bytes"))
            if segment.partition in broken:
                continue
            try:
                await checked(self.place, segment)
            except ArchiveRefused:
                broken.add(segment.partition)
            else:
                whole.append(segment)
        return tuple(whole)

    async def _compare_last(self, manifest: Manifest, partition: int) -> None:
        """The last record of a partition that the place holds must be the one that the log has there: a log that lost
        its end and grew again tells another past from there on, under the same log id."""
        if not (segments := manifest.of_partition(partition)):
            return
        held = await asyncio.to_thread(_last_record, await checked(self.place, segments[-1]), segments[-1])
        if held is None:
            return
        async with aclosing(records_between(self.log, partition, held.offset, held.offset + 1)) as groups:
            ((found,),) = [records async for records in groups]
        if self.selection.kind == "erased":  # values may be emptied; key, headers and time never are
            held, found = replace(held, value=None), replace(found, value=None)
        if found != held:
            raise ArchiveRefused(
                f"partition {partition} of the log has another record at offset {held.offset} than {self.place}: the "
                "log lost its end and grew again since that was exported; keep this export, it has what was lost, and "
                "export into another folder"
            )

    async def _export(self, manifest: Manifest, partition: int, wanted: Mapping[int, int]) -> Manifest:
        """What is missing of a partition up to the end that is wanted, segment by segment."""
        end, before = wanted[partition], sum(wanted[p] for p in wanted if p < partition)
        lines = _Lines(partition, manifest.reached(partition))
        async with aclosing(records_between(self.log, partition, lines.next_offset, end)) as groups:
            async for records in groups:
                for record in records:
                    lines.add(record, self.selection.take(record))
                    if lines.size_bytes >= self.segment_bytes_max:
                        manifest = await self._finish(manifest, lines)
                self.on_progress(Progress("exporting", before + lines.next_offset, sum(wanted.values())))
        return await self._finish(manifest, lines) if lines.begun else manifest

    async def _finish(self, manifest: Manifest, lines: "_Lines") -> Manifest:
        """The lines so far as a segment, which the manifest names from now on."""
        first, last = lines.first_offset, lines.next_offset - 1
        data = await asyncio.to_thread(_packed, lines.taken())
        segment = Segment(
            name=f"segments/{lines.partition}/{first:020}.ndjson.zst",
            partition=lines.partition,
            first_offset=first,
            last_offset=last,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        await self.place.put(segment.name, data)
        ends = manifest.ends | {lines.partition: max(manifest.ends[lines.partition], last + 1)}
        manifest = manifest.model_copy(update={"ends": ends, "segments": (*manifest.segments, segment)})
        await save(self.place, manifest)
        return manifest

    async def _scan(self, partition: int, end: int) -> AsyncGenerator[list[StoredRecord]]:
        """A whole partition, for what must be known before the export."""
        async with aclosing(records_between(self.log, partition, 0, end)) as groups:
            async for records in groups:
                self.on_progress(Progress(f"looking through partition {partition}", records[-1].offset + 1, end))
                yield records


@dataclass(slots=True)
class _Lines:
    """The lines of the segment that is being written; `next_offset` belongs to the next record."""

    partition: int
    next_offset: int
    first_offset: int = field(init=False)
    size_bytes: int = 0
    _lines: list[bytes] = field(default_factory=list)
    _gap: Gap | None = None

    def __post_init__(self) -> None:
        self.first_offset = self.next_offset

    @property
    def begun(self) -> bool:
        return self.next_offset > self.first_offset

    def add(self, record: StoredRecord, kept: StoredRecord | None) -> None:
        """The next record; `kept`: as the archive has it, None where it leaves it out."""
        assert record.offset == self.next_offset, "the reader sees to it that offsets have no gap"
        self.next_offset += 1
        if kept is None:
            first = record.offset if self._gap is None else self._gap.first
            latest_ms = max(record.timestamp_ms, 0 if self._gap is None else self._gap.timestamp_ms)
            self._gap = Gap(self.partition, first, record.offset, latest_ms)
            return
        self._write_gap()
        self._write(kept)

    def taken(self) -> list[bytes]:
        """The lines; the next segment begins."""
        self._write_gap()
        lines, self._lines, self.size_bytes = self._lines, [], 0
        self.first_offset = self.next_offset
        return lines

    def _write_gap(self) -> None:
        if self._gap is not None:
            self._write(self._gap)
            self._gap = None

    def _write(self, item: Item) -> None:
        self._lines.append(written(item))
        self.size_bytes += len(self._lines[-1]) + 1


def _last_record(data: bytes, segment: Segment) -> StoredRecord | None:
    """The last record that a segment keeps; None where it keeps none. Raises ArchiveRefused."""
    try:
        items = (read(line, segment.partition) for line in reversed(unpacked(data)))
        return next((item for item in items if isinstance(item, StoredRecord)), None)
    except (zstandard.ZstdError, DamagedLineError) as error:
        raise malformed(segment, str(error), mend="export into another folder") from error


def _packed(lines: list[bytes]) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(b"\n".join(lines) + b"\n")
