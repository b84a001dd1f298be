"""The wrong log or the wrong database: refused with one sentence that names what was found and the command to run, or
gone on with where that is right; at the start, and under services that run. All on real servers.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import TopicPartition

from schemas.batch import Batch, Upload
from schemas.events import UploadStarted
from services.api import health as api_health
from services.api.main import serving_api
from services.database import Database
from services.eventlog import EventLog, LogRefused, LogSettings, records_at
from services.eventlog.topics import FACT_SETTINGS, IMPORT_SETTINGS
from services.lifecycle import StartError
from services.notifier.main import notifying
from services.opening import open_stores
from services.processor.rows import Rows
from services.settings import Settings
from services.tailing import open_tail
from tests.integration.api_client import Person, a_picture, api_settings, code_of, ended, running_api
from tests.lanes import WAIT_S, Lane, a_lane
from tests.pausing import paused

TABLES = ("positions", "users", "user_starts", "upload_batches", "uploads", "deleted_batches", "batch_events")
EVERY_TABLE = ", ".join(f"gen_1.{name}" for name in TABLES)


@pytest.fixture
async def admin(kafka: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await client.start()
    yield client
    await client.close()


@pytest.fixture
async def lane(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Lane]:
    """One whose topic is named as the api's of `settings` are."""
    async with a_lane(kafka=kafka, database_url=database_url, unique=f"{unique}.events", folder=tmp_path) as made:
        yield made


@pytest.fixture
def settings(kafka: str, database_url: str, unique: str, tmp_path: Path) -> Settings:
    progress = f"{unique}.events.progress"
    return api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", progress_topic=progress
    )


def worked(batch: Batch, _uploads: dict[str, Upload]) -> bool:
    return batch.ended


async def refusal(settings: Settings) -> str:
    """Why a service does not start with these settings."""
    with pytest.raises(StartError) as refused:
        async with open_stores(settings, service="test") as stores, open_tail(settings, stores):
            pass
    return str(refused.value)


async def sql(database_url: str, *statements: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def cut(admin: AIOKafkaAdminClient, topic: str, *, before: int) -> None:
    """Delete the topic's first records."""
    await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=before)})


async def alter(admin: AIOKafkaAdminClient, topic: str, **changes: str) -> None:
    """Set the topic's settings to what they should be, but for these."""
    wanted = FACT_SETTINGS | {name.replace("_", "."): value for name, value in changes.items()}
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, wanted)])
    async with asyncio.timeout(WAIT_S):  # the broker learns of it a moment after the answer, and tells nobody
        while not wanted.items() <= (await settings_of(admin, topic)).items():  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.05)


async def settings_of(admin: AIOKafkaAdminClient, topic: str) -> dict[str, str]:
    """The topic's settings as the broker knows them by now."""
    (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic, None)])
    (described,) = answer.to_object()["resources"]
    return {entry["config_names"]: entry["config_value"] for entry in described["config_entries"]}


async def create_topic(admin: AIOKafkaAdminClient, topic: str, settings: dict[str, str]) -> None:
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=settings)])
    async with asyncio.timeout(WAIT_S):
        while topic not in await admin.list_topics():  # noqa: ASYNC110  # as with its settings
            await asyncio.sleep(0.05)


async def replace_topic(admin: AIOKafkaAdminClient, log: EventLog) -> None:
    """Another log under the same name."""
    topic = log.settings.topic
    await admin.delete_topics([topic])
    async with asyncio.timeout(WAIT_S):
        while topic in await admin.list_topics():  # noqa: ASYNC110  # Kafka tells nobody when a topic is gone
            await asyncio.sleep(0.05)
    async with EventLog.open(log.settings) as another:
        await another.ensure_topics(partitions=1)
        await another.ensure_created(partitions=1, source="test")


async def problems_of(url: str, expected: Callable[[list[str]], bool]) -> list[str]:
    """What /readyz says, once it says that; fails after a while."""
    async with asyncio.timeout(WAIT_S), httpx.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False) as anyone:
        while True:
            found: list[str] = (await anyone.get("/readyz")).json()["problems"]
            if expected(found):
                return found
            await asyncio.sleep(0.1)


