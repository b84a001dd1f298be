"""What services/eventlog takes for granted about Kafka, aiokafka and FastStream, tried on a real broker.

Each test holds one fact the design stands on, so an upgrade that changes the ground is seen here and not in a log that
lost something. Some facts are defects that are worked around: where such a test fails, the way around may go.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    CorruptRecordException,
    KafkaError,
    MessageSizeTooLargeError,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumber,
)
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.memory_records import MemoryRecords
from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from faststream.kafka import TopicPartition as Assigned

from services.embedded import EmbeddedKafka
from services.eventlog.client import end_consumer, end_producer, track_requests
from services.eventlog.protocol import GROUP_BYTES_MAX, MESSAGE_BYTES_MAX
from services.eventlog.topics import FACT_SETTINGS, PROGRESS_SETTINGS
from tests.contract.test_eventlog import until_only
from tests.pausing import paused

WAIT_S = 60.0
ENDED_S_MAX = 20.0
"""Less than the client takes by itself, which is for ever; more than the two seconds it should, on a busy machine."""


@contextlib.asynccontextmanager
async def an_admin(kafka: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


@pytest.fixture
async def topic(kafka: str, unique: str) -> str:
    """An empty topic of one partition with the settings of the log."""
    await make_topic(kafka, unique)
    return unique


async def make_topic(kafka: str, topic: str, **changes: str) -> None:
    configs = FACT_SETTINGS | {name.replace("_", "."): value for name, value in changes.items()}
    async with an_admin(kafka) as admin:
        await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=configs)])
        async with asyncio.timeout(WAIT_S):  # the broker learns of it a moment after the answer, and tells nobody
            while topic not in await admin.list_topics():  # noqa: ASYNC110  # see above
                await asyncio.sleep(0.02)


async def settings_of(kafka: str, topic: str) -> dict[str, str]:
    async with an_admin(kafka) as admin:
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    (described,) = answer.to_object()["resources"]
    return {entry["config_names"]: entry["config_value"] for entry in described["config_entries"]}


def a_producer(kafka: str, **changes: Any) -> AIOKafkaProducer:
    return AIOKafkaProducer(
        **{
            "bootstrap_servers": kafka,
            "enable_idempotence": True,
            "acks": "all",
            "max_batch_size": MESSAGE_BYTES_MAX,
            "max_request_size": MESSAGE_BYTES_MAX,
            **changes,
        }
    )


async def append(producer: AIOKafkaProducer, topic: str, *values: bytes) -> Any:
    """Send one record batch; the answer's metadata."""
    return await (await producer.send_batch(a_batch(producer, *values), topic, partition=0))


def a_batch(producer: AIOKafkaProducer, *values: bytes) -> Any:
    batch = producer.create_batch()
    for value in values:
        assert batch.append(timestamp=None, key=None, value=value, headers=[])
    batch.close()
    return batch


async def append_all(kafka: str, topic: str, *values: bytes) -> None:
    async with a_producer(kafka) as producer:
        await append(producer, topic, *values)


