"""Reading from Kafka: records are pulled from where the caller says, and each offset must follow the last one.

The subscriber is FastStream's, without a handler and without a consumer group: handlers swallow exceptions and every
acknowledgement policy skips a failed record or spins on it, so a lost fact would go unnoticed. A reader that heard
nothing for `silence_ms_max` throws its consumer away and makes another, which then checks that it is still the same
log: whatever state the client library was in, a reader is usable again when Kafka is.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition as Place
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    KafkaError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from faststream.kafka import KafkaBroker, TopicPartition
from faststream.kafka.subscriber.usecase import LogicSubscriber

from schemas.records import StoredRecord
from services.eventlog.client import Renewable, end_consumer, name, stored, unreadable
from services.eventlog.protocol import LogError, LogRefused, LogSettings, LogUnavailable, not_there
from services.eventlog.questions import Questions

FETCH_BYTES_MAX = 4 * 1024 * 1024
# How long the broker holds back an answer while nothing comes; a seek waits for it. Latency does not depend on it.
FETCH_WAIT_MS = 200


class KafkaReader:
    """A LogReader on Kafka; it connects when it is first asked for something.

    `check_first`: given the record at offset 0 of each partition whenever the reader connects, raises LogRefused if it
    is not that of the log in use.
    """

    def __init__(
        self,
        broker: KafkaBroker,
        settings: LogSettings,
        questions: Questions,
        partitions: Sequence[int],
        *,
        check_first: Callable[[StoredRecord], None],
        on_close: Callable[["KafkaReader"], None],
    ) -> None:
        self._settings = settings
        self._places = {partition: Place(settings.topic, partition) for partition in partitions}
        self._questions = questions
        self._check_first = check_first
        self._on_close = on_close
        self._pull = Pull(broker, settings, list(self._places.values()), auto_offset_reset="none")
        self._placed: Any = None
        self._next: dict[int, int] = {}
        self._silence = _Silence(self._places.values())
        self._closed = False

    @property
    def partitions(self) -> tuple[int, ...]:
        return tuple(self._places)

    @property
    def silent_ms(self) -> float:
        return self._silence.ms

    async def first(self, partition: int) -> StoredRecord | None:
        return await self._questions.first(partition)

    async def ends(self) -> dict[int, int]:
        return await self._questions.ends(self.partitions)

    async def seek(self, partition: int, offset: int) -> None:
        place = self._places[partition]
        if refused := not_there(name(place), offset, (await self._questions.bounds([partition]))[partition]):
            raise refused
        self._stand({partition: offset})

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        assert self._next.keys() == self._places.keys(), "seek every partition before reading"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        begun = dict(self._next)
        try:
            return await self._gather(await self._consumer(), records_max, deadline)
        except LogUnavailable:
            await asyncio.sleep(max(0.0, deadline - loop.time()))  # the caller may call again at once
            raise
        except asyncio.CancelledError:
            self._stand(begun)
            raise

    async def close(self) -> None:
        self._closed = True
        await self._pull.close()
        self._on_close(self)

    async def _consumer(self) -> Any:
        """The consumer in use; where there is none, another one, which stands where the last one stood."""
        if self._closed:
            raise LogUnavailable(f"this reader of {self._settings.topic} is closed")
        if self._placed is None or self._placed is not self._pull.consumer:
            await self._recognise()
            await self._pull.start()
            self._placed = self._pull.consumer
            self._stand(self._next)
            self._silence.begin(self._placed)
        return self._placed

    async def _recognise(self) -> None:
        """Check that this is the log we know and that it reaches to where we were."""
        bounds = await self._questions.bounds(self.partitions)
        for partition, place in self._places.items():
            if refused := not_there(name(place), self._next[partition], bounds[partition]):
                raise refused
        # A topic is replaced as a whole, so one partition tells.
        if first := await self._questions.first(self.partitions[0]):
            self._check_first(first)

    async def _gather(self, consumer: Any, records_max: int, deadline: float) -> list[StoredRecord]:
        """One read: a fetch, and as many more as bring what is known to be waiting on the broker."""
        records = await self._fetch(consumer, records_max, deadline)
        while 0 < len(records) < records_max and self._more_is_known(consumer):
            try:
                fetched = await self._fetch(consumer, records_max - len(records), deadline)
            except LogRefused:
                break  # the next read meets it again
            if not fetched:
                break
            records += fetched
        if not records and self._silence.ms >= self._settings.silence_ms_max:
            await self._pull.drop()
            raise self._unavailable()
        return records

    async def _fetch(self, consumer: Any, records_max: int, deadline: float) -> list[StoredRecord]:
        """What one getmany gives, checked; where something is wrong, what stands before it, or else LogRefused."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        wait_ms = max(0.0, (deadline - began) * 1000)
        try:
            try:
                fetched = await consumer.getmany(timeout_ms=wait_ms, max_records=records_max)
            except UnicodeDecodeError:
                return await self._before_unreadable(consumer, records_max)
        except ConsumerStoppedError as error:
            raise self._unavailable() from error
        except KafkaError as error:
            self._stand(self._next)  # what aiokafka lost when it raised is fetched again
            raise _refusal(error) from error
        self._silence.listen(consumer, min(wait_ms, (loop.time() - began) * 1000))
        records = [record for place, found in fetched.items() for record in self._contiguous(place, found)]
        if fetched and not records:
            ((place, found), *_) = fetched.items()
            raise _gap(place, expected=self._next[place.partition], found=found[0].offset)
        return records

    async def _before_unreadable(self, consumer: Any, records_max: int) -> list[StoredRecord]:
        """One by one, what aiokafka lost when it met a record it cannot decode; LogRefused where that is the next."""
        begun = dict(self._next)
        self._stand(begun)
        records: list[StoredRecord] = []
        try:
            for partition in self._places:
                records += await self._one_by_one(consumer, partition, records_max - len(records))
        except BaseException:  # refused or given up: what was read here was told to nobody
            self._stand(begun)
            raise
        return records

    async def _one_by_one(self, consumer: Any, partition: int, records_max: int) -> list[StoredRecord]:
        place, records = self._places[partition], list[StoredRecord]()
        try:
            while self._is_known_beyond(consumer, partition) and len(records) < records_max:
                fetched = await consumer.getmany(place, timeout_ms=2 * FETCH_WAIT_MS, max_records=1)
                if not (fitting := self._contiguous(place, fetched.get(place, ()))):
                    break
                records += fitting
        except UnicodeDecodeError as error:
            if not records:
                raise unreadable(place, self._next[partition]) from error
            self._stand(self._next)
        return records

    def _contiguous(self, place: Place, fetched: Sequence[Any]) -> list[StoredRecord]:
        """The records up to the first gap; what follows it is fetched again, so that the next read meets it."""
        begin = self._next[place.partition]
        fitting = sum(record.offset == begin + index for index, record in enumerate(fetched))
        self._next[place.partition] = begin + fitting
        if fitting < len(fetched):
            self._stand({place.partition: begin + fitting})
        return [stored(record) for record in fetched[:fitting]]

    def _more_is_known(self, consumer: Any) -> bool:
        """Whether the last fetches told of records beyond those they brought."""
        return any(self._is_known_beyond(consumer, partition) for partition in self._places)

    def _is_known_beyond(self, consumer: Any, partition: int) -> bool:
        return self._next[partition] < (consumer.highwater(self._places[partition]) or 0)

    def _stand(self, offsets: Mapping[int, int]) -> None:
        """Go to these offsets."""
        self._next.update(offsets)
        if self._pull.consumer is not None:
            for partition, offset in offsets.items():
                self._pull.consumer.seek(self._places[partition], offset)

    def _unavailable(self) -> LogUnavailable:
        return LogUnavailable(
            f"no answer about {self._settings.topic} from Kafka at {self._settings.bootstrap_servers}: is it up?",
            told="Kafka does not answer",
        )


