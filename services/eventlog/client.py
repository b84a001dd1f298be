"""aiokafka, as far as it is not used as it comes: ending its parts within a bound, and its records as ours.

A producer's own `stop()` waits until every batch is delivered, and idempotent batches never expire: with the broker
away it never returns. So its batches are failed, its sender and requests cancelled and its connections closed. This
reaches into aiokafka 0.14, which is why tests/contract/test_client_assumptions.py holds what is relied on.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as Place
from aiokafka.errors import ProducerClosed

from schemas.records import StoredRecord
from services.eventlog.protocol import LogRefused

_CANCEL_S = 1.0
_Connected = TypeVar("_Connected")


class Renewable(Generic[_Connected]):
    """Something connected to Kafka: made when it is needed, dropped when it failed, made again.

    It is made by a task of its own, since the client leaks a connection when it is interrupted while connecting: who
    gives up waiting does not stop it, and the next one finds it made.
    """

    def __init__(self, make: Callable[[], Awaitable[_Connected]], end: Callable[[_Connected], Awaitable[None]]) -> None:
        self._make = make
        self._end = end
        self._making: asyncio.Task[_Connected] | None = None
        self.current: _Connected | None = None

    async def get(self) -> _Connected:
        """The one in use, or a new one; raises what making it raised."""
        if self.current is not None:
            return self.current
        if self._making is None:
            self._making = asyncio.create_task(self._run(), name="connect to Kafka")
            self._making.add_done_callback(_look_at)
        return await asyncio.shield(self._making)

    async def drop(self) -> None:
        """End the one in use; the next `get` makes another."""
        current, self.current = self.current, None
        if current is not None:
            await self._end(current)

    async def close(self) -> None:
        """End the one in use or in the making."""
        if self._making is not None:
            await within(self._making, _CANCEL_S)
        await self.drop()

    async def _run(self) -> _Connected:
        try:
            self.current = await self._make()
        finally:
            self._making = None
        return self.current


def _look_at(task: "asyncio.Task[Any]") -> None:
    """An error that nobody waited for any more is none that asyncio should complain of."""
    if not task.cancelled():
        task.exception()


def stored(record: Any) -> StoredRecord:
    """A ConsumerRecord as ours. Its timestamp is the broker's, in milliseconds."""
    return StoredRecord(record.partition, record.offset, record.timestamp, record.key, record.value, record.headers)


def name(place: Place) -> str:
    """A partition as people read it: topic/partition."""
    return f"{place.topic}/{place.partition}"


def unreadable(place: Place, offset: int) -> LogRefused:
    """What is said of a record that aiokafka cannot decode: no other part of one is text."""
    return LogRefused(
        f"{name(place)} cannot be read at offset {offset}: a header there has a name that is not UTF-8, so something "
        "else wrote here: keep it from that, and bring the log back with `sluice log import`"
    )


async def within(step: Awaitable[object], timeout_s: float) -> None:
    """Take a step of ending, but not for longer than this; how it ended does not matter any more."""
    task = asyncio.ensure_future(step)
    await asyncio.wait({task}, timeout=timeout_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def end_consumer(consumer: AIOKafkaConsumer, stopping: Awaitable[object]) -> None:
    """End a consumer by `stopping`, within two seconds."""
    await within(stopping, _CANCEL_S)
    # With the broker away, stop() may raise before it came to closing the connections.
    await within(consumer._client.close(), _CANCEL_S)  # noqa: SLF001  # see the module's text


def track_requests(producer: AIOKafkaProducer) -> None:
    """Keep the producer's request tasks where `end_producer` finds them; the sender has them in a local variable."""
    producer.requests_in_flight = set()
    send = producer._sender._send_produce_req  # noqa: SLF001  # see the module's text

    async def tracked(*arguments: object) -> None:
        task = asyncio.current_task()
        producer.requests_in_flight.add(task)
        try:
            await send(*arguments)
        finally:
            producer.requests_in_flight.discard(task)

    producer._sender._send_produce_req = tracked  # noqa: SLF001  # see the module's text


async def end_producer(producer: AIOKafkaProducer, *, grace_s: float) -> None:
    """End a producer within `grace_s` and two seconds; what is then undelivered fails with ProducerClosed."""
    if grace_s > 0:
        await within(producer.flush(), grace_s)
    producer._closed = True  # noqa: SLF001  # so that stop() and the finalizer have nothing left to do
    _fail_batches(producer)
    sender = producer._sender.sender_task  # noqa: SLF001  # see the module's text
    tasks = {task for task in (sender, *producer.requests_in_flight) if task is not None}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CANCEL_S)
    await within(producer.client.close(), _CANCEL_S)


def _fail_batches(producer: AIOKafkaProducer) -> None:
    accumulator = producer._message_accumulator  # noqa: SLF001  # see the module's text
    queued = [batch for batches in accumulator._batches.values() for batch in batches]  # noqa: SLF001  # see above
    # One that waits for its next try is taken out of these a second time when it fails, and must be among them.
    accumulator._pending_batches.update(batch for batch in queued if batch.retry_count)  # noqa: SLF001  # see above
    batches = {*queued, *accumulator._pending_batches}  # noqa: SLF001  # see above
    accumulator.fail_all(ProducerClosed())
    for batch in batches:  # those who waited have been told in their own words; asyncio shall not complain
        for future in (batch.future, batch._drain_waiter):  # noqa: SLF001  # see above
            if future.done():
                future.exception()