@contextlib.asynccontextmanager
async def a_consumer(kafka: str, topic: str, **changes: Any) -> AsyncIterator[AIOKafkaConsumer]:
    """As services/eventlog pulls: assigned, no group, no reset of offsets, at offset 0."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="none", enable_auto_commit=False, **changes)
    consumer.assign([TopicPartition(topic, 0)])
    async with consumer:
        consumer.seek(TopicPartition(topic, 0), 0)
        yield consumer


# Reading


async def test_without_a_reset_policy_an_offset_out_of_range_is_an_error(kafka: str, topic: str) -> None:
    async with a_consumer(kafka, topic) as consumer:
        consumer.seek(TopicPartition(topic, 0), 5)

        with pytest.raises(OffsetOutOfRangeError) as refused:
            await consumer.getmany(timeout_ms=10_000)

    assert refused.value.args[0] == {TopicPartition(topic, 0): 5}


async def test_with_the_default_policy_an_offset_out_of_range_skips_to_the_end(kafka: str, topic: str) -> None:
    await append_all(kafka, topic, b"a", b"b")
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka)
    consumer.assign([TopicPartition(topic, 0)])
    async with consumer:
        consumer.seek(TopicPartition(topic, 0), 5)

        async with asyncio.timeout(WAIT_S):
            while await consumer.position(TopicPartition(topic, 0)) == 5:
                assert await consumer.getmany(timeout_ms=100) == {}
        assert await consumer.position(TopicPartition(topic, 0)) == 2
        assert await consumer.getmany(timeout_ms=300) == {}


async def test_getmany_gives_what_one_fetch_brought_and_tells_of_what_is_left(kafka: str, topic: str) -> None:
    async with a_producer(kafka) as producer:
        for _ in range(4):
            await append(producer, topic, *[b"x" * 1_000] * 100)
    place = TopicPartition(topic, 0)

    async with a_consumer(kafka, topic, max_partition_fetch_bytes=150_000) as consumer:
        fetched = await consumer.getmany(timeout_ms=10_000, max_records=1_000)

        assert len(fetched[place]) == 100
        assert consumer.highwater(place) == 400


async def test_a_record_batch_larger_than_a_fetch_comes_whole(kafka: str, topic: str) -> None:
    await append_all(kafka, topic, *[b"x" * 1_000] * 100)

    async with a_consumer(kafka, topic, max_partition_fetch_bytes=1) as consumer:
        fetched = await consumer.getmany(timeout_ms=10_000, max_records=1_000)

    assert len(fetched[TopicPartition(topic, 0)]) == 100


async def test_the_time_of_the_last_answer_moves_on_while_nothing_comes(kafka: str, topic: str) -> None:
    place = TopicPartition(topic, 0)
    async with a_consumer(kafka, topic, fetch_max_wait_ms=50) as consumer:
        heard = set()
        async with asyncio.timeout(WAIT_S):
            while len(heard) <= 3:
                await consumer.getmany(timeout_ms=50)
                heard.add(consumer.last_poll_timestamp(place))


async def test_a_question_waits_behind_the_fetch_in_flight(kafka: str, topic: str) -> None:
    """Why questions about offsets have a connection of their own."""
    places = [TopicPartition(topic, 0)]
    async with (
        a_consumer(kafka, topic, fetch_max_wait_ms=1_000) as reading,
        AIOKafkaConsumer(bootstrap_servers=kafka) as idle,
    ):
        await idle.end_offsets(places)
        await reading.getmany(timeout_ms=100)

        # The machine may stand still while the fetch comes to its end, or while an answer is on its way.
        behind_s = max([await seconds(reading.end_offsets(places)) for _ in range(3)])
        alone_s = min([await seconds(idle.end_offsets(places)) for _ in range(3)])

    assert behind_s > 0.4
    assert alone_s < 0.4


async def seconds(step: Any) -> float:
    began = time.monotonic()
    await step
    return time.monotonic() - began


async def test_a_handler_that_fails_loses_its_record_for_good(kafka: str, topic: str) -> None:
    """Why records are pulled: FastStream's default policy commits before the handler has done anything."""
    await append_all(kafka, topic, b"one", b"two", b"three")
    broker = KafkaBroker(kafka, allow_auto_create_topics=False, logger=None)
    seen: list[str] = []
    done = asyncio.Event()

    @broker.subscriber(topic, group_id=topic, auto_offset_reset="earliest")
    async def handle(body: str) -> None:
        seen.append(body)
        if body == "three":
            done.set()
        if body == "two":
            raise ValueError(body)

    async with broker:
        await broker.start()
        async with asyncio.timeout(30):
            await done.wait()

    async with AIOKafkaConsumer(topic, bootstrap_servers=kafka, group_id=topic) as again:
        assert await again.committed(TopicPartition(topic, 0)) == 3
    assert seen == ["one", "two", "three"], "nothing is tried again"


async def test_a_subscriber_without_a_handler_can_be_pulled_and_started_after_its_broker(
    kafka: str, topic: str
) -> None:
    await append_all(kafka, topic, b"0")
    broker = KafkaBroker(kafka, consumer_only=True, allow_auto_create_topics=False, logger=None)
    async with broker:
        subscriber = broker.subscriber(
            partitions=[Assigned(topic, 0, declare=False)], auto_offset_reset="none", persistent=False
        )
        await subscriber.start()
        assert subscriber.consumer
        subscriber.consumer.seek(TopicPartition(topic, 0), 0)

        fetched = await subscriber.consumer.getmany(timeout_ms=10_000)

        await subscriber.stop()
    assert [record.value for record in fetched[TopicPartition(topic, 0)]] == [b"0"]


async def test_a_subscriber_left_to_its_defaults_makes_a_topic_that_expires_records(kafka: str, unique: str) -> None:
    """Why topics are made by `ensure_topics` alone, and subscribers declare nothing."""
    broker = KafkaBroker(kafka, logger=None)
    async with broker:
        await broker.subscriber(partitions=[Assigned(unique, 0)], auto_offset_reset="none").start()

    assert (await settings_of(kafka, unique))["retention.ms"] == "604800000"


