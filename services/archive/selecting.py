"""What of a log goes into an archive: all of it, all but what a user's batches say, or one batch.

Every choice keeps the offsets, since facts name them: a worker's fact counts only under the epoch that is the offset
of its claim. What a slice leaves out is a gap, which an import fills with as many records that mean nothing; what an
erasure empties stays where it is, as `{"erased": true}` and its ids. An archive of either kind folds to the same state
of the batches that it keeps as the whole log does.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from schemas.events import BatchCreated, ByUser, Erased, Fact, LaneClaimed, decode
from schemas.ids import is_id, partition_of
from schemas.records import StoredRecord
from services.archive.manifest import ArchiveRefused, Kind

Scan = Callable[[int, int], AsyncIterator[list[StoredRecord]]]
"""The records of a partition, the first one argument, before an offset, the other, in groups."""


class Selection(Protocol):
    """What is kept. `of`: see `Manifest`."""

    kind: Kind
    of: str | None

    async def prepare(self, scan: Scan, ends: Mapping[int, int]) -> dict[int, int]:
        """Learn what must be known before the first record is taken, of a log that ends there; where to end."""

    def take(self, record: StoredRecord) -> StoredRecord | None:
        """The record as the archive has it; None where it leaves it out."""


class Whole:
    """Everything, as it is."""

    kind: Kind = "whole"
    of: str | None = None

    async def prepare(self, scan: Scan, ends: Mapping[int, int]) -> dict[int, int]:
        del scan
        return dict(ends)

    def take(self, record: StoredRecord) -> StoredRecord | None:
        return record


class Slice:
    """One batch: its facts, and of each partition the first record, of the batch's also all claims of its lane, up to
    the batch's last fact as of now."""

    kind: Kind = "slice"

    def __init__(self, batch_id: str) -> None:
        """Raises ArchiveRefused where that is no batch's id."""
        if not is_id(batch_id):
            raise ArchiveRefused(f"{batch_id[:80]!r} is not the id of a batch")
        self.of: str | None = batch_id
        self._partition = partition_of(batch_id)
        self._key = batch_id.encode()

    async def prepare(self, scan: Scan, ends: Mapping[int, int]) -> dict[int, int]:
        """Raises ArchiveRefused where the log has no fact of the batch."""
        last = 0
        if self._partition in ends:
            async for records in scan(self._partition, ends[self._partition]):
                last = max((record.offset for record in records if record.key == self._key), default=last)
        if not last:
            raise ArchiveRefused(f"the log has no batch {self.of}")
        return {partition: min(end, 1) for partition, end in ends.items()} | {self._partition: last + 1}

    def take(self, record: StoredRecord) -> StoredRecord | None:
        if record.offset == 0 or record.key == self._key:
            return record
        return record if _is_claim(record) else None


class Erasure:
    """Everything, but of all facts of one user's batches, and of what the user tried with other batches, only ids.

    A batch is its first maker's. Its facts are known by their key, so what cannot be decoded is emptied too.
    """

    kind: Kind = "erased"

    def __init__(self, user_id: str) -> None:
        self.of: str | None = hashlib.sha256(user_id.encode()).hexdigest()
        self._user_id = user_id
        self._keys: set[bytes] = set()

    async def prepare(self, scan: Scan, ends: Mapping[int, int]) -> dict[int, int]:
        """Find the user's batches. Raises ArchiveRefused where there is none."""
        for partition, end in ends.items():
            made: set[bytes] = set()
            async for records in scan(partition, end):
                for record in records:
                    if record.key is None or record.key in made or not _says(record, BatchCreated):
                        continue
                    fact = decode(record)
                    if isinstance(fact, Fact) and isinstance(fact.event, BatchCreated):
                        made.add(record.key)
                        if fact.event.user_id == self._user_id:
                            self._keys.add(record.key)
        if not self._keys:
            raise ArchiveRefused("the log has no batch of this user: nothing to erase")
        return dict(ends)

    def take(self, record: StoredRecord) -> StoredRecord | None:
        fact = decode(record)
        event = fact.event if isinstance(fact, Fact) else None
        theirs = isinstance(event, ByUser) and event.user_id == self._user_id
        if isinstance(event, Erased) or not (theirs or record.key in self._keys):
            return record
        return _emptied(record, fact if isinstance(fact, Fact) else None)


def _emptied(record: StoredRecord, fact: Fact | None) -> StoredRecord:
    """The record with nothing but its ids. One that cannot be decoded has the batch's id as key."""
    batch_id = (record.key or b"").decode() if fact is None else fact.batch_id
    ids = {"batch_id": batch_id} | ({"upload_id": fact.upload_id} if fact is not None and fact.upload_id else {})
    value = json.dumps({"erased": True, **ids}, separators=(",", ":")).encode()
    return StoredRecord(record.partition, record.offset, record.timestamp_ms, record.key, value, record.headers)


def _is_claim(record: StoredRecord) -> bool:
    return _says(record, LaneClaimed)


def _says(record: StoredRecord, model: type[BatchCreated | LaneClaimed]) -> bool:
    """Whether its header names this type of fact; cheaper than decoding all."""
    wanted = model.model_fields["type"].default.encode()
    return any(name == "ce_type" and value == wanted for name, value in record.headers)