def one_says(words: str) -> Callable[[list[str]], bool]:
    """Whether one of the problems contains these words."""
    return lambda found: any(words in each for each in found)


async def asked_until(ask: Callable[[], Awaitable[httpx.Response]], expected: int | str) -> httpx.Response:
    """The answer with this status, or this code; fails after a while."""
    async with asyncio.timeout(WAIT_S):
        while True:
            answer = await ask()
            if expected in (answer.status_code, answer.json().get("code")):
                return answer
            await asyncio.sleep(0.1)


# At the start


async def test_another_log_than_the_read_models_is_refused_and_replay_named(
    lane: Lane, settings: Settings, admin: AIOKafkaAdminClient
) -> None:
    log_id = await lane.log.identify()
    await sql(
        settings.database_url.get_secret_value(),
        f"INSERT INTO gen_1.positions (partition, log_id, next_offset, time_ms) VALUES (0, '{log_id}', 1, 0)",
    )

    await replace_topic(admin, lane.log)
    said = await refusal(settings)

    assert f"{settings.log_topic} in Kafka is the log " in said
    assert "`sluice replay`" in said
    assert "\n" not in said


async def test_a_log_that_lost_its_beginning_or_its_end_is_refused(
    lane: Lane, settings: Settings, admin: AIOKafkaAdminClient, database_url: str
) -> None:
    await lane.queue_pictures(["cat.png"])
    log_id = await lane.log.identify()

    await sql(
        database_url,
        f"INSERT INTO gen_1.positions (partition, log_id, next_offset, time_ms) VALUES (0, '{log_id}', 900, 0)",
    )
    without_end = await refusal(settings)
    await cut(admin, settings.log_topic, before=2)
    without_beginning = await refusal(settings)

    assert "ends at offset 4, but 900 was asked for" in without_end
    assert "`sluice log import`" in without_end
    assert "`sluice replay`" in without_end
    assert "begins at offset 2, so its first facts are gone" in without_beginning
    assert "`sluice log import`" in without_beginning


async def test_a_log_that_lost_its_end_and_grew_again_is_refused(
    lane: Lane, settings: Settings, database_url: str
) -> None:
    await lane.queue_pictures(["cat.png"])
    log_id = await lane.log.identify()
    async with contextlib.aclosing(records_at(lane.log, [(0, 2)])) as records:
        time_ms = (await anext(records)).timestamp_ms

    # The read models include a record 2 that was there a moment before the one that is there now.
    await sql(
        database_url,
        "INSERT INTO gen_1.positions (partition, log_id, next_offset, time_ms) "
        f"VALUES (0, '{log_id}', 3, {time_ms - 1})",
    )
    said = await refusal(settings)
    await sql(database_url, f"UPDATE gen_1.positions SET time_ms = {time_ms}")
    async with open_stores(settings, service="test"):
        pass

    assert f"{settings.log_topic} lost its end and grew again: the read models include its record 0-2" in said
    assert "`sluice replay`" in said
    assert "\n" not in said


async def test_topic_settings_that_could_lose_facts_are_refused_with_what_mends_them(
    settings: Settings, admin: AIOKafkaAdminClient
) -> None:
    wrong = {
        "retention_ms": "604800000",
        "retention_bytes": "1000000",
        "cleanup_policy": "compact",
        "message_timestamp_type": "CreateTime",
    }
    await create_topic(admin, settings.log_topic, FACT_SETTINGS)
    for name, value in wrong.items():
        setting = name.replace("_", ".")
        await alter(admin, settings.log_topic, **{name: value})

        said = await refusal(settings)

        assert f"{setting}={value} (must be {FACT_SETTINGS[setting]})" in said
        assert "run `sluice doctor --mend`, or kafka-configs.sh --bootstrap-server" in said
        assert f"--add-config {setting}={FACT_SETTINGS[setting]}" in said

    await alter(admin, settings.log_topic)
    async with open_stores(settings, service="test") as stores:
        assert await stores.topic_complaint() is None


