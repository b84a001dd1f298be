"""What the rest of Sluice knows of the log: its errors, its settings and the shapes of reader and writer.

Kafka and the in-memory log of the tests both have these shapes, and one suite runs on both. Offsets of a partition
begin at 0 and have no gaps; records appended together stand together. Nothing here waits without a bound: each call
says how long, or `LogSettings` does. How Kafka does it stands beside this file, in `reading`, `writing` and `topics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from schemas.errors import PartError
from schemas.events import LOG_TOPIC, PROGRESS_TOPIC, PreviousLog
from schemas.position import Position
from schemas.records import NewRecord, StoredRecord

MESSAGE_BYTES_MAX = 8 * 1024 * 1024
_BATCH_FRAMING_BYTES = 1024
GROUP_BYTES_MAX = MESSAGE_BYTES_MAX - _BATCH_FRAMING_BYTES


class LogError(PartError):
    """Something about the log; the message says what was found and what to do."""


class LogUnavailable(LogError):  # noqa: N818  # a state that passes by itself, and the name callers read
    """Kafka gives no answer. Nothing of this call was written; the same call may be tried again."""


class LogOutcomeUnknown(LogError):  # noqa: N818  # a state, not a mistake
    """Sent, but no answer came: the records may have landed, or may yet land, later than newer ones."""


class RecordTooLarge(LogError):  # noqa: N818  # reads as what happened
    """The records do not fit into one record batch; nothing was sent."""


class LogRefused(LogError):  # noqa: N818  # reads as what happened
    """The log cannot be used as it is: wrong settings, a gap, an end that is missing, another log. A person decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """Where the log is, and the bounds of every wait and queue.

    `request_timeout_ms`: how long one question to Kafka may take. `silence_ms_max`: how long a reader hears nothing
    before it says LogUnavailable. `append_stuck_s`: when a batch that was sent is given up (its outcome is unknown)
    and the producer with it. `joined_bytes_max`: groups are joined into one record batch up to this size.
    """

    bootstrap_servers: str
    topic: str = LOG_TOPIC
    progress_topic: str = PROGRESS_TOPIC
    client_id: str = "sluice"
    request_timeout_ms: int = 5_000
    silence_ms_max: int = 3_000
    reconnect_backoff_ms: int = 200
    append_stuck_s: float = 30.0
    close_timeout_s: float = 5.0
    queue_groups_max: int = 1_000
    joined_bytes_max: int = 1024 * 1024
    progress_queue_records_max: int = 1_000


@dataclass(frozen=True, slots=True)
class PartitionBounds:
    """`start`: the first offset still there (0, or the log was cut); `end`: the offset the next record gets."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """`previous`: partition → the logs it was imported from, whose positions below `next_offset` are still valid."""

    log_id: str
    previous: Mapping[int, tuple[PreviousLog, ...]] = field(default_factory=dict)

    def here(self, position: Position) -> Position:
        """The position as one of this log, if it is of a log that this one was imported from and lies below where that
        one ended; any other as it is, so that who reads it sees that it is not of this log."""
        if position.log == Position.of(self.log_id, {}).log or not position.offsets:
            return position
        if all(self._was_imported(position.log, partition, offset) for partition, offset in position.offsets):
            return Position.of(self.log_id, dict(position.offsets))
        return position

    def _was_imported(self, log: str, partition: int, offset: int) -> bool:
        return any(
            Position.of(each.log_id, {}).log == log and offset < each.next_offset
            for each in self.previous.get(partition, ())
        )


class LogReader(Protocol):
    """One reader of a set of partitions. Records are pulled; where to go on from is the caller's to keep."""

    @property
    def partitions(self) -> tuple[int, ...]: ...

    @property
    def silent_ms(self) -> float:
        """How long the quietest partition's broker has answered nothing, counted while `read` was waiting."""
        ...

    async def first(self, partition: int) -> StoredRecord | None:
        """The record at offset 0, None in an empty partition. Where reading stands does not move by it.

        Raises LogRefused where the partition was cut at its start, LogUnavailable.
        """
        ...

    async def seek(self, partition: int, offset: int) -> None:
        """The next record read of this partition is the one at `offset` (the log's end is allowed).

        Raises LogRefused where the log does not reach that offset or was cut at its start, LogUnavailable.
        """
        ...

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        """The next records, in order within each partition; as soon as there are any; none after `timeout_ms`.

        Every partition must have been sought. Raises LogRefused on a gap, a wrong checksum or an offset the log does
        not have (and again on the next call, until the partition is sought anew); LogUnavailable when Kafka was silent
        for longer than `silence_ms_max` (the reader goes on where it was as soon as Kafka is back). What is read when
        a call is cancelled is read again by the next one.
        """
        ...

    async def ends(self) -> dict[int, int]:
        """The next offset per partition, asked from Kafka now. Raises LogUnavailable."""
        ...

    async def close(self) -> None: ...


