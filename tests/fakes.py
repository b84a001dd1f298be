"""The log in memory: the same shapes, order and errors as services.eventlog gives over Kafka, without a broker.

One `FakeKafka` is what a broker and its disk are; each `FakeLog` opened on it is one process's way to it, so several
replicas share what they append. Faults are brought about on the `FakeKafka`: `stop`, `pause` and `resume`, or its
topics' records changed by hand. tests/contract/test_eventlog.py runs one suite on this and on Kafka.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from schemas.position import PARTITIONS_MAX
from schemas.records import NewRecord, StoredRecord
from services.eventlog import LogIdentity, LogOutcomeUnknown, LogRefused, LogSettings, LogUnavailable
from services.eventlog.identity import check_log_id, establish, new_created
from services.eventlog.protocol import PartitionBounds, check_size, not_there
from services.eventlog.topics import FACT_SETTINGS, FSYNC_SETTINGS, PROGRESS_SETTINGS, complain

_START_MS = 1_767_268_800_000


@dataclass
class FakePartition:
    """`start`: the first offset still there; a cut log has a `start` above 0. Offsets in `records` tell of gaps."""

    records: list[StoredRecord] = field(default_factory=list)
    start: int = 0

    @property
    def end(self) -> int:
        return self.records[-1].offset + 1 if self.records else self.start


@dataclass
class FakeTopic:
    settings: dict[str, str]
    partitions: list[FakePartition]


class FakeKafka:
    """A broker that is a dictionary. `now_ms` is its clock: a millisecond later at each append unless replaced."""

    def __init__(self, *, now_ms: Callable[[], int] | None = None) -> None:
        self.topics: dict[str, FakeTopic] = {}
        self._ticks = _START_MS
        self._now_ms = now_ms or self._tick
        self._up = asyncio.Event()
        self._up.set()
        self._answering = asyncio.Event()
        self._answering.set()
        self._arrived: set[asyncio.Event] = set()

    def stop(self) -> None:
        """From now on nobody can connect; nothing that is asked for happens."""
        self._up.clear()

    def pause(self) -> None:
        """From now on requests arrive, and are done and answered when it goes on."""
        self._answering.clear()

    def resume(self) -> None:
        """Up and answering again."""
        self._up.set()
        self._answering.set()

    async def answers(self) -> None:
        """Wait until it is there and answers."""
        await self._up.wait()
        await self._answering.wait()

    async def takes(self) -> None:
        """Wait until a request can be sent, which is not to say that it is answered."""
        await self._up.wait()

    @property
    def is_answering(self) -> bool:
        return self._up.is_set() and self._answering.is_set()

    def append(self, topic: str, partition: int, records: Sequence[NewRecord]) -> int:
        """What the broker does with a record batch; the offset of its first record."""
        place = self.topics[topic].partitions[partition]
        first, now_ms = place.end, self._now_ms()
        place.records += [
            StoredRecord(partition, first + index, now_ms, record.key, record.value, record.headers)
            for index, record in enumerate(records)
        ]
        for arrived in self._arrived:
            arrived.set()
        return first

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever something was appended."""
        arrived = asyncio.Event()
        self._arrived.add(arrived)
        try:
            yield arrived
        finally:
            self._arrived.discard(arrived)

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks


