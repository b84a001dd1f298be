"""A producer that can be replaced.

One that failed is retired: what it has in flight may finish for a moment, then it is ended within a bound, and whoever
needs a producer next gets a new one as soon as Kafka lets it start.
"""

import asyncio
from collections.abc import Callable

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from services.eventlog.client import Renewable, end_producer, track_requests
from services.eventlog.protocol import LogSettings
from services.observability import logger

_log = logger("eventlog")

_GRACE_S = 1.0


class Producers:
    """The one producer in use, made when it is needed and again after it was retired."""

    def __init__(self, make: Callable[[], AIOKafkaProducer], settings: LogSettings) -> None:
        self._make = make
        self._settings = settings
        self._producer = Renewable(self._start, lambda producer: end_producer(producer, grace_s=0))
        self._ending: set[asyncio.Task[None]] = set()

    async def ready(self) -> AIOKafkaProducer:
        """A started producer. Waits for as long as Kafka is away: put a bound around it."""
        return await self._producer.get()

    def retire(self, producer: AIOKafkaProducer, *, why: str) -> None:
        """Use another one from now on; this one ends by itself within a bound."""
        if producer is not self._producer.current:
            return
        self._producer.current = None
        _log.warning("producer_replaced", topic=self._settings.topic, reason=why)
        task = asyncio.create_task(end_producer(producer, grace_s=_GRACE_S), name="end a retired producer")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End every producer, within a bound."""
        await asyncio.gather(self._producer.close(), *self._ending)

    async def _start(self) -> AIOKafkaProducer:
        """A started producer, tried for until Kafka is there."""
        away = False
        while True:
            producer = self._make()
            track_requests(producer)
            try:
                async with asyncio.timeout(3 * self._settings.request_timeout_ms / 1000):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                await end_producer(producer, grace_s=0)
                if not away:
                    _log.warning("kafka_away", at=self._settings.bootstrap_servers, reason=repr(error))
                away = True
            except asyncio.CancelledError:
                await end_producer(producer, grace_s=0)
                raise
            else:
                if away:
                    _log.info("kafka_back", at=self._settings.bootstrap_servers)
                return producer
            await asyncio.sleep(self._settings.reconnect_backoff_ms / 1000)