class LogWriter(Protocol):
    """Appends groups of records: each whole or not at all, its records side by side."""

    async def append(self, partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        """The offset of the first record; the others follow it without a gap.

        Raises RecordTooLarge (nothing was sent), LogUnavailable (nothing was sent within `timeout_s`, or the writer is
        closed), LogOutcomeUnknown (sent and not answered), LogRefused (Kafka said no).
        """
        ...

    async def close(self) -> None:
        """Take nothing more and wait for what is queued, within `close_timeout_s`; the rest fails as append says."""
        ...


class ProgressReader(Protocol):
    """Reads the progress topic from its end as of the first read. Gaps mean nothing here."""

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        """What came, none after `timeout_ms`. Never raises because Kafka is away: there is then no progress."""
        ...

    async def close(self) -> None: ...


class Log(Protocol):
    """An opened log. Readers and writers are made here and end with it at the latest."""

    @property
    def settings(self) -> LogSettings: ...

    async def check_version(self) -> str:
        """The release of Kafka, as far as it can be told. Raises LogRefused when it is too old."""
        ...

    async def ensure_topics(self, *, partitions: int, replication_factor: int = 1, fsync: bool = False) -> None:
        """Create what is missing, add partitions that are missing, check the settings of what is there.

        Raises LogRefused when the log's topic could lose facts, or has more partitions than asked for.
        """
        ...

    async def ensure_created(self, *, partitions: int, source: str) -> LogIdentity:
        """Which log this is: the LogCreated of every partition, written where one is empty, and read back.

        From then on every reader checks, whenever it connects, that it is this log. `source`: the CloudEvents source
        of what is written. Raises LogRefused where a first record is something else or of another log, or where an
        import is unfinished; LogUnavailable.
        """
        ...

    def reader(self, partitions: Sequence[int]) -> LogReader: ...

    def writer(self) -> LogWriter: ...

    def publish_progress(self, partition: int, record: NewRecord) -> None:
        """Send a record to the progress topic some time, or drop it: never waits and never raises."""
        ...

    def progress_reader(self, partitions: Sequence[int]) -> ProgressReader: ...


def check_size(records: Sequence[NewRecord]) -> int:
    """The size of a group in bytes, before compression and rounded up; raises RecordTooLarge."""
    size_bytes = sum(record.size_bytes for record in records)
    if size_bytes > GROUP_BYTES_MAX:
        raise RecordTooLarge(
            f"{len(records)} records of together {size_bytes} bytes do not fit into one record batch of "
            f"{GROUP_BYTES_MAX} bytes: append fewer at once"
        )
    return size_bytes


def not_there(place: str, offset: int, bounds: PartitionBounds) -> LogRefused | None:
    """Why reading cannot begin at `offset`, or None. `place` names topic and partition."""
    if bounds.start > 0:
        return LogRefused(
            f"{place} begins at offset {bounds.start}, so its first facts are gone: bring the log back from an export "
            "with `sluice log import`"
        )
    if not 0 <= offset <= bounds.end:
        return LogRefused(
            f"{place} ends at offset {bounds.end}, but {offset} was asked for, so this is not the log that was read "
            "before or its end was lost: bring it back with `sluice log import`, or rebuild the read models from the "
            "log as it is with `sluice replay`"
        )
    return None