async def test_ping_is_true_although_the_consumer_is_dead(kafka: str, topic: str) -> None:
    """Why readiness is progress, not a ping."""
    broker = KafkaBroker(kafka, allow_auto_create_topics=False, logger=None)
    async with broker:
        await broker.start()
        subscriber = broker.subscriber(partitions=[Assigned(topic, 0, declare=False)], auto_offset_reset="none")
        await subscriber.start()
        assert subscriber.consumer
        subscriber.consumer.seek(TopicPartition(topic, 0), 0)
        subscriber.consumer._fetcher._fetch_task.cancel()

        await append_all(kafka, topic, b"never read")

        assert await subscriber.consumer.getmany(timeout_ms=500) == {}
        assert await broker.ping(timeout=WAIT_S)


async def test_a_record_whose_bytes_changed_on_the_disk_is_an_error(kafka: str, topic: str) -> None:
    async with a_consumer(kafka, topic, check_crcs=True) as consumer:
        send = consumer._client.send

        async def spoiled(node: Any, request: Any, **named: Any) -> Any:
            answer = await send(node, request, **named)
            if isinstance(request, FetchRequest):
                for _, partitions in answer.topics:
                    for index, partition in enumerate(partitions):
                        partitions[index] = (*partition[:-1], partition[-1].replace(b"fact", b"fake"))
            return answer

        consumer._client.send = spoiled
        await append_all(kafka, topic, b"a fact")

        with pytest.raises(CorruptRecordException):
            await first_record(consumer)


async def first_record(consumer: AIOKafkaConsumer) -> Any:
    async with asyncio.timeout(20):
        return await consumer.getone()


# Writing


async def test_a_batch_lands_as_one_record_batch(kafka: str, topic: str) -> None:
    async with a_producer(kafka) as producer:
        landed = await append(producer, topic, *[b"%d" % index for index in range(1_000)])

    batches = await stored_batches(kafka, topic)
    assert landed.offset == 0
    assert [(batch.base_offset, batch.next_offset) for batch in batches] == [(0, 1_000)]


async def test_batches_are_not_joined_nor_split(kafka: str, topic: str) -> None:
    async with a_producer(kafka, linger_ms=50) as producer:
        answers = [
            await producer.send_batch(a_batch(producer, *[b"x"] * size), topic, partition=0) for size in (3, 1, 2)
        ]
        landed = [await answer for answer in answers]

    assert [each.offset for each in landed] == [0, 3, 4]
    assert [batch.next_offset for batch in await stored_batches(kafka, topic)] == [3, 4, 6]


async def stored_batches(kafka: str, topic: str) -> list[Any]:
    """The record batches of partition 0 as they lie in the log."""
    client = AIOKafkaClient(bootstrap_servers=kafka)
    await client.bootstrap()
    try:
        await client.add_topic(topic)
        leader = client.cluster.leader_for_partition(TopicPartition(topic, 0))
        request = FetchRequest(1_000, 1, 10_000_000, 0, [(topic, [(0, 0, 10_000_000)])])
        answer = await client.send(leader, request)
    finally:
        await client.close()
    records = MemoryRecords(answer.topics[0][1][0][-1])
    batches = []
    while records.has_next():
        batches.append(records.next_batch())
    return batches


async def test_a_builder_refuses_what_does_not_fit_but_not_its_first_record(kafka: str) -> None:
    """Why sizes are checked before: a first record of any size would be taken and then refused by the broker."""
    async with a_producer(kafka) as producer:
        batch = producer.create_batch()
        assert batch.append(timestamp=None, key=None, value=b"x" * (MESSAGE_BYTES_MAX + 1), headers=[])
        assert batch.append(timestamp=None, key=None, value=b"", headers=[]) is None

        within = producer.create_batch()
        assert within.append(timestamp=None, key=None, value=b"x" * (GROUP_BYTES_MAX - 64), headers=[])
        assert within.size() <= MESSAGE_BYTES_MAX


async def test_a_batch_the_broker_refuses_poisons_the_producer_for_good(kafka: str, unique: str) -> None:
    """aiokafka#1017: the sequence numbers of the refused batch are used up, and the broker waits for them."""
    await make_topic(kafka, unique, max_message_bytes="10000")
    async with a_producer(kafka) as producer:
        await append(producer, unique, b"fits")
        with pytest.raises(MessageSizeTooLargeError):
            await append(producer, unique, b"x" * 20_000)

        for _ in range(2):
            with pytest.raises(OutOfOrderSequenceNumber):
                await append(producer, unique, b"fits again")


@pytest.mark.parametrize("settings", [FACT_SETTINGS, PROGRESS_SETTINGS], ids=["facts", "progress"])
async def test_the_time_is_the_brokers_whatever_the_client_says(
    kafka: str, unique: str, settings: dict[str, str]
) -> None:
    topic = unique
    async with an_admin(kafka) as admin:
        await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=settings)])
    far_ms = 4_102_444_800_000  # the year 2100: with CreateTime the broker would refuse it, and poison the producer
    async with a_producer(kafka) as producer:
        batch = producer.create_batch()
        batch.append(timestamp=far_ms, key=None, value=b"x", headers=[])
        batch.close()
        await (await producer.send_batch(batch, topic, partition=0))

    async with a_consumer(kafka, topic) as consumer:
        (record,) = (await consumer.getmany(timeout_ms=10_000))[TopicPartition(topic, 0)]
    assert record.timestamp_type == 1
    assert abs(record.timestamp / 1000 - time.time()) < 60