class KafkaProgressReader:
    """A ProgressReader on Kafka: from the end as of connecting, gaps allowed, absence of Kafka too."""

    def __init__(
        self,
        broker: KafkaBroker,
        settings: LogSettings,
        partitions: Sequence[int],
        *,
        on_close: Callable[["KafkaProgressReader"], None],
    ) -> None:
        places = [Place(settings.progress_topic, partition) for partition in partitions]
        self._on_close = on_close
        self._settings = settings
        self._pull = Pull(broker, settings, places, auto_offset_reset="latest")
        self._silence = _Silence(places)

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        try:
            if self._pull.consumer is None:
                await self._pull.start()
                self._silence.begin(self._pull.consumer)
            wait_ms = max(0.0, (deadline - loop.time()) * 1000)
            fetched = await self._pull.consumer.getmany(timeout_ms=wait_ms, max_records=records_max)
        except (LogError, KafkaError, UnicodeDecodeError):  # the last: a header whose name is not UTF-8
            await self._pull.drop()
            await asyncio.sleep(max(0.0, deadline - loop.time()))
            return []
        self._silence.listen(self._pull.consumer, wait_ms)
        if not fetched and self._silence.ms >= self._settings.silence_ms_max:
            await self._pull.drop()
        return [stored(record) for found in fetched.values() for record in found]

    async def close(self) -> None:
        await self._pull.close()
        self._on_close(self)


