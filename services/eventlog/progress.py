"""Percentages, sent without being waited for: a small queue, the oldest dropped when it is full, `acks=0`.

Losing one loses no fact: the next one tells more, and outcomes are in the log.
"""

import asyncio
import contextlib
from collections import deque

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from schemas.records import NewRecord
from services.eventlog.producers import Producers
from services.eventlog.protocol import LogSettings

_LINGER_MS = 5


class ProgressPublisher:
    """Takes records at once and sends them when it can. `dropped` counts those it could not keep."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self._producers = Producers(lambda: _producer(settings), settings)
        self._queue: deque[tuple[int, NewRecord]] = deque(maxlen=settings.progress_queue_records_max)
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    def publish(self, partition: int, record: NewRecord) -> None:
        self.dropped += len(self._queue) == self._queue.maxlen
        self._queue.append((partition, record))
        self._arrived.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="publish progress")

    async def close(self) -> None:
        """What was not sent yet is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._producers.close()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            producer = await self._producers.ready()
            while self._queue:
                await self._send(producer, *self._queue.popleft())
            self._arrived.clear()

    async def _send(self, producer: AIOKafkaProducer, partition: int, record: NewRecord) -> None:
        try:
            sent = await producer.send(
                self._settings.progress_topic,
                value=record.value,
                key=record.key,
                partition=partition,
                headers=list(record.headers),
            )
        except (KafkaError, AssertionError):  # the latter: a partition its metadata does not know yet
            self.dropped += 1
            return
        sent.add_done_callback(_forget)


def _forget(sent: "asyncio.Future[object]") -> None:
    with contextlib.suppress(asyncio.CancelledError):
        sent.exception()


def _producer(settings: LogSettings) -> AIOKafkaProducer:
    return AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers,
        client_id=f"{settings.client_id}-progress",
        request_timeout_ms=settings.request_timeout_ms,
        acks=0,
        linger_ms=_LINGER_MS,
    )