async def test_settings_that_were_refused_are_accepted_when_they_are_mended(
    lane: Lane, settings: Settings, admin: AIOKafkaAdminClient
) -> None:
    await alter(admin, settings.log_topic, retention_ms="604800000", max_message_bytes="1000", segment_bytes="20000000")
    assert "`sluice doctor --mend`" in await refusal(settings)

    mended = await lane.log.mend()

    assert [line.partition(", and is ")[0] for line in mended] == [
        f"retention.ms of {settings.log_topic} was 604800000",
        f"max.message.bytes of {settings.log_topic} was 1000",
    ]
    assert await lane.log.mend() == []
    async with open_stores(settings, service="test") as stores:
        assert await stores.topic_complaint() is None
    assert (await settings_of(admin, settings.log_topic))["segment.bytes"] == "20000000", "what was given stays"


async def test_a_topic_that_is_being_imported_into_is_not_mended(
    settings: Settings, admin: AIOKafkaAdminClient
) -> None:
    await create_topic(admin, settings.log_topic, IMPORT_SETTINGS)
    where = LogSettings(bootstrap_servers=settings.kafka_bootstrap_servers, topic=settings.log_topic)
    async with EventLog.open(where) as log:
        with pytest.raises(LogRefused, match=r"nothing was mended.*run `sluice log import` again"):
            await log.mend()

        found = await log.inspect()

    assert found is not None
    assert found.complaint is not None
    assert "message.timestamp.type=CreateTime" in found.complaint


async def test_a_database_of_a_newer_version_is_used_where_that_says_so_and_refused_elsewhere(
    lane: Lane, settings: Settings, database_url: str
) -> None:
    newer = "INSERT INTO sluice_ops.migrations (name, sha256, compatible_from) VALUES"
    await sql(database_url, f"{newer} ('9998_wider.sql', 'x', '0002')")
    async with open_stores(settings, service="test") as stores:
        assert stores.log_id == await lane.log.identify()

    await sql(database_url, f"{newer} ('9999_other.sql', 'x', '9998')")
    said = await refusal(settings)

    assert "the database was migrated by a newer Sluice (9999_other.sql)" in said
    assert "start that version or a newer one" in said


@pytest.mark.parametrize(
    "row",
    [
        (
            "batch_events (partition, record_offset, batch_id, time_ms) "
            "VALUES (0, 1, '019c13a8-7b6e-7a31-9d5e-3f0c6b1d2a00', 0)"
        ),
        "user_starts (partition, user_id, last_started_offset) VALUES (0, 'ada', 1)",
    ],
    ids=["an event", "a start"],
)
async def test_rows_that_no_position_stands_for_are_refused_and_replay_named(
    lane: Lane, database_url: str, row: str
) -> None:
    await sql(database_url, f"INSERT INTO gen_1.{row}")
    rows = await Rows.live(lane.database)

    for _ in range(2):  # the first refusal changes nothing
        with pytest.raises(StartError, match=r"nothing says which position they stand for.*`sluice replay`"):
            await rows.lane(0, log_id="019c13a8-7b6e-7a31-9d5e-3f0c6b1d2a01")


# Under services that run


async def test_a_topic_that_is_replaced_under_running_services_ends_them_with_the_command_to_run(
    lane: Lane, settings: Settings, admin: AIOKafkaAdminClient
) -> None:
    process = await lane.start()
    await lane.said("lane_taken")
    stop = asyncio.Event()
    async with serving_api(settings) as api:
        serving = asyncio.create_task(api.until(stop))

        await replace_topic(admin, lane.log)

        with pytest.raises(StartError) as ended_with:
            await asyncio.wait_for(serving, WAIT_S)
    assert await asyncio.wait_for(process.wait(), WAIT_S) == 1
    await lane.said("service_failed")
    said = next(line for line in lane.lines if "service_failed" in line)
    for sentence in (said, str(ended_with.value)):
        assert "`sluice replay`" in sentence
        assert "`sluice log import`" in sentence


async def test_a_notifier_whose_tail_is_behind_is_not_ready(settings: Settings) -> None:
    told = settings.model_copy(update={"notifier_port": 0})
    hasty = told.model_copy(update={"tail_lag_max_s": 0.001})  # the end is looked at but twice a second

    async with notifying(told) as patient, notifying(hasty) as behind:
        (late,) = await problems_of(f"http://127.0.0.1:{behind.port}", one_says("the log was last read to its end"))
        await patient.tail.caught_up()
        well = await problems_of(f"http://127.0.0.1:{patient.port}", nothing)

    assert late.endswith(" s ago, so progress is told late")
    assert well == []


