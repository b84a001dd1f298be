"""The log: the one module that talks to Kafka.

`EventLog.open` gives a `Log` (see `protocol`); from it come readers that pull, writers that append whole groups, and
the progress topic beside it. Facts are bytes here (`schemas.records`); what they say stands in `schemas.events`, of
which only LogCreated is understood. tests/fakes.py holds the same log in memory, for tests.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence

from faststream.kafka import KafkaBroker

from schemas.events import LogCreated
from schemas.records import NewRecord, StoredRecord
from services.eventlog import topics
from services.eventlog.identity import check_log_id, establish, identity_of, log_created, new_created
from services.eventlog.progress import ProgressPublisher
from services.eventlog.protocol import (
    GROUP_BYTES_MAX,
    Log,
    LogError,
    LogIdentity,
    LogOutcomeUnknown,
    LogReader,
    LogRefused,
    LogSettings,
    LogUnavailable,
    LogWriter,
    ProgressReader,
    RecordTooLarge,
)
from services.eventlog.questions import Questions
from services.eventlog.reading import KafkaProgressReader, KafkaReader
from services.eventlog.records import records_at, records_between
from services.eventlog.topics import TopicFound
from services.eventlog.writing import KafkaWriter

__all__ = [
    "GROUP_BYTES_MAX",
    "EventLog",
    "Log",
    "LogError",
    "LogIdentity",
    "LogOutcomeUnknown",
    "LogReader",
    "LogRefused",
    "LogSettings",
    "LogUnavailable",
    "LogWriter",
    "ProgressReader",
    "RecordTooLarge",
    "TopicFound",
    "check_log_id",
    "records_at",
    "records_between",
]


class EventLog:
    """The log in Kafka. Readers and writers connect when they are first used, so opening needs no broker."""

    def __init__(self, broker: KafkaBroker, settings: LogSettings) -> None:
        self.settings = settings
        self._broker = broker
        self._identity: LogIdentity | None = None
        self._questions = Questions(settings, settings.topic)
        self._progress = ProgressPublisher(settings)
        self._opened: set[KafkaReader | KafkaWriter | KafkaProgressReader] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: LogSettings) -> AsyncIterator["EventLog"]:
        """The log, for as long as the block lasts; its end drains and closes what was opened from it."""
        broker = KafkaBroker(
            settings.bootstrap_servers,
            client_id=settings.client_id,
            request_timeout_ms=settings.request_timeout_ms,
            consumer_only=True,
            allow_auto_create_topics=False,
            logger=None,
        )
        async with broker:
            log = cls(broker, settings)
            try:
                yield log
            finally:
                await log._close()

    async def check_version(self) -> str:
        return await topics.check_version(self.settings)

    async def ensure_topics(self, *, partitions: int, replication_factor: int = 1, fsync: bool = False) -> None:
        await topics.ensure_topics(
            self.settings, partitions=partitions, replication_factor=replication_factor, fsync=fsync
        )

    async def inspect(self, *, fsync: bool = False) -> TopicFound | None:
        """The log's topic as it is, None where there is none; nothing is changed. Raises LogUnavailable."""
        return await topics.inspect(self.settings, fsync=fsync)

    async def mend(self, *, fsync: bool = False) -> list[str]:
        """Set right what `inspect` complains of; what was changed. Raises LogRefused where an import is unfinished,
        LogUnavailable."""
        return await topics.mend(self.settings, fsync=fsync)

    async def identify(self) -> str | None:
        """Which log this is, None where nothing was written yet; nothing is changed.

        Raises LogRefused where the first record is no LogCreated or was cut off, LogUnavailable.
        """
        first = await self._questions.first(0)
        return None if first is None else log_created(first, topic=self.settings.topic).log_id

    async def identity(self, partitions: Sequence[int]) -> LogIdentity | None:
        """Which log this is and which it was imported from, None where nothing was written yet; nothing is changed.

        Raises as `identify`.
        """
        created: dict[int, LogCreated] = {}
        for partition in partitions:
            if first := await self._questions.first(partition):
                created[partition] = log_created(first, topic=self.settings.topic)
        return identity_of(created) if created else None

    async def ensure_created(self, *, partitions: int, source: str) -> LogIdentity:
        reader, writer = self.reader(range(partitions)), self.writer()
        try:
            self._identity = await establish(
                reader, writer, topic=self.settings.topic, new_created=functools.partial(new_created, source=source)
            )
        finally:
            await writer.close()
            await reader.close()
        return self._identity

    def reader(self, partitions: Sequence[int]) -> KafkaReader:
        reader = KafkaReader(
            self._broker,
            self.settings,
            self._questions,
            partitions,
            check_first=self._check_first,
            on_close=self._opened.discard,
        )
        self._opened.add(reader)
        return reader

    def writer(self) -> KafkaWriter:
        writer = KafkaWriter(self.settings, on_close=self._opened.discard)
        self._opened.add(writer)
        return writer

    def publish_progress(self, partition: int, record: NewRecord) -> None:
        self._progress.publish(partition, record)

    def progress_reader(self, partitions: Sequence[int]) -> KafkaProgressReader:
        reader = KafkaProgressReader(self._broker, self.settings, partitions, on_close=self._opened.discard)
        self._opened.add(reader)
        return reader

    def _check_first(self, first: StoredRecord) -> None:
        if self._identity is not None:
            check_log_id(first, topic=self.settings.topic, log_id=self._identity.log_id)

    async def _close(self) -> None:
        await asyncio.gather(self._progress.close(), *(each.close() for each in self._opened))
        await self._questions.close()
