"""Which log this is: the LogCreated at offset 0 of every partition.

Whoever finds a partition empty writes one; several may, and the one at offset 0 counts for all. Nothing else may be
appended before it was read back, so a crash between creating the topic and writing it is mended by the next start.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from schemas.events import Envelope, Fact, LogCreated, PreviousLog, decode, encode
from schemas.ids import derived_id, new_id
from schemas.records import NewRecord, StoredRecord
from services.eventlog.protocol import LogIdentity, LogOutcomeUnknown, LogReader, LogRefused, LogUnavailable, LogWriter

_ESTABLISH_TIMEOUT_S = 30.0
_APPEND_TIMEOUT_S = 10.0


async def establish(
    reader: LogReader, writer: LogWriter, *, topic: str, new_created: Callable[[str | None], NewRecord]
) -> LogIdentity:
    """The identity of a log, written where it is missing and read back for every partition.

    `new_created`: makes the record of a LogCreated, with a new log id or with that of partition 0. Raises LogRefused
    where a first record is something else or of another log, or where an import is unfinished; LogUnavailable.
    """
    if await _lacks_beginning(reader) and await _lacks_beginning(reader):
        raise LogRefused(
            f"{topic}/0 is empty and other partitions are not: it was lost, or an import is unfinished; run "
            "`sluice log import` again, which goes on with it, or begin anew in an empty topic"
        )
    created: dict[int, LogCreated] = {}
    try:
        async with asyncio.timeout(_ESTABLISH_TIMEOUT_S):
            for partition in sorted(reader.partitions):
                log_id = created[0].log_id if partition else None
                first = await _written(reader, writer, partition, new_created(log_id))
                created[partition] = log_created(first, topic=topic)
                check_log_id(first, topic=topic, log_id=created[0].log_id)
    except TimeoutError:
        raise LogUnavailable(
            f"{topic} did not get its first record in {_ESTABLISH_TIMEOUT_S:g} s: start again"
        ) from None
    _check_imports(created, await reader.ends(), topic)
    return identity_of(created)


def identity_of(created: Mapping[int, LogCreated]) -> LogIdentity:
    """What the first records of some partitions say."""
    any_of_them = next(iter(created.values()))
    return LogIdentity(any_of_them.log_id, {partition: each.previous or () for partition, each in created.items()})


def new_created(log_id: str | None, *, source: str) -> NewRecord:
    """The record of a LogCreated that begins a log, or another partition of the log `log_id`."""
    now_ms = time.time_ns() // 1_000_000
    envelope = Envelope(
        id=_random_id(now_ms), source=source, time=datetime.fromtimestamp(now_ms / 1000, UTC).isoformat()
    )
    return encode(LogCreated(log_id=log_id or random_log_id()), envelope)


def random_log_id() -> str:
    """A log's id. A position shows its first eight digits, so these are random: in a version 7 UUID they are a time,
    and logs made within a minute would look alike."""
    return derived_id("log", os.urandom(16).hex(), partition=0)


def imported_created(
    first: StoredRecord, *, topic: str, log_id: str, previous_log_id: str, next_offset: int
) -> StoredRecord:
    """The first record of a partition of the log `log_id`, into which another log's partition is imported: `first` is
    that one's first record, `next_offset` its end. Raises LogRefused where `first` is no LogCreated."""
    before = log_created(first, topic=topic).previous or ()
    previous = (*before, PreviousLog(log_id=previous_log_id, next_offset=next_offset))
    now = datetime.fromtimestamp(first.timestamp_ms / 1000, UTC).isoformat()
    envelope = Envelope(id=derived_id(log_id, first.partition, partition=0), source="sluice/import", time=now)
    record = encode(LogCreated(log_id=log_id, previous=previous), envelope)
    return StoredRecord(first.partition, 0, first.timestamp_ms, record.key, record.value, record.headers)


def log_created(record: StoredRecord, *, topic: str) -> LogCreated:
    """What the first record says; raises LogRefused if it is no LogCreated."""
    fact = decode(record)
    if isinstance(fact, Fact) and isinstance(fact.event, LogCreated):
        return fact.event
    found = fact.event.type if isinstance(fact, Fact) else f"not readable ({fact.reason})"
    raise LogRefused(
        f"{topic}/{record.partition} is not a log of Sluice: its first record is {found}, not LogCreated; "
        "give Sluice a topic of its own"
    )


def check_log_id(record: StoredRecord, *, topic: str, log_id: str) -> None:
    """Raises LogRefused if the first record is not that of the log `log_id`."""
    found = log_created(record, topic=topic).log_id
    if found != log_id:
        raise LogRefused(
            f"{topic}/{record.partition} belongs to the log {found}, not to {log_id}: the topic was replaced; make the "
            "read models anew from the new log with `sluice replay`, or bring the old one back with `sluice log import`"
        )


async def _written(reader: LogReader, writer: LogWriter, partition: int, record: NewRecord) -> StoredRecord:
    """The first record of a partition; `record`, if it was empty and nobody else was faster."""
    while (first := await reader.first(partition)) is None:
        with contextlib.suppress(LogOutcomeUnknown):  # whether it landed is seen when it is read back
            await writer.append(partition, [record], timeout_s=_APPEND_TIMEOUT_S)
    return first


async def _lacks_beginning(reader: LogReader) -> bool:
    """Whether partition 0 alone is empty, or was a moment ago: brokers are asked one after the other, and who starts at
    the same time may have written the first records meanwhile. That begins with partition 0, so a second look tells."""
    ends = await reader.ends()
    return ends[0] == 0 and any(ends.values())


def _check_imports(created: Mapping[int, LogCreated], ends: Mapping[int, int], topic: str) -> None:
    for partition, event in created.items():
        needed = max((each.next_offset for each in event.previous or ()), default=0)
        if ends[partition] < needed:
            raise LogRefused(
                f"{topic}/{partition} is an unfinished import: it ends at offset {ends[partition]}, and the log it "
                f"came from had {needed}; run `sluice log import` again, which goes on with it"
            )


def _random_id(now_ms: int) -> str:
    return new_id(now_ms=now_ms, random=os.urandom(9))