async def test_a_transaction_takes_an_offset_that_no_reader_is_given(kafka: str, topic: str) -> None:
    """Why there are none: a log with markers in it has gaps."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=topic)
    async with producer:
        for value in (b"a", b"b"):
            async with producer.transaction():
                await producer.send_and_wait(topic, value, partition=0)

    async with a_consumer(kafka, topic) as consumer:
        offsets: list[int] = []
        async with asyncio.timeout(20):
            while len(offsets) < 2:
                fetched = await consumer.getmany(timeout_ms=1_000)
                offsets += [record.offset for found in fetched.values() for record in found]
    assert offsets == [0, 2]


async def test_altering_a_setting_resets_those_it_does_not_name(kafka: str, topic: str) -> None:
    """Why all settings that were given are named again when one is altered."""
    assert (await settings_of(kafka, topic))["retention.ms"] == "-1"

    async with an_admin(kafka) as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.bytes": "-1"})])

    async with asyncio.timeout(WAIT_S):  # the broker learns of it a moment after the answer
        while (changed := await settings_of(kafka, topic))["retention.ms"] == "-1":
            pass
    assert (changed["retention.ms"], changed["message.timestamp.type"]) == ("604800000", "CreateTime")


# A broker that does not answer


@pytest.fixture(scope="module")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedKafka]:
    """A broker that tests may pause; whoever does, lets it go on."""
    async with EmbeddedKafka(data_dir=tmp_path_factory.mktemp("fragile")) as server:
        yield server


async def test_an_idempotent_batch_never_expires_and_stop_waits_for_it(fragile: EmbeddedKafka, unique: str) -> None:
    """Why a producer is ended by `end_producer`, and why a caller's timeout means that the outcome is unknown."""
    await make_topic(fragile.bootstrap_servers, unique)
    producer = a_producer(fragile.bootstrap_servers, request_timeout_ms=300)
    async with producer:
        await append(producer, unique, b"a")
        with paused(fragile.pid):
            answer = await producer.send_batch(a_batch(producer, b"b"), unique, partition=0)
            stopping = asyncio.create_task(producer.stop())
            done, _ = await asyncio.wait({answer, stopping}, timeout=2)
            assert done == set(), "neither failed nor stopped, after several of its timeouts"

        async with asyncio.timeout(30):
            await stopping
        assert (await answer).offset == 1, "it landed once, although it was sent several times"


async def test_a_producer_ended_while_the_broker_is_paused_leaves_no_task(fragile: EmbeddedKafka, unique: str) -> None:
    await make_topic(fragile.bootstrap_servers, unique)
    before = asyncio.all_tasks()
    producer = a_producer(fragile.bootstrap_servers, request_timeout_ms=500)
    track_requests(producer)
    await producer.start()
    await append(producer, unique, b"a")

    with paused(fragile.pid):
        sent = await producer.send_batch(a_batch(producer, b"b"), unique, partition=0)
        await asyncio.wait({sent}, timeout=1.2)  # beyond its request's timeout: it waits for its next try
        took_s = await seconds(end_producer(producer, grace_s=0.1))

    assert took_s < ENDED_S_MAX
    with pytest.raises(KafkaError, match="ProducerClosed"):
        await sent
    await until_only(before)


async def test_a_consumer_ended_while_the_broker_is_paused_leaves_no_task(fragile: EmbeddedKafka, unique: str) -> None:
    await make_topic(fragile.bootstrap_servers, unique)
    before = asyncio.all_tasks()
    consumer = AIOKafkaConsumer(bootstrap_servers=fragile.bootstrap_servers, request_timeout_ms=500)
    consumer.assign([TopicPartition(unique, 0)])
    await consumer.start()
    await consumer.getmany(timeout_ms=100)

    with paused(fragile.pid):
        assert await consumer.getmany(timeout_ms=1_200) == {}, "no error tells that the broker is away"
        took_s = await seconds(end_consumer(consumer, consumer.stop()))

    assert took_s < ENDED_S_MAX
    await until_only(before)


# FastStream's ASGI application


async def test_faststreams_asgi_application_refuses_web_sockets() -> None:
    """Why the ASGI applications are our own."""
    application = AsgiFastStream(KafkaBroker("127.0.0.1:1", logger=None))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await application({"type": "websocket", "path": "/v1/ws", "headers": []}, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]
