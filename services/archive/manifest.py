"""What an archive says of itself: which log it is of, what of it, and each segment with its checksum.

It is written anew after each segment, so what it names is there whole; it is finished when the segments of each
partition reach the end that it promises. Nobody's name stands in it: of an erased user only the digest.
"""

import hashlib
from typing import Literal

import zstandard
from pydantic import BaseModel, ConfigDict, ValidationError

from services.archive.places import Place

MANIFEST = "manifest.json"
Kind = Literal["whole", "slice", "erased"]


class ArchiveRefused(Exception):  # noqa: N818  # reads as what happened
    """The archive, or the log, cannot be used for what was asked; the message says why and what to do."""


class Segment(BaseModel):
    """A file of lines, one after another without a gap in their offsets; `sha256` and `size_bytes` are the file's."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str
    partition: int
    first_offset: int
    last_offset: int
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """`of`: the batch of a slice, or the digest of the user who was erased. `ends`: partition → the next offset of the
    log as of the first export into this archive (of a slice: where it ends), and from when that is finished, where its
    segments end. `exported_at` is informational."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    format: Literal["sluice-log-1"] = "sluice-log-1"
    log_id: str
    kind: Kind = "whole"
    of: str | None = None
    exported_at: str
    ends: dict[int, int]
    segments: tuple[Segment, ...] = ()

    def of_partition(self, partition: int) -> list[Segment]:
        return [segment for segment in self.segments if segment.partition == partition]

    def reached(self, partition: int) -> int:
        """The next offset after the partition's segments."""
        return max((segment.last_offset + 1 for segment in self.of_partition(partition)), default=0)

    @property
    def finished(self) -> bool:
        return all(self.reached(partition) == end for partition, end in self.ends.items())

    @property
    def records(self) -> int:
        """How many offsets it spans, over all partitions."""
        return sum(self.ends.values())

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)

    def first_break(self) -> str | None:
        """A sentence on a place where segments do not follow each other; None where all do."""
        for partition in self.ends:
            expected = 0
            for segment in self.of_partition(partition):
                if segment.first_offset != expected or segment.last_offset < segment.first_offset:
                    return f"{segment.name} does not begin at offset {expected} of partition {partition}"
                expected = segment.last_offset + 1
        return None


async def load(place: Place) -> Manifest | None:
    """The manifest of an archive, None where there is none. Raises ArchiveRefused, PlaceUnavailable."""
    text = await place.get(MANIFEST)
    if text is None:
        return None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or MANIFEST
        raise ArchiveRefused(
            f"{place}/{MANIFEST} is not the manifest of a log's export ({where}: {first['msg']}): name another folder"
        ) from None
    if broken := manifest.first_break():
        raise ArchiveRefused(f"{place}/{MANIFEST} is damaged, {broken}: export anew into an empty folder")
    return manifest


async def save(place: Place, manifest: Manifest) -> None:
    """Put it in the place of the one before. Raises PlaceUnavailable."""
    await place.put(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")


async def checked(place: Place, segment: Segment) -> bytes:
    """The bytes of a segment that is as it was written. Raises ArchiveRefused with its name, PlaceUnavailable."""
    data = await place.get(segment.name)
    if data is None:
        raise ArchiveRefused(f"{place}/{segment.name} is missing: restore it, or export anew")
    if len(data) != segment.size_bytes or hashlib.sha256(data).hexdigest() != segment.sha256:
        raise ArchiveRefused(
            f"{place}/{segment.name} is damaged: it has {len(data)} bytes (written were {segment.size_bytes}) and does "
            "not fit its SHA-256: restore it from another copy, or export anew"
        )
    return data


def unpacked(data: bytes) -> list[bytes]:
    """The lines of a segment; raises zstandard.ZstdError."""
    return zstandard.ZstdDecompressor().decompress(data).split(b"\n")[:-1]


def malformed(segment: Segment, what: str, *, mend: str = "export anew") -> ArchiveRefused:
    """What is said of a segment that is as it was written, and should never have been written so."""
    return ArchiveRefused(f"{segment.name} fits its SHA-256 and is no segment all the same ({what}): {mend}")
