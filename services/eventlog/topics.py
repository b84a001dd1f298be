"""The topics: made with the settings the contract names, and refused where they could lose facts.

Settings are altered by an import and by `mend` alone: Kafka's AlterConfigs, the only call the client has for it, resets
every setting it does not name, so all that were set are read first and named again. Who meets a wrong one gets the
value found and the command to run. Partitions are added when more are asked for, and never taken away, since ids name
their partition.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    InvalidPartitionsError,
    InvalidReplicationFactorError,
    KafkaError,
    TopicAlreadyExistsError,
    for_code,
)
from aiokafka.protocol.admin import ApiVersionRequest

from schemas.position import PARTITIONS_MAX
from services.eventlog.protocol import MESSAGE_BYTES_MAX, LogRefused, LogSettings, LogUnavailable

FACT_SETTINGS = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "message.timestamp.type": "LogAppendTime",
    "max.message.bytes": str(MESSAGE_BYTES_MAX),
}
FSYNC_SETTINGS = {"flush.messages": "1"}
IMPORT_SETTINGS = FACT_SETTINGS | {
    "message.timestamp.type": "CreateTime",
    "message.timestamp.before.max.ms": str(2**63 - 1),
    "message.timestamp.after.max.ms": str(2**63 - 1),
}
"""Those of a topic that takes records with the times they had elsewhere, whatever the clock here says."""
MENDED_BY = ": run `sluice doctor --mend`"
"""In a complaint: before it what is wrong, from it on what to do."""
PROGRESS_SETTINGS = {
    "cleanup.policy": "delete",
    "retention.ms": "3600000",
    "segment.ms": "600000",
    "message.timestamp.type": "LogAppendTime",  # else Kafka refuses, or drops at once, what a wrong clock stamped
}
_REPLICAS_WITH_QUORUM = 3

_SOURCE_TOPIC = 1
"""How DescribeConfigs calls a setting that was given to the topic itself (KIP-226)."""

_PRODUCE_API_KEY = 0
# The newest Produce request a release knows: the only thing about its age that this client can ask every broker.
_RELEASES = {9: "2.8 to 3.6", 10: "3.7", 11: "3.8 or 3.9", 12: "4.0"}
_PRODUCE_VERSION_MIN = 10
RELEASE_MIN = "3.7"


async def check_version(settings: LogSettings) -> str:
    """The release of the broker we reach, as far as it tells; LogRefused if it is older than 3.7."""
    client = AIOKafkaClient(
        bootstrap_servers=settings.bootstrap_servers,
        client_id=f"{settings.client_id}-version",
        request_timeout_ms=settings.request_timeout_ms,
    )
    try:
        async with asyncio.timeout(3 * settings.request_timeout_ms / 1000):
            await client.bootstrap()
            answer = await client.send(client.get_random_node(), ApiVersionRequest())
    except (KafkaError, OSError, TimeoutError) as error:
        raise _away(settings, error) from error
    finally:
        await client.close()
    return release(produce_version=max(newest for key, _, newest in answer.api_versions if key == _PRODUCE_API_KEY))


def release(*, produce_version: int) -> str:
    """The Kafka release that knows Produce up to this version; raises LogRefused if it is too old for Sluice."""
    named = _RELEASES.get(produce_version) or ("4.1 or newer" if produce_version > max(_RELEASES) else "before 2.8")
    if produce_version < _PRODUCE_VERSION_MIN:
        raise LogRefused(f"this Kafka is {named}, and Sluice needs {RELEASE_MIN} or newer: upgrade the brokers")
    return named


async def ensure_topics(settings: LogSettings, *, partitions: int, replication_factor: int, fsync: bool) -> None:
    """See `Log.ensure_topics`."""
    if not 1 <= partitions <= PARTITIONS_MAX:
        raise LogRefused(f"{partitions} partitions cannot be had: between 1 and {PARTITIONS_MAX}, since ids name them")
    facts = FACT_SETTINGS | (FSYNC_SETTINGS if fsync else {})
    async with _asking(settings) as topics:
        await topics.create(settings.topic, partitions, replication_factor, facts)
        await topics.create(settings.progress_topic, partitions, replication_factor, PROGRESS_SETTINGS)
        await topics.check(settings.topic, facts)
        await topics.widen(settings.topic, partitions, exactly=True)
        await topics.widen(settings.progress_topic, partitions, exactly=False)


@dataclass(frozen=True, slots=True)
class TopicFound:
    """The log's topic as it is. `complaint`: why its settings could lose or refuse facts, and what mends that."""

    partitions: int
    complaint: str | None


