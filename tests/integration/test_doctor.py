"""What `sluice doctor` finds on real servers: topics that could lose facts, stores that do not belong together."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from services.cli import ailments_there
from services.cli.checkup import Ailing, Check, NotNeeded, Patient
from services.settings import Settings
from tests.lanes import WAIT_S, Lane, a_lane


def patient(*, kafka: str, database_url: str, topic: str) -> Patient:
    settings = Settings(
        kafka_bootstrap_servers=kafka, database_url=database_url, log_topic=topic, progress_topic=f"{topic}.progress"
    )
    return Patient(Path(), settings, {}, frozenset({"kafka_bootstrap_servers", "database_url"}))


async def projected(lane: Lane) -> None:
    await lane.start()
    await lane.until(await lane.queue_pictures(["cat.png"]), lambda batch, _: batch.ended)


async def well(check: Check, examined: Patient) -> str:
    """What a check says once it finds nothing: a processor says each second how it is, and may be late."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(Ailing, NotNeeded):
                return await check(examined)
            await asyncio.sleep(0.1)


async def test_servers_that_work_together_are_well(kafka: str, database_url: str, unique: str, tmp_path: Path) -> None:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as lane:
        await projected(lane)
        examined = patient(kafka=kafka, database_url=database_url, topic=unique)

        found = {name: await well(check, examined) for name, check in ailments_there.THERE if name != "services"}

    assert found["kafka"].endswith(f"answers at {kafka}")
    assert found["topic"] == f"{unique} keeps everything, in 1 partition(s)"
    assert "with Sluice's tables" in found["postgres"]
    assert found["processors"].endswith(" at work")
    assert found["same log"].endswith("; the read models are 0 records behind it")
    assert "differ by less than" in found["clocks"]


async def test_tables_that_are_gone_are_named(kafka: str, database_url: str, unique: str, tmp_path: Path) -> None:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as lane:
        async with lane.database.connection() as connection:
            await connection.execute("DROP TABLE gen_1.users CASCADE")

        with pytest.raises(Ailing, match=r"tables are gone: gen_1\.users, public\.users") as found:
            await ailments_there.database(patient(kafka=kafka, database_url=database_url, topic=unique))

    assert "start a processor" in found.value.mend


async def test_views_that_do_not_show_the_live_tables_are_named(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    examined = patient(kafka=kafka, database_url=database_url, topic=unique)
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as lane:
        async with lane.database.connection() as connection:
            await connection.execute("CREATE SCHEMA gen_0; CREATE TABLE gen_0.users (id text)")
            await connection.execute("CREATE OR REPLACE VIEW public.users AS SELECT id FROM gen_0.users")

        with pytest.raises(Ailing, match=r"public\.users shows gen_0\.users") as found:
            await ailments_there.database(examined)

    assert found.value.mend == "run `sluice doctor --mend`"


async def test_a_fresh_start_is_well_and_nothing_is_made_by_looking(kafka: str, database_url: str, unique: str) -> None:
    examined = patient(kafka=kafka, database_url=database_url, topic=unique)

    for _ in range(2):  # the second look finds what the first one found
        assert await ailments_there.topic(examined) == f"there is no {unique} yet; the first start makes it"
        assert "without tables yet" in await ailments_there.database(examined)
        with pytest.raises(NotNeeded):
            await ailments_there.same_log(examined)


async def test_a_topic_that_would_lose_facts_is_told_with_the_command_that_mends_it(
    kafka: str, database_url: str, unique: str
) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    await admin.create_topics([NewTopic(unique, 1, 1, topic_configs={"retention.ms": "604800000"})])
    await admin.close()

    with pytest.raises(Ailing, match=r"could lose.*retention\.ms=604800000 \(must be -1\)") as found:
        await ailments_there.topic(patient(kafka=kafka, database_url=database_url, topic=unique))

    assert found.value.mend.startswith(
        f"run `sluice doctor --mend`, or kafka-configs.sh --bootstrap-server {kafka} --alter"
    )
    assert "retention.ms=-1" in found.value.mend


async def test_read_models_of_another_log_are_told(kafka: str, database_url: str, unique: str, tmp_path: Path) -> None:
    async with a_lane(kafka=kafka, database_url=database_url, unique=unique, folder=tmp_path) as lane:
        await projected(lane)
    (tmp_path / "other").mkdir()
    other = f"{unique}other"
    async with a_lane(kafka=kafka, database_url=database_url, unique=other, folder=tmp_path / "other"):
        with pytest.raises(Ailing, match="has the read models of the log") as found:
            await ailments_there.same_log(patient(kafka=kafka, database_url=database_url, topic=other))

    assert "SLUICE_DATABASE_URL" in found.value.mend
    with pytest.raises(Ailing, match="Kafka has no log"):
        await ailments_there.same_log(patient(kafka=kafka, database_url=database_url, topic=f"{unique}none"))