async def test_a_log_that_is_cut_and_settings_that_go_wrong_under_a_running_api_are_said(
    lane: Lane, settings: Settings, admin: AIOKafkaAdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_health, "TOPIC_LOOK_INTERVAL_S", 0.5)
    async with running_api(settings) as api:
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()

        await alter(admin, settings.log_topic, retention_ms="1000000")
        settings_said = await problems_of(api.url, one_says("retention.ms=1000000 (must be -1)"))
        await alter(admin, settings.log_topic)
        await problems_of(api.url, nothing)
        await cut(admin, settings.log_topic, before=1)
        await problems_of(api.url, one_says("its first facts are gone"))
        taken = await ada.put(batch_id, "a.jpg", a_picture())

    assert any("`sluice doctor`" in each for each in settings_said)
    assert taken.status_code == 202


LOST: dict[str, tuple[str, ...]] = {
    "its tables": ("DROP SCHEMA gen_1 CASCADE",),
    "one table": ("DROP TABLE gen_1.uploads CASCADE",),
    "everything": ("DROP SCHEMA gen_1 CASCADE", "DROP SCHEMA sluice_ops CASCADE"),
    "every row": (f"TRUNCATE {EVERY_TABLE} CASCADE",),
}


async def test_read_models_that_are_lost_under_running_services_come_back_by_themselves(
    lane: Lane, settings: Settings, database_url: str
) -> None:
    # Given services that run, and a batch that is done.
    process = await lane.start()
    async with running_api(settings) as api, notifying(settings.model_copy(update={"notifier_port": 0})) as notifier:
        ada, bob = await api.person("ada"), await api.person("bob")
        told = f"http://127.0.0.1:{notifier.port}"
        await problems_of(api.url, nothing)
        done = await _sent(ada, "a.jpg")
        expected = (await ada.get(f"/v1/batches/{done}/uploads")).json()

        # When all that Postgres holds is lost, in one way after the other.
        for what, statements in LOST.items():
            with paused(process.pid):  # else it may bring them back before anybody else has seen that they are gone
                await sql(database_url, *statements)
                await problems_of(api.url, one_says("read models"))

            # Then it is said, and everything is there again, as it was.
            await problems_of(api.url, nothing)
            await problems_of(told, nothing)
            found = await asked_until(lambda: ada.get(f"/v1/batches/{done}/uploads"), 200)
            assert found.json() == expected, what
        listed = (await ada.get("/v1/batches")).json()["items"]
        after = await _sent(bob, "b.jpg")
        views = await _rows_of_views(database_url)

    assert [each["id"] for each in listed] == [done]
    assert views == {"users": 2, "upload_batches": 2, "uploads": 2}
    assert after != done
    assert not any("Traceback" in line for line in lane.lines)


def nothing(found: list[str]) -> bool:
    return not found


async def _sent(person: Person, filename: str) -> str:
    """A batch of one file that was worked."""
    answer = await person.send("/v1/batches", {filename: a_picture()})
    assert answer.status_code == 202, answer.text
    batch_id = str(answer.json()["batch"]["id"])
    done = await ended(person, batch_id)
    await person.get("/v1/batches", min_position=done["position"])
    return batch_id


async def _rows_of_views(database_url: str) -> dict[str, int]:
    connection = await asyncpg.connect(database_url)
    try:
        return {
            view: await connection.fetchval(f"SELECT count(*) FROM public.{view}")
            for view in ("users", "upload_batches", "uploads")
        }
    finally:
        await connection.close()


async def test_while_the_read_models_are_gone_what_needs_them_is_refused_and_the_rest_goes_on(
    lane: Lane, settings: Settings, database_url: str
) -> None:
    async with running_api(settings) as api:
        ada = await api.person("ada")
        known = (await ada.send("/v1/batches", {"a.jpg": a_picture()})).json()["batch"]["id"]

        await sql(database_url, "DROP SCHEMA gen_1 CASCADE")
        await problems_of(api.url, one_says("the read models are gone from Postgres"))
        listed = await ada.get("/v1/batches")
        read = await ada.get(f"/v1/batches/{known}")
        taken = await ada.send("/v1/batches", {"b.jpg": a_picture()})
        status: dict[str, Any] = (await ada.get("/v1/status")).json()

    assert (listed.status_code, code_of(listed)) == (503, "database_unavailable")
    assert (read.status_code, taken.status_code) == (200, 202)
    assert status["mode"] == "degraded"
    assert status["processors"] == []