async def inspect(settings: LogSettings, *, fsync: bool) -> TopicFound | None:
    """Look at the log's topic and change nothing; None where there is none. Raises LogUnavailable."""
    admin = _admin(settings)
    try:
        async with asyncio.timeout(3 * settings.request_timeout_ms / 1000):
            await admin.start()
            topics = _Topics(admin, settings)
            if not await topics.exists(settings.topic):
                return None
            complaint = None
            try:
                await topics.check(settings.topic, FACT_SETTINGS | (FSYNC_SETTINGS if fsync else {}))
            except LogRefused as refusal:
                complaint = str(refusal)
            return TopicFound(await topics.count(settings.topic), complaint)
    except (KafkaError, OSError, TimeoutError) as error:
        raise _away(settings, error) from error
    finally:
        await admin.close()


async def begin_import(settings: LogSettings, *, partitions: int, replication_factor: int) -> None:
    """Have the log's topic, made now or empty or half imported, take records with their own times.

    Raises LogRefused, LogUnavailable.
    """
    async with _asking(settings) as topics:
        await topics.create(settings.topic, partitions, replication_factor, IMPORT_SETTINGS)
        await topics.widen(settings.topic, partitions, exactly=False)
        await topics.alter(settings.topic, IMPORT_SETTINGS)


async def end_import(settings: LogSettings, *, fsync: bool) -> None:
    """Give the log's topic the settings that a log has from now on. Raises LogRefused, LogUnavailable."""
    facts = FACT_SETTINGS | (FSYNC_SETTINGS if fsync else {})
    async with _asking(settings) as topics:
        await topics.alter(settings.topic, facts, without=IMPORT_SETTINGS.keys() - FACT_SETTINGS.keys())
        await topics.check(settings.topic, facts)


async def mend(settings: LogSettings, *, fsync: bool) -> list[str]:
    """Give the log's topic the settings that a log has where it has others; what was changed, a sentence each.

    Raises LogRefused where an import is at work or was broken off, LogUnavailable.
    """
    facts = FACT_SETTINGS | (FSYNC_SETTINGS if fsync else {})
    async with _asking(settings) as topics:
        if not await topics.exists(settings.topic):
            return []
        found = await topics.found(settings.topic, facts)
        wrong = _wrong(found, facts)
        if wrong and await topics.takes_import(settings.topic):
            raise LogRefused(
                f"nothing was mended: {settings.topic} has the settings of an import that is at work, or was broken "
                "off: wait for it, or run `sluice log import` again, which sets them right at its end"
            )
        if wrong:
            await topics.alter(settings.topic, wrong)
        return [f"{name} of {settings.topic} was {found.get(name)}, and is {wrong[name]} now" for name in wrong]


@contextlib.asynccontextmanager
async def _asking(settings: LogSettings) -> AsyncIterator["_Topics"]:
    admin = _admin(settings)
    try:
        async with asyncio.timeout(6 * settings.request_timeout_ms / 1000):
            await admin.start()
            yield _Topics(admin, settings)
    except (KafkaError, OSError, TimeoutError) as error:
        raise _away(settings, error) from error
    finally:
        await admin.close()


