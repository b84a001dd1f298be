"""Disks fill up, and are given room again: under the blob store, what does not fit is refused and what fits is kept;
Kafka and Postgres break down, are started again as `sluice up` does it, and nothing that was accepted is lost.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.embedded import EmbeddedKafka, EmbeddedPostgres
from tests.faults.real.clients import a_picture
from tests.faults.real.disks import SmallDisk
from tests.faults.real.scene import ALL, USERS, Places, Scene, a_scene
from tests.faults.real.servers import use_up_the_log
from tests.faults.real.supervised import Supervised

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine

BLOBS_BYTES = 160_000_000
"""Services start with 100 MB of room."""
SERVER_BYTES = 600_000_000
"""Kafka and Postgres start with 300 MB of room."""
NO_ROOM = "could not be started: the disk of "


async def test_a_full_disk_refuses_files_and_loses_none(places: Places, tmp_path: Path) -> None:
    async with (
        SmallDisk.mounted(tmp_path / "small", size_bytes=BLOBS_BYTES) as disk,
        a_scene(replace(places, blobs=disk.folder), seed=4) as scene,
    ):
        # Given a disk without any room
        await scene.start(*ALL)
        (client, *_) = await scene.join(users=["ada"])
        await client.open_batch(puts=2, posts=2)
        await scene.settle()
        await disk.fill()

        # When files come
        batch_id = await client.create()
        assert batch_id is not None
        scene.strike("blobs: disk full")
        large = a_picture("large") + b"\0" * 1_000_000
        refused = [await client.put_once(batch_id, large) for _ in range(3)]

        # Then they are refused, and taken when there is room
        assert {(asked.outcome, asked.code) for asked in refused} == {("fail", "storage_unavailable")}
        await disk.clear()
        taken = await client.put_once(batch_id, large)
        assert (taken.outcome, taken.code) == ("ok", None)
        await client.tell(batch_id, "seal")
        await scene.settle()
        assert await scene.reckoning() == []


@contextlib.asynccontextmanager
async def at_work(scene: Scene, server: Supervised) -> AsyncIterator[None]:
    """The services and their clients while the server's disk is full, then not; all is well again at the end."""
    await scene.start(*ALL)
    await scene.join(users=USERS[:2])
    async with scene.looking():
        async with scene.lively():
            await well(scene)
            yield
            await well(scene)
        await scene.settle()
    scene.evidence.away.extend(server.away)


async def well(scene: Scene) -> None:
    await scene.even()
    await scene.ready()


async def test_kafka_ends_on_a_full_disk_and_comes_back_with_room_on_it(
    data_dir: Path, database_url: str, tmp_path: Path
) -> None:
    async with (
        SmallDisk.mounted(data_dir / "kafka", size_bytes=SERVER_BYTES) as disk,
        Supervised(kafka := EmbeddedKafka(data_dir=data_dir)).running() as supervised,
        a_scene(Places(kafka.bootstrap_servers, database_url, tmp_path, "sluice"), seed=6) as scene,
    ):
        async with at_work(scene, supervised):
            await disk.fill()
            scene.strike("kafka: disk full")
            await supervised.said(NO_ROOM)
            await disk.clear()
            await supervised.said("ready again ")

        assert await scene.reckoning() == []
        assert not any(service.exits for service in scene.services.values())


async def test_postgres_refuses_on_a_full_disk_or_ends_and_comes_back_with_room_on_it(
    data_dir: Path, kafka: str, unique: str, tmp_path: Path
) -> None:
    async with (
        SmallDisk.mounted(data_dir / "postgres", size_bytes=SERVER_BYTES) as disk,
        Supervised(postgres := EmbeddedPostgres(data_dir=data_dir)).running() as supervised,
        a_scene(Places(kafka, postgres.url, tmp_path, unique), seed=7) as scene,
    ):
        async with at_work(scene, supervised):
            # Tables cannot grow
            await disk.fill()
            scene.strike("postgres: disk full")
            await scene.services["processor"].said("its disk is full")
            await disk.clear()
            await well(scene)
            assert supervised.lines == []

            # Not even its log can
            await disk.fill()
            scene.strike("postgres: disk full, and it ends")
            await use_up_the_log(postgres.url)
            await supervised.said(NO_ROOM)
            await disk.clear()
            await supervised.said("ready again ")

        assert await scene.reckoning() == []
        assert not any(service.exits for service in scene.services.values())
        lost = [line for line in scene.services["processor"].lines if "part_lost" in line and "part=database" in line]
        assert 1 <= len(lost) <= 3  # not at each try
