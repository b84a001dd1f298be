"""Appending to Kafka: one idempotent producer, and for each partition one task that joins what waits.

A group is never split, and what one batch carries lands whole or not at all; the next batch of a partition is sent
when the last one is answered, so order is the order of asking. A producer whose batch failed is never used again: its
sequence numbers may be ahead of the broker's for good (aiokafka#1017). Why there are no transactions: see the design.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError, TopicAuthorizationFailedError
from aiokafka.producer.message_accumulator import BatchBuilder

from schemas.records import NewRecord
from services.eventlog.producers import Producers
from services.eventlog.protocol import (
    GROUP_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    LogError,
    LogOutcomeUnknown,
    LogRefused,
    LogSettings,
    LogUnavailable,
    RecordTooLarge,
    check_size,
)


@dataclass(slots=True, eq=False)
class _Group:
    """Records that one caller wants to stand together, and the caller's answer: the first one's offset."""

    records: Sequence[NewRecord]
    size_bytes: int
    sent: bool = False
    answer: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: LogError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # a caller who gave up does not leave an error nobody looked at


class KafkaWriter:
    """A LogWriter on Kafka. Lanes begin with their first append; all share one producer."""

    def __init__(self, settings: LogSettings, *, on_close: Callable[["KafkaWriter"], None]) -> None:
        self._settings = settings
        self._on_close = on_close
        self._producers = Producers(lambda: fact_producer(settings), settings)
        self._lanes: dict[int, _Lane] = {}
        self._closed = False

    async def append(self, partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        if not records:
            raise ValueError("append needs at least one record")
        group = _Group(records, check_size(records))
        if self._closed:
            raise LogUnavailable("the writer is closed: nothing was sent")
        lane = self._lanes.get(partition)
        if lane is None:
            lane = self._lanes[partition] = _Lane(partition, self._producers, self._settings)
        return await lane.append(group, timeout_s)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
        await self._producers.close()
        self._on_close(self)


class _Lane:
    """The writer task of one partition, and the queue before it."""

    def __init__(self, partition: int, producers: Producers, settings: LogSettings) -> None:
        self._place = f"{settings.topic}/{partition}"
        self._partition = partition
        self._producers = producers
        self._settings = settings
        self._queue: asyncio.Queue[_Group] = asyncio.Queue(maxsize=settings.queue_groups_max)
        self._in_hand: list[_Group] = []
        self._held: _Group | None = None
        self._task = asyncio.create_task(self._run(), name=f"append {self._place}")

    async def append(self, group: _Group, timeout_s: float) -> int:
        try:
            async with asyncio.timeout(timeout_s):
                await self._queue.put(group)
                return await group.answer
        except TimeoutError:
            if group.sent:
                raise LogOutcomeUnknown(
                    f"{len(group.records)} records were sent to {self._place}, and Kafka did not answer in "
                    f"{timeout_s:g} s: they may have landed or may yet land; send the same ids again"
                ) from None
            raise LogUnavailable(
                f"{self._place} took nothing in {timeout_s:g} s, and nothing was sent: is Kafka at "
                f"{self._settings.bootstrap_servers} up?",
                told="Kafka takes nothing just now; nothing was done",
            ) from None
        finally:
            group.answer.cancel()  # withdrawn, where it still waits

    async def close(self) -> None:
        """Let the queue run empty, within the bound; then end the task and fail what is left."""
        drained = asyncio.ensure_future(self._queue.join())
        await asyncio.wait({drained, self._task}, timeout=self._settings.close_timeout_s, return_when="FIRST_COMPLETED")
        for task in (drained, self._task):
            task.cancel()
        await asyncio.gather(drained, self._task, return_exceptions=True)
        for group in (*self._in_hand, *([self._held] if self._held else [])):
            group.fail(_closed_before(group, self._place))
        while not self._queue.empty():
            group = self._queue.get_nowait()
            group.fail(_closed_before(group, self._place))
            await asyncio.sleep(0)  # lets the next of those who wait for room in, to hear the same

    async def _run(self) -> None:
        while True:
            first = self._held or await self._queue.get()
            self._held, self._in_hand = None, [first]
            # While Kafka is away we wait here, those behind us wait in the queue, and each gives up when it wants to.
            producer = await self._producers.ready()
            self._in_hand = self._join(first)
            await self._send(producer, self._in_hand)
            for _ in self._in_hand:
                self._queue.task_done()
            self._in_hand = []

    def _join(self, first: _Group) -> list[_Group]:
        """The first group and those behind it that fit into the same record batch."""
        joined, size_bytes = [first], first.size_bytes
        while not self._queue.empty():
            group = self._queue.get_nowait()
            size_bytes += group.size_bytes
            if size_bytes > self._settings.joined_bytes_max:
                self._held = group
                break
            joined.append(group)
        return joined

    async def _send(self, producer: AIOKafkaProducer, joined: list[_Group]) -> None:
        groups: list[_Group] = []
        try:
            async with asyncio.timeout(self._settings.append_stuck_s):
                await self._find_partition(producer)
                # Those nobody gave up yet. Nothing is awaited between this and the mark that they may have landed.
                groups = [group for group in joined if not group.answer.done()]
                for group in groups:
                    group.sent = True
                offset = await self._deliver(producer, groups) if groups else 0
        except Exception as error:  # noqa: BLE001  # whatever it was, the callers must hear of it and the lane go on
            if not isinstance(error, LogRefused):
                self._producers.retire(producer, why=repr(error))
            for group in joined:
                group.fail(failure(error, self._place, sent=group.sent))
            return
        for group in groups:
            if not group.answer.done():
                group.answer.set_result(offset)
            offset += len(group.records)

    async def _find_partition(self, producer: AIOKafkaProducer) -> None:
        if self._partition not in await producer.partitions_for(self._settings.topic):
            await producer.client.force_metadata_update()  # partitions may have been added since
            if self._partition not in await producer.partitions_for(self._settings.topic):
                raise LogRefused(f"{self._place} does not exist: start Sluice with more partitions to add it")

    async def _deliver(self, producer: AIOKafkaProducer, groups: list[_Group]) -> int:
        """Send the groups as one record batch and wait for the answer: the offset of the first record."""
        batch = _batch(producer, [record for group in groups for record in group.records])
        landed = await (await producer.send_batch(batch, self._settings.topic, partition=self._partition))
        if landed is None or landed.offset < 0:
            # A retry that the broker knows as a duplicate, too old for it to remember where it stands.
            raise LogOutcomeUnknown(f"{batch.record_count()} records are in {self._place}, but Kafka did not say where")
        return int(landed.offset)


def _batch(producer: AIOKafkaProducer, records: list[NewRecord]) -> BatchBuilder:
    """One record batch, closed, so that nothing is added to it."""
    batch = producer.create_batch()
    for record in records:
        # The broker puts its own time on the record (LogAppendTime).
        added = batch.append(timestamp=None, key=record.key, value=record.value, headers=list(record.headers))
        assert added is not None, f"sizes are checked first: {batch.size()} of {GROUP_BYTES_MAX} bytes"
    batch.close()
    return batch


def fact_producer(settings: LogSettings) -> AIOKafkaProducer:
    """A producer of facts, not started: idempotent, and large enough for whatever the topic takes."""
    return AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers,
        client_id=f"{settings.client_id}-facts",
        request_timeout_ms=settings.request_timeout_ms,
        enable_idempotence=True,
        acks="all",
        linger_ms=0,
        max_batch_size=MESSAGE_BYTES_MAX,
        max_request_size=MESSAGE_BYTES_MAX,
    )


def failure(error: Exception, place: str, *, sent: bool) -> LogError:
    """What a failed batch means to those who asked for it. In doubt, it may have landed."""
    if isinstance(error, LogError):
        return error
    if isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
        return RecordTooLarge(
            f"Kafka refused a record batch for {place} as too large: set max.message.bytes of the topic to at least "
            f"{MESSAGE_BYTES_MAX}"
        )
    if isinstance(error, TopicAuthorizationFailedError):
        return LogRefused(f"Kafka does not allow this client to write to {place}: give it the right to")
    if not sent:
        return LogUnavailable(
            f"nothing was sent to {place}: {error!r}", told="Kafka cannot be reached; nothing was done"
        )
    return LogOutcomeUnknown(f"appending to {place} ended with {error!r}: the records may have landed")


def _closed_before(group: _Group, place: str) -> LogError:
    if group.sent:
        return LogOutcomeUnknown(f"the writer closed before Kafka answered for {place}: the records may have landed")
    return LogUnavailable(f"the writer closed before anything of this was sent to {place}")
