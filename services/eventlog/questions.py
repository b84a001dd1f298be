"""Asking Kafka where a topic's partitions begin and end, and for their first records.

Not over a reading consumer's connection: there an answer waits behind the fetch in flight, which the broker holds
back while nothing comes. A client that failed is thrown away, so the next question finds a fresh one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as Place
from aiokafka.errors import ConsumerStoppedError, KafkaError

from schemas.records import StoredRecord
from services.eventlog.client import Renewable, end_consumer, name, stored, unreadable
from services.eventlog.protocol import LogSettings, LogUnavailable, PartitionBounds, not_there

_Answer = TypeVar("_Answer")


class Questions:
    """One connection for questions about `topic`; made when it is first needed."""

    def __init__(self, settings: LogSettings, topic: str) -> None:
        self._settings = settings
        self._topic = topic
        self._consumer = Renewable(self._connect, lambda consumer: end_consumer(consumer, consumer.stop()))
        self._fetching = asyncio.Lock()

    async def ends(self, partitions: Sequence[int]) -> dict[int, int]:
        """The next offset per partition. Raises LogUnavailable."""
        ends = await self._ask(lambda consumer: consumer.end_offsets(self._places(partitions)))
        return {place.partition: offset for place, offset in ends.items()}

    async def bounds(self, partitions: Sequence[int]) -> dict[int, PartitionBounds]:
        """Where each partition begins and ends. Raises LogUnavailable."""
        places = self._places(partitions)
        starts = await self._ask(lambda consumer: consumer.beginning_offsets(places))
        ends = await self._ask(lambda consumer: consumer.end_offsets(places))
        return {place.partition: PartitionBounds(starts[place], ends[place]) for place in places}

    async def first(self, partition: int) -> StoredRecord | None:
        """The record at offset 0, None in an empty partition. Raises LogRefused if it was cut off, LogUnavailable."""
        bounds = (await self.bounds([partition]))[partition]
        if refused := not_there(name(Place(self._topic, partition)), 0, bounds):
            raise refused
        if bounds.end == 0:
            return None
        async with self._fetching:
            return await self._ask(lambda consumer: self._fetch_first(consumer, Place(self._topic, partition)))

    async def close(self) -> None:
        await self._consumer.close()

    async def _fetch_first(self, consumer: AIOKafkaConsumer, place: Place) -> StoredRecord:
        consumer.assign([place])
        consumer.seek(place, 0)
        try:
            while not (fetched := await consumer.getmany(timeout_ms=self._settings.request_timeout_ms, max_records=1)):
                pass  # bounded by the caller
        except UnicodeDecodeError as error:
            raise unreadable(place, 0) from error
        finally:
            consumer.unsubscribe()
        return stored(fetched[place][0])

    async def _ask(self, question: Callable[[AIOKafkaConsumer], Awaitable[_Answer]]) -> _Answer:
        consumer = None
        try:
            async with asyncio.timeout(self._settings.request_timeout_ms / 1000):
                consumer = await self._consumer.get()
                return await question(consumer)
        except (KafkaError, ConsumerStoppedError, OSError, TimeoutError) as error:
            if consumer is not None and consumer is self._consumer.current:
                await self._consumer.drop()
            raise LogUnavailable(
                f"no answer about {self._topic} from Kafka at {self._settings.bootstrap_servers}: is it up? "
                f"({error!r})",
                told="Kafka does not answer",
            ) from error

    async def _connect(self) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._settings.bootstrap_servers,
            client_id=f"{self._settings.client_id}-questions",
            request_timeout_ms=self._settings.request_timeout_ms,
            auto_offset_reset="none",
            enable_auto_commit=False,
            fetch_max_wait_ms=10,
            max_partition_fetch_bytes=1,  # one record batch comes whole all the same (KIP-74)
        )
        try:
            await consumer.start()
        except BaseException:
            await end_consumer(consumer, consumer.stop())
            raise
        return consumer

    def _places(self, partitions: Sequence[int]) -> list[Place]:
        return [Place(self._topic, partition) for partition in partitions]
