"""Records that were read before and are wanted again: those at some places, or all between two offsets.

A batch's past, what is in quarantine, an export: each opens a reader for a few records and must close it whatever
happens, wait for what Kafka does not give at once, and not for ever. Who follows the log uses a LogReader itself.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from itertools import groupby
from operator import itemgetter

from schemas.records import StoredRecord
from services.eventlog.protocol import Log, LogReader, LogUnavailable

GAP_RECORDS_MAX = 200
READ_RECORDS_MAX = 2_000
READ_TIMEOUT_MS = 500
SILENCE_MAX_S = 30.0


async def records_at(
    log: Log, places: Iterable[tuple[int, int]], *, silence_max_s: float = SILENCE_MAX_S
) -> AsyncGenerator[StoredRecord]:
    """The records at these places (partition, offset), in their order; of those that lie close together, what is
    between them is read and left out. Raises as `records_between`."""
    for partition, there in groupby(sorted(places), key=itemgetter(0)):
        offsets = [offset for _, offset in there]
        wanted = set(offsets)
        async with aclosing(_read(log, partition, list(ranges(offsets)), silence_max_s)) as groups:
            async for records in groups:
                for record in records:
                    if record.offset in wanted:
                        yield record


def records_between(
    log: Log, partition: int, first: int, end: int, *, silence_max_s: float = SILENCE_MAX_S
) -> AsyncGenerator[list[StoredRecord]]:
    """All records from one offset up to and without another, some at a time.

    Where Kafka goes away in their midst they go on when it is back. Raises LogUnavailable where none comes for
    `silence_max_s`, or where Kafka is away when the first is asked for; LogRefused where the log does not hold them.
    """
    return _read(log, partition, [(first, end)] if first < end else [], silence_max_s)


async def _read(
    log: Log, partition: int, runs: Sequence[tuple[int, int]], silence_max_s: float
) -> AsyncGenerator[list[StoredRecord]]:
    reader = log.reader([partition])
    try:
        if runs:
            await reader.seek(partition, runs[-1][1])  # refused where the log does not hold them all
        for first, end in runs:
            await reader.seek(partition, offset := first)
            while offset < end:
                records = await _some(reader, min(READ_RECORDS_MAX, end - offset), silence_max_s)
                offset += len(records)
                yield records
    finally:
        await reader.close()


async def _some(reader: LogReader, records_max: int, silence_max_s: float) -> list[StoredRecord]:
    """The next records, at least one."""
    problem = "no records came"
    try:
        async with asyncio.timeout(silence_max_s):
            while True:
                try:
                    if records := await reader.read(records_max=records_max, timeout_ms=READ_TIMEOUT_MS):
                        return records
                except LogUnavailable as error:  # the reader goes on where it was when Kafka is back
                    problem = str(error)
    except TimeoutError:
        silent = f"Kafka gave no old records for {silence_max_s:g} s"
        raise LogUnavailable(f"{silent} ({problem}): try again", told=f"{silent}: try again") from None


def ranges(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending offsets as runs to read, each up to and without an end; small gaps are read through."""
    first = last = offsets[0]
    for offset in offsets[1:]:
        if offset - last > GAP_RECORDS_MAX:
            yield first, last + 1
            first = offset
        last = offset
    yield first, last + 1