class FakeLog:
    """A Log on a FakeKafka."""

    def __init__(self, kafka: FakeKafka, settings: LogSettings) -> None:
        self.settings = settings
        self._kafka = kafka
        self._identity: LogIdentity | None = None
        self._writers: list[FakeWriter] = []
        self._sending: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, kafka: FakeKafka, settings: LogSettings) -> AsyncIterator["FakeLog"]:
        log = cls(kafka, settings)
        try:
            yield log
        finally:
            for task in log._sending:
                task.cancel()
            await asyncio.gather(*log._sending, *(writer.close() for writer in log._writers), return_exceptions=True)

    async def check_version(self) -> str:
        await self.answer()
        return "in memory"

    async def ensure_topics(self, *, partitions: int, replication_factor: int = 1, fsync: bool = False) -> None:
        if not 1 <= partitions <= PARTITIONS_MAX:
            raise LogRefused(f"{partitions} partitions cannot be had")
        await self.answer()
        if replication_factor > 1:
            raise LogRefused(f"{self.settings.topic} cannot have {replication_factor} replicas: there is one broker")
        facts = FACT_SETTINGS | (FSYNC_SETTINGS if fsync else {})
        topic = self._kafka.topics.setdefault(self.settings.topic, FakeTopic(dict(facts), []))
        progress = self._kafka.topics.setdefault(self.settings.progress_topic, FakeTopic(dict(PROGRESS_SETTINGS), []))
        if complaint := complain(self.settings.topic, topic.settings, facts, self.settings.bootstrap_servers):
            raise LogRefused(complaint)
        if len(topic.partitions) > partitions:
            raise LogRefused(f"{self.settings.topic} has {len(topic.partitions)} partitions, not {partitions}")
        for each in (topic, progress):
            each.partitions += [FakePartition() for _ in range(partitions - len(each.partitions))]

    async def ensure_created(self, *, partitions: int, source: str) -> LogIdentity:
        self._identity = await establish(
            self.reader(range(partitions)),
            self.writer(),
            topic=self.settings.topic,
            new_created=functools.partial(new_created, source=source),
        )
        return self._identity

    def reader(self, partitions: Sequence[int]) -> "FakeReader":
        return FakeReader(self, self._kafka, partitions)

    def writer(self) -> "FakeWriter":
        writer = FakeWriter(self._kafka, self.settings)
        self._writers.append(writer)
        return writer

    def publish_progress(self, partition: int, record: NewRecord) -> None:
        async def send() -> None:
            await self._kafka.answers()
            self._kafka.append(self.settings.progress_topic, partition, [record])

        task = asyncio.create_task(send())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def progress_reader(self, partitions: Sequence[int]) -> "FakeProgressReader":
        return FakeProgressReader(self._kafka, self.settings, partitions)

    def check_first(self, first: StoredRecord) -> None:
        if self._identity is not None:
            check_log_id(first, topic=self.settings.topic, log_id=self._identity.log_id)

    async def answer(self) -> None:
        """Wait for the broker, within the bound; raises LogUnavailable."""
        try:
            async with asyncio.timeout(self.settings.request_timeout_ms / 1000):
                await self._kafka.answers()
        except TimeoutError:
            away = f"no Kafka at {self.settings.bootstrap_servers}: is it up?"
            raise LogUnavailable(away, told="Kafka cannot be reached") from None


class FakeReader:
    """A LogReader in memory."""

    def __init__(self, log: FakeLog, kafka: FakeKafka, partitions: Sequence[int]) -> None:
        self.partitions = tuple(partitions)
        self.silent_ms = 0.0
        self._log = log
        self._kafka = kafka
        self._next: dict[int, int] = {}
        self._recognised = False
        self._closed = False

    async def first(self, partition: int) -> StoredRecord | None:
        await self._log.answer()
        place = self._partition(partition)
        if refused := not_there(self._name(partition), 0, PartitionBounds(place.start, place.end)):
            raise refused
        return place.records[0] if place.records else None

    async def seek(self, partition: int, offset: int) -> None:
        await self._log.answer()
        self._check_bounds(partition, offset)
        self._next[partition] = offset

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        assert self._next.keys() == set(self.partitions), "seek every partition before reading"
        if self._closed:
            raise LogUnavailable(f"this reader of {self._log.settings.topic} is closed")
        began = asyncio.get_running_loop().time()
        with self._kafka.listening() as arrived, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self._kafka.answers()
                self._recognise()
                self.silent_ms = 0.0
                while not (records := self._take(records_max)):
                    arrived.clear()
                    await arrived.wait()
                return records
        if not self._kafka.is_answering:
            self.silent_ms += (asyncio.get_running_loop().time() - began) * 1000
            if self.silent_ms >= self._log.settings.silence_ms_max:
                self._recognised = False
                raise LogUnavailable(f"no answer about {self._log.settings.topic}: is Kafka up?")
        return []

    async def ends(self) -> dict[int, int]:
        await self._log.answer()
        return {partition: self._partition(partition).end for partition in self.partitions}

    async def close(self) -> None:
        self._closed = True

    def _take(self, records_max: int) -> list[StoredRecord]:
        taken: list[StoredRecord] = []
        for partition in self.partitions:
            expected = self._next[partition]
            self._check_bounds(partition, expected)
            waiting = [record for record in self._partition(partition).records if record.offset >= expected]
            fitting = [record for index, record in enumerate(waiting) if record.offset == expected + index]
            if waiting and not fitting and not taken:
                raise LogRefused(
                    f"{self._name(partition)} has a gap: after offset {expected - 1} comes {waiting[0].offset}"
                )
            now = fitting[: records_max - len(taken)]
            taken += now
            self._next[partition] = expected + len(now)
        return taken

    def _recognise(self) -> None:
        """As after connecting: is this still the log we know?"""
        first = self._partition(self.partitions[0]).records[:1]
        if not self._recognised and first:
            self._log.check_first(first[0])
            self._recognised = True

    def _check_bounds(self, partition: int, offset: int) -> None:
        place = self._partition(partition)
        if refused := not_there(self._name(partition), offset, PartitionBounds(place.start, place.end)):
            raise refused

    def _partition(self, partition: int) -> FakePartition:
        return self._kafka.topics[self._log.settings.topic].partitions[partition]

    def _name(self, partition: int) -> str:
        return f"{self._log.settings.topic}/{partition}"