async def test_a_database_that_is_dropped_and_made_again_is_filled_from_the_log(
    lane: Lane, settings: Settings, database_url: str, unique: str, postgres: str
) -> None:
    await lane.start()
    async with running_api(settings) as api:
        ada = await api.person("ada")
        done = await _sent(ada, "a.jpg")
        with contextlib.suppress(Exception):
            await lane.database.close()

        await sql(postgres, f"DROP DATABASE {unique} WITH (FORCE)")
        await problems_of(api.url, one_says("database"))
        await sql(postgres, f"CREATE DATABASE {unique}")
        await problems_of(api.url, nothing)
        found = await asked_until(lambda: ada.get(f"/v1/batches/{done}"), 200)

    lane.database = await Database.open(database_url)
    assert (found.json()["status"], found.json()["processed_uploads"]) == ("failed", 1)


async def test_status_names_the_processor_at_work_and_the_age_of_the_oldest_unfinished_step(
    lane: Lane, settings: Settings
) -> None:
    async with running_api(settings) as api:
        ada = await api.person("ada")
        await ada.opens_batch()
        idle: dict[str, Any] = (await ada.get("/v1/status")).json()
        waiting = (await ada.send("/v1/batches", {"a.jpg": a_picture()})).json()["batch"]["id"]
        unfinished = (await ada.get("/v1/status")).json()["oldest_unfinished_s"]

        process = await lane.start()
        await ended(ada, waiting)
        working = await _status_when(ada, _works)
        process.terminate()
        await process.wait()
        gone = await _status_when(
            ada, lambda body: body["degraded"] and body["degraded"][0].startswith("no processor works: ")
        )

    assert idle["processors"] == []
    assert unfinished >= 0
    (processor,) = working["processors"]
    assert (processor["partition"], processor["problems"]) == (0, [])
    assert f"-{process.pid}-" in processor["worker_id"]
    assert processor["epoch"] > 0
    assert (gone["mode"], gone["processors"]) == ("degraded", [])


def _works(status: dict[str, Any]) -> bool:
    """Whether all is well: a processor was heard a moment ago, and nothing is left to do."""
    processors = status["processors"]
    heard = [each["state"] for each in processors if each["heard_s"] < 5 and each["problems"] == []]
    return (status["mode"], status["oldest_unfinished_s"], heard) == ("full", None, ["working"])


async def _status_when(person: Person, expected: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_S):
        while True:
            body: dict[str, Any] = (await person.get("/v1/status")).json()
            if expected(body):
                return body
            await asyncio.sleep(0.1)


async def test_an_older_backup_of_postgres_is_gone_on_with_and_the_rest_read_from_the_log(
    lane: Lane, database_url: str
) -> None:
    # Given a backup of the read models, after which more was done.
    early = await lane.queue_pictures(["cat.png"])
    await lane.start()
    await lane.until(early, worked)
    await sql(
        database_url,
        "CREATE SCHEMA backup",
        *(f"CREATE TABLE backup.{name} AS TABLE gen_1.{name}" for name in TABLES),
    )
    late = await lane.queue_pictures(["rocket.jpg"])
    expected = await lane.snapshot_when(late, worked)

    # When it is put in their place while the processor runs.
    await sql(
        database_url,
        "BEGIN",
        f"TRUNCATE {EVERY_TABLE} CASCADE",
        *(f"INSERT INTO gen_1.{name} SELECT * FROM backup.{name}" for name in TABLES),
        "COMMIT",
    )
    found = await lane.snapshot_when(late, lambda *found: found == (expected[0], expected[1]))

    # Then they hold what the log says, and nothing was worked again.
    assert {upload.attempts for upload in found[1].values()} == {1}
    starts = [fact for fact in await lane.facts() if isinstance(fact.event, UploadStarted)]
    assert len(starts) == 2
    await lane.said("an older state was put in their place")
