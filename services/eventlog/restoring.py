"""Writing a log into an empty topic as it was: the same records at the same offsets with the same times.

While it is written the topic takes records with times of their own; then it gets the settings of a log, and times are
the broker's again. One record batch is in flight at a time, and each must land where it belongs: if it does not,
somebody else writes here too, and nothing more is written. Which records these are is decided in services/archive.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from schemas.records import StoredRecord
from services.eventlog import topics
from services.eventlog.client import end_producer, track_requests
from services.eventlog.protocol import LogOutcomeUnknown, LogRefused, LogSettings, LogUnavailable
from services.eventlog.writing import fact_producer, failure

_CLOSE_GRACE_S = 1.0
_RECORD_FRAMING_BYTES = 64
_HEADER_FRAMING_BYTES = 10


class Restoration:
    """One topic that is written as it was. Open it with `Restoration.open`."""

    def __init__(self, settings: LogSettings, producer: AIOKafkaProducer) -> None:
        self._settings = settings
        self._producer = producer

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: LogSettings, *, partitions: int, replication_factor: int) -> AsyncIterator[Self]:
        """The topic, made or altered to take what comes. Raises LogRefused, LogUnavailable."""
        await topics.begin_import(settings, partitions=partitions, replication_factor=replication_factor)
        producer = fact_producer(settings)
        track_requests(producer)
        try:
            try:
                async with asyncio.timeout(3 * settings.request_timeout_ms / 1000):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                raise LogUnavailable(f"no Kafka at {settings.bootstrap_servers}: is it up? ({error!r})") from error
            yield cls(settings, producer)
        finally:
            await end_producer(producer, grace_s=_CLOSE_GRACE_S)

    async def append(self, records: Sequence[StoredRecord]) -> None:
        """Write these records of one partition, whose end is where the first of them belongs.

        Raises LogRefused where they landed elsewhere, LogOutcomeUnknown, RecordTooLarge.
        """
        place = f"{self._settings.topic}/{records[0].partition}"
        batch = self._producer.create_batch()
        for record in records:
            headers = list(record.headers)
            added = batch.append(timestamp=record.timestamp_ms, key=record.key, value=record.value, headers=headers)
            assert added is not None, "a batch is cut by size before it comes here"
        batch.close()
        try:
            async with asyncio.timeout(self._settings.append_stuck_s):
                sent = await self._producer.send_batch(batch, self._settings.topic, partition=records[0].partition)
                landed = await sent
        except (KafkaError, OSError, TimeoutError) as error:
            problem = failure(error, place, sent=True)
            again = "; run the import again, it goes on" if isinstance(problem, LogOutcomeUnknown) else ""
            raise type(problem)(f"{problem}{again}") from error
        if landed is None or landed.offset != records[0].offset:
            found = "an unknown place" if landed is None else f"offset {landed.offset}"
            raise LogRefused(
                f"{place}: records of offset {records[0].offset} landed at {found}, so somebody else writes there "
                "too: stop it, delete the topic and begin the import anew"
            )

    async def settle(self, *, fsync: bool) -> None:
        """Everything is written: make the topic a log like any other. Raises LogRefused, LogUnavailable."""
        await topics.end_import(self._settings, fsync=fsync)


def size_of(record: StoredRecord) -> int:
    """What a record takes in a record batch, rounded up, in bytes; a header's value may be null in Kafka."""
    headers = sum(len(name.encode()) + len(value or b"") + _HEADER_FRAMING_BYTES for name, value in record.headers)
    return _RECORD_FRAMING_BYTES + len(record.key or b"") + len(record.value or b"") + headers