class FakeWriter:
    """A LogWriter in memory."""

    def __init__(self, kafka: FakeKafka, settings: LogSettings) -> None:
        self._kafka = kafka
        self._settings = settings
        self._turns: dict[int, asyncio.Lock] = {}
        self._landing: set[asyncio.Task[int]] = set()
        self._closed = False

    async def append(self, partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        if not records:
            raise ValueError("append needs at least one record")
        check_size(records)
        if self._closed:
            raise LogUnavailable("the writer is closed: nothing was sent")
        if partition >= len(self._kafka.topics[self._settings.topic].partitions):
            raise LogRefused(f"{self._settings.topic}/{partition} does not exist")
        landing: asyncio.Task[int] | None = None
        try:
            async with asyncio.timeout(timeout_s), self._turns.setdefault(partition, asyncio.Lock()):
                await self._kafka.takes()
                landing = asyncio.create_task(self._land(partition, records))
                self._landing.add(landing)
                landing.add_done_callback(self._landing.discard)
                return await asyncio.shield(landing)  # what was sent lands, whether or not anybody waits for it
        except TimeoutError:
            if landing:
                raise LogOutcomeUnknown(f"no answer in {timeout_s:g} s: it may have landed or may yet land") from None
            raise LogUnavailable(f"nothing was sent in {timeout_s:g} s: is Kafka up?") from None

    async def close(self) -> None:
        self._closed = True
        if self._landing:
            await asyncio.wait(self._landing, timeout=self._settings.close_timeout_s)
        for task in self._landing:
            task.cancel()

    async def _land(self, partition: int, records: Sequence[NewRecord]) -> int:
        await self._kafka.answers()
        return self._kafka.append(self._settings.topic, partition, records)


class FakeProgressReader:
    """A ProgressReader in memory: from the end as of the first read."""

    def __init__(self, kafka: FakeKafka, settings: LogSettings, partitions: Sequence[int]) -> None:
        self._kafka = kafka
        self._settings = settings
        self._partitions = tuple(partitions)
        self._next: dict[int, int] = {}

    async def read(self, *, records_max: int, timeout_ms: int) -> list[StoredRecord]:
        places = self._kafka.topics[self._settings.progress_topic].partitions
        for partition in self._partitions:
            self._next.setdefault(partition, places[partition].end)
        with self._kafka.listening() as arrived, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self._kafka.answers()
                while not (records := self._take(records_max)):
                    arrived.clear()
                    await arrived.wait()
                return records
        return []

    async def close(self) -> None:
        """Nothing to close."""

    def _take(self, records_max: int) -> list[StoredRecord]:
        taken: list[StoredRecord] = []
        for partition in self._partitions:
            place = self._kafka.topics[self._settings.progress_topic].partitions[partition]
            now = place.records[self._next[partition] :][: records_max - len(taken)]
            taken += now
            self._next[partition] += len(now)
        return taken
