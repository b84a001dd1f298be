"""Logs to run one suite on: in memory and in Kafka, with what a test brings about and no service may do.

`World` is either of them: topics of wrong settings, gaps, a cut log, another log in its place.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from schemas.events import Envelope, LogCreated, PreviousLog, encode
from schemas.records import NewRecord, StoredRecord
from services.eventlog import EventLog, Log, LogReader, LogSettings
from services.eventlog.topics import FACT_SETTINGS
from tests.fakes import FakeKafka, FakeLog, FakePartition, FakeTopic

LOG_ID = "1f3a9c02-5b7e-7d41-9c00-3f2a6b8d4e00"
SOURCE = "sluice/test"
NOWHERE = "127.0.0.1:1"
WAIT_S = 60.0


def a_record(text: str = "", *, size_bytes: int = 0) -> NewRecord:
    return NewRecord(key=None, value=text.encode() + b"x" * size_bytes, headers=())


def records(*texts: str) -> list[NewRecord]:
    return [a_record(text) for text in texts]


def created(log_id: str = LOG_ID, *previous: PreviousLog) -> NewRecord:
    envelope = Envelope(id=LOG_ID, source=SOURCE, time="2026-01-01T12:00:00Z")
    return encode(LogCreated(log_id=log_id, previous=previous or None), envelope)


def texts(read: Sequence[StoredRecord]) -> list[str]:
    return [(record.value or b"").decode() for record in read]


async def read_all(reader: LogReader) -> list[StoredRecord]:
    """Read from where the reader stands up to the ends as of now; there must be something to be read in each of its
    partitions."""
    read: list[StoredRecord] = []
    ends, at = await reader.ends(), dict[int, int]()
    async with asyncio.timeout(WAIT_S):
        while at != ends:
            more = await reader.read(records_max=1_000, timeout_ms=300)
            at |= {record.partition: record.offset + 1 for record in more}
            read += more
    return read


async def reader_at(log: Log, partition: int, offset: int) -> LogReader:
    reader = log.reader([partition])
    await reader.seek(partition, offset)
    return reader


async def until(it_is_so: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it is so: what Kafka knows of its topics can only be asked for."""
    while True:
        if await it_is_so():
            return
        await asyncio.sleep(0.01)


class World(Protocol):
    """A place where logs are, and the means to spoil them."""

    topic: str

    def open(self, **changes: Any) -> AbstractAsyncContextManager[Log]: ...

    async def make_topic(self, *, partitions: int, **changes: str) -> None:
        """The log's topic with the settings of facts but for `changes` (dots for underscores)."""

    async def leave_a_gap(self) -> None:
        """Let partition 0 skip an offset."""

    async def cut(self, before: int) -> None:
        """Take away what stands below this offset of partition 0."""

    async def replace_log(self) -> None:
        """Put an empty topic of one partition in the log's place."""


class InMemory:
    def __init__(self, unique: str) -> None:
        self.topic = unique
        self.kafka = FakeKafka()

    def open(self, **changes: Any) -> AbstractAsyncContextManager[Log]:
        return FakeLog.open(self.kafka, settings_for(NOWHERE, self.topic, **changes))

    async def make_topic(self, *, partitions: int, **changes: str) -> None:
        self.kafka.topics[self.topic] = FakeTopic(
            FACT_SETTINGS | dotted(changes), [FakePartition() for _ in range(partitions)]
        )

    async def leave_a_gap(self) -> None:
        self.kafka.append(self.topic, 0, records("lost"))
        self.kafka.append(self.topic, 0, records("beyond"))
        del self.kafka.topics[self.topic].partitions[0].records[-2]

    async def cut(self, before: int) -> None:
        place = self.kafka.topics[self.topic].partitions[0]
        place.start = before
        place.records = [record for record in place.records if record.offset >= before]

    async def replace_log(self) -> None:
        await self.make_topic(partitions=1)


class OnKafka:
    def __init__(self, bootstrap_servers: str, unique: str) -> None:
        self.topic = unique
        self.bootstrap_servers = bootstrap_servers

    def open(self, **changes: Any) -> AbstractAsyncContextManager[Log]:
        return EventLog.open(settings_for(self.bootstrap_servers, self.topic, **changes))

    async def make_topic(self, *, partitions: int, **changes: str) -> None:
        wanted = NewTopic(self.topic, partitions, 1, topic_configs=FACT_SETTINGS | dotted(changes))
        async with self._admin() as admin:
            await admin.create_topics([wanted])
            await until(lambda: self._has_partitions(admin))

    async def leave_a_gap(self) -> None:
        # What a transaction leaves behind, its commit marker, takes an offset that no reader is ever given.
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap_servers, transactional_id=self.topic)
        async with self.open() as log:
            reader = log.reader([0])
            end = (await reader.ends())[0]
            async with producer, producer.transaction():
                await producer.send_and_wait(self.topic, b"in a transaction", partition=0)

            async def marked() -> bool:
                return (await reader.ends())[0] == end + 2

            await until(marked)  # the marker is written after the commit was answered
            await log.writer().append(0, records("beyond"), timeout_s=10)

    async def cut(self, before: int) -> None:
        async with self._admin() as admin:
            await admin.delete_records({TopicPartition(self.topic, 0): RecordsToDelete(before)})

    async def replace_log(self) -> None:
        async with self._admin() as admin:
            await admin.delete_topics([self.topic])

            async def gone() -> bool:
                return self.topic not in await admin.list_topics()

            await until(gone)
        await self.make_topic(partitions=1)

    async def _has_partitions(self, admin: AIOKafkaAdminClient) -> bool:
        return bool((await admin.describe_topics([self.topic]))[0]["partitions"])

    @contextlib.asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()


def settings_for(bootstrap_servers: str, topic: str, **changes: Any) -> LogSettings:
    return LogSettings(
        **{
            "bootstrap_servers": bootstrap_servers,
            "topic": topic,
            "progress_topic": f"{topic}-progress",
            "client_id": "test",
            # A broker on a machine that is busy may be silent for a while.
            "request_timeout_ms": 20_000,
            "silence_ms_max": 20_000,
            **changes,
        }
    )


def dotted(changes: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "."): value for name, value in changes.items()}