class _Topics:
    """The questions and wishes about topics, for one run of a function above."""

    def __init__(self, admin: AIOKafkaAdminClient, settings: LogSettings) -> None:
        self._admin = admin
        self._settings = settings

    async def create(self, topic: str, partitions: int, replicas: int, configs: Mapping[str, str]) -> None:
        """Create the topic unless it is there, and wait until its partitions have leaders."""
        # With three replicas or more, an acknowledged fact stands on two brokers at least.
        quorum = {"min.insync.replicas": "2"} if replicas >= _REPLICAS_WITH_QUORUM else {}
        wanted = NewTopic(topic, partitions, replicas, topic_configs={**configs, **quorum})
        answer = await self._admin.create_topics([wanted])
        for _, code, message in answer.topic_errors:
            error = for_code(code)
            if error is InvalidReplicationFactorError:
                raise LogRefused(f"{topic} cannot have {replicas} replicas: {message}")
            if code and error is not TopicAlreadyExistsError:
                raise LogRefused(f"Kafka does not create {topic}: {message or error.__name__}")
        await self._until_led(topic, 1)

    async def exists(self, topic: str) -> bool:
        return topic in await self._admin.list_topics()  # asking for it by name could make it

    async def check(self, topic: str, wanted: Mapping[str, str]) -> None:
        """Raises LogRefused where the topic's settings are not these."""
        found = await self.found(topic, wanted)
        if complaint := complain(topic, found, wanted, self._settings.bootstrap_servers):
            raise LogRefused(complaint)

    async def takes_import(self, topic: str) -> bool:
        """Whether the topic was given the settings that only an import gives, and takes away at its end."""
        given = await self._given(topic)
        return all(given.get(name) == IMPORT_SETTINGS[name] for name in IMPORT_SETTINGS.keys() - FACT_SETTINGS.keys())

    async def found(self, topic: str, wanted: Collection[str]) -> dict[str, str]:
        """What the topic has for these settings."""
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, dict.fromkeys(wanted))
        (answer,) = await self._admin.describe_configs([resource])
        (described,) = answer.to_object()["resources"]
        if described["error_code"]:
            raise for_code(described["error_code"])(described["error_message"])
        return {entry["config_names"]: entry["config_value"] for entry in described["config_entries"]}

    async def alter(self, topic: str, wanted: Mapping[str, str], *, without: Collection[str] = ()) -> None:
        """Give the topic these settings, and wait until it has them; those it was given before stay, but for the ones
        named by `without`. Bounded by the caller."""
        kept = {name: value for name, value in (await self._given(topic)).items() if name not in without}
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, kept | dict(wanted))
        (answer,) = await self._admin.alter_configs([resource])
        for code, message, *_ in answer.resources:
            if code:
                raise LogRefused(f"Kafka does not alter {topic}: {message or for_code(code).__name__}")
        # The broker learns of it from the controller a moment after the answer.
        while _wrong(await self.found(topic, wanted), wanted):  # noqa: ASYNC110  # it tells nobody when
            await asyncio.sleep(0.05)

    async def _given(self, topic: str) -> dict[str, str]:
        """The settings that were given to the topic itself, without the broker's and the defaults."""
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, None)
        (answer,) = await self._admin.describe_configs([resource])
        (described,) = answer.to_object()["resources"]
        if described["error_code"]:
            raise for_code(described["error_code"])(described["error_message"])
        return {
            entry["config_names"]: entry["config_value"]
            for entry in described["config_entries"]
            if entry["config_source"] == _SOURCE_TOPIC
        }

    async def widen(self, topic: str, partitions: int, *, exactly: bool) -> None:
        """Add what is missing to `partitions`; `exactly`: raises LogRefused where there are more."""
        found = len(await self._partitions(topic))
        if found > partitions and exactly:
            raise LogRefused(
                f"{topic} has {found} partitions, and {partitions} were asked for: partitions are never taken away, "
                f"since ids name them, so ask for {found}"
            )
        if found < partitions:
            with contextlib.suppress(InvalidPartitionsError):  # another starter was faster; the wait below tells
                await self._admin.create_partitions({topic: NewPartitions(partitions)})
        await self._until_led(topic, partitions)

    async def count(self, topic: str) -> int:
        """How many partitions the topic has."""
        return len(await self._partitions(topic))

    async def _until_led(self, topic: str, partitions: int) -> None:
        """Wait until the broker knows so many partitions with a leader; bounded by the caller."""
        while True:
            found = await self._partitions(topic)
            if len(found) >= partitions and all(each["leader"] >= 0 for each in found):
                return
            await asyncio.sleep(0.05)  # metadata can only be asked for, not awaited

    async def _partitions(self, topic: str) -> list[dict[str, Any]]:
        described = await self._admin.describe_topics([topic])
        return [each for found in described if not found["error_code"] for each in found["partitions"]]


def complain(topic: str, found: Mapping[str, str], wanted: Mapping[str, str], bootstrap_servers: str) -> str | None:
    """One sentence on the settings that are not as wanted, and, after MENDED_BY, what mends them; None if all are."""
    wrong = _wrong(found, wanted)
    if not wrong:
        return None
    are = ", ".join(f"{name}={found.get(name)} (must be {value})" for name, value in wrong.items())
    if wrong.keys() == {"message.timestamp.type"}:
        are += " as an import sets it that was broken off: run `sluice log import` again, or, if there was none"
    return (
        f"{topic} could lose or refuse facts, its settings are {are}{MENDED_BY}, or kafka-configs.sh "
        f"--bootstrap-server {bootstrap_servers} --alter --entity-type topics --entity-name {topic} "
        f"--add-config {','.join(f'{name}={value}' for name, value in wrong.items())}"
    )


def _wrong(found: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Those of `wanted` that are not so."""
    return {name: value for name, value in wanted.items() if not _serves(name, found.get(name), value)}


def _serves(name: str, found: str | None, wanted: str) -> bool:
    if name == "max.message.bytes":
        return found is not None and int(found) >= int(wanted)
    return found == wanted


def _admin(settings: LogSettings) -> AIOKafkaAdminClient:
    return AIOKafkaAdminClient(
        bootstrap_servers=settings.bootstrap_servers,
        client_id=f"{settings.client_id}-topics",
        request_timeout_ms=settings.request_timeout_ms,
    )


def _away(settings: LogSettings, error: Exception) -> LogUnavailable:
    return LogUnavailable(
        f"no Kafka at {settings.bootstrap_servers}: is it up? ({error!r})", told="Kafka cannot be reached"
    )