class Pull:
    """A FastStream subscriber without a handler, started and stopped within bounds, again and again."""

    def __init__(
        self, broker: KafkaBroker, settings: LogSettings, places: Sequence[Place], *, auto_offset_reset: Any
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._places = places
        self._auto_offset_reset = auto_offset_reset
        self._subscriber = Renewable(self._start, _stop)

    @property
    def consumer(self) -> Any:
        """The started consumer, or None."""
        subscriber = self._subscriber.current
        return subscriber.consumer if subscriber else None

    async def start(self) -> None:
        """Connect; raises LogUnavailable."""
        await self._subscriber.get()

    async def drop(self) -> None:
        """Disconnect, to connect anew."""
        await self._subscriber.drop()

    async def close(self) -> None:
        """Disconnect for good."""
        await self._subscriber.close()

    async def _start(self) -> LogicSubscriber[Any]:
        subscriber = self._broker.subscriber(
            # Declaring would create a missing topic with the broker's own retention.
            partitions=[TopicPartition(place.topic, place.partition, declare=False) for place in self._places],
            auto_offset_reset=self._auto_offset_reset,
            fetch_min_bytes=1,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=FETCH_BYTES_MAX,
            check_crcs=True,
            persistent=False,
        )
        try:
            async with asyncio.timeout(3 * self._settings.request_timeout_ms / 1000):
                await subscriber.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await _stop(subscriber)
            raise LogUnavailable(
                f"no Kafka at {self._settings.bootstrap_servers}: is it up? ({error!r})", told="Kafka cannot be reached"
            ) from error
        except asyncio.CancelledError:
            await _stop(subscriber)
            raise
        return subscriber


class _Silence:
    """How long the broker has said nothing about a partition, counted only while somebody waited for it.

    The client notes the time of each answer to a fetch, empty ones too (they come twice a second), but does not tell
    when it stopped getting any. Counting our own waits, and not clock time, keeps a process that was itself suspended
    from accusing the broker.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self._heard: dict[Place, int | None] = dict.fromkeys(places)
        self._silent_ms: dict[Place, float] = dict.fromkeys(self._heard, 0.0)

    @property
    def ms(self) -> float:
        return max(self._silent_ms.values())

    def begin(self, consumer: Any) -> None:
        for place in self._heard:
            self._heard[place] = consumer.last_poll_timestamp(place)
            self._silent_ms[place] = 0.0

    def listen(self, consumer: Any, waited_ms: float) -> None:
        for place, heard in self._heard.items():
            now = consumer.last_poll_timestamp(place)
            self._silent_ms[place] = self._silent_ms[place] + waited_ms if now == heard else 0.0
            self._heard[place] = now


async def _stop(subscriber: LogicSubscriber[Any]) -> None:
    consumer = subscriber.consumer
    if consumer is not None:
        await end_consumer(consumer, subscriber.stop())


def _refusal(error: KafkaError) -> LogRefused:
    if isinstance(error, OffsetOutOfRangeError):
        ((place, offset),) = error.args[0].items()
        return LogRefused(
            f"{name(place)} no longer has offset {offset}, so this is not the log that was read before, or it was "
            "cut: bring it back with `sluice log import`, or rebuild the read models from the log as it is with "
            "`sluice replay`"
        )
    if isinstance(error, CorruptRecordException):
        return LogRefused(f"a record batch does not fit its checksum: {error}: restore it with `sluice log import`")
    if isinstance(error, TopicAuthorizationFailedError):
        refusal = "Kafka does not allow this client to read"
        return LogRefused(f"{refusal} ({error}): give it the right to", told=f"{refusal}: give it the right to")
    return LogRefused(f"Kafka's answer cannot be read: {error!r}", told="Kafka's answer cannot be read")


def _gap(place: Place, *, expected: int, found: int) -> LogRefused:
    return LogRefused(
        f"{name(place)} has a gap: after offset {expected - 1} comes {found}, so facts are missing or something else "
        "wrote here: look with `sluice doctor`, and bring the log back with `sluice log import`"
    )
