"""Kafka and Postgres are paused, killed and restarted under clients at work, and connections are cut just at COMMIT."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.checking.processes import NOTICED_WITHIN_S
from tests.faults.real.proxy import Cut, Proxy
from tests.faults.real.scene import ALL, Places, Scene, a_scene
from tests.faults.real.servers import Breakable, let_pass

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine

LONG_S = NOTICED_WITHIN_S + 2
"""So long that nobody may say ready at the end of it."""

ASKED_WITHIN_S = 1.0
"""By then each service waits for an answer of a server that fell silent, and has not given it up yet."""
STOPPED_WITHIN_S = 25
"""What may take five seconds each: a question, giving its connection back, and closing the others."""


@pytest.fixture
async def own_kafka(data_dir: Path) -> AsyncIterator[Breakable]:
    async with Breakable("kafka", data_dir=data_dir).running() as server:
        yield server


@pytest.fixture
async def own_postgres(data_dir: Path) -> AsyncIterator[Breakable]:
    async with Breakable("postgres", data_dir=data_dir).running() as server:
        yield server


@contextlib.asynccontextmanager
async def at_work(scene: Scene, server: Breakable) -> AsyncIterator[None]:
    """The services and their clients while a server is broken; then the reckoning."""
    server.on_strike = scene.strike
    await scene.start(*ALL)
    await scene.join()
    async with scene.looking():
        async with scene.lively():
            await quiet(scene)
            yield
        await scene.settle()
    scene.evidence.away.extend(server.away)


async def quiet(scene: Scene) -> None:
    """All is well again; what each process holds now is to be no more than before."""
    await scene.even()
    await scene.ready()
    await scene.note_usage()


async def test_kafka_is_paused_and_killed_and_restarted(
    own_kafka: Breakable, database_url: str, tmp_path: Path
) -> None:
    places = Places(
        kafka=own_kafka.server.bootstrap_servers, database_url=database_url, folder=tmp_path, unique="sluice"
    )
    async with a_scene(places, seed=1) as scene:
        async with at_work(scene, own_kafka):
            await own_kafka.pause(LONG_S)
            await quiet(scene)
            await own_kafka.kill()
            await quiet(scene)
            await own_kafka.restart()
            await quiet(scene)

        assert await scene.reckoning() == []


async def test_postgres_is_paused_and_killed_and_restarted(
    own_postgres: Breakable, kafka: str, unique: str, tmp_path: Path
) -> None:
    places = Places(kafka=kafka, database_url=own_postgres.server.url, folder=tmp_path, unique=unique)
    async with a_scene(places, seed=2) as scene:
        async with at_work(scene, own_postgres):
            await own_postgres.pause(LONG_S)
            await quiet(scene)
            await own_postgres.kill()
            await quiet(scene)
            await own_postgres.restart()
            await quiet(scene)

        assert await scene.reckoning() == []


async def test_whoever_is_told_to_stop_while_postgres_is_silent_stops(
    own_postgres: Breakable, kafka: str, unique: str, tmp_path: Path
) -> None:
    places = Places(kafka=kafka, database_url=own_postgres.server.url, folder=tmp_path, unique=unique)
    await stopped_in_silence(own_postgres, places)


async def test_whoever_is_told_to_stop_while_kafka_is_silent_stops(
    own_kafka: Breakable, database_url: str, tmp_path: Path
) -> None:
    kafka = own_kafka.server.bootstrap_servers
    await stopped_in_silence(own_kafka, Places(kafka, database_url, tmp_path, "sluice"))


async def stopped_in_silence(server: Breakable, places: Places) -> None:
    """Every service is told to stop while none of them gets an answer; clients come before and after."""
    async with a_scene(places, seed=9) as scene:
        server.on_strike = scene.strike
        await scene.start(*ALL)
        await scene.join()
        async with scene.looking():
            async with scene.lively():
                await quiet(scene)

            pausing = asyncio.create_task(server.pause(STOPPED_WITHIN_S))
            await let_pass(ASKED_WITHIN_S)
            for service in scene.services.values():
                service.send(signal.SIGTERM)
            for service in scene.services.values():
                await service.until(lambda service=service: service.exits == [0], "its end")
            assert not pausing.done(), f"somebody waited for {server.part}"
            await pausing

            async with scene.lively():
                await quiet(scene)
            await scene.settle()
        scene.evidence.away.extend(server.away)
        assert await scene.reckoning() == []


async def test_connections_are_cut_just_before_and_just_after_a_commit_was_carried_out(places: Places) -> None:
    cuts: list[Cut] = ["before the commit", "after the commit"] * 4
    where = urlsplit(places.database_url)
    assert where.port is not None
    async with Proxy(target_port=where.port).carrying() as proxy:
        through = where._replace(netloc=where.netloc.replace(f":{where.port}", f":{proxy.port}")).geturl()
        async with a_scene(replace(places, services_database_url=through), seed=3) as scene:
            proxy.on_cut = scene.strike
            await scene.start(*ALL)
            (client, *_) = await scene.join()
            async with scene.looking():
                for cut in cuts:
                    proxy.cuts.append(cut)
                    await client.open_batch(puts=2, posts=0)
                proxy.cut_all()
                scene.strike("postgres: all connections cut")
                await client.open_batch(puts=2, posts=0)
                await scene.settle()

            assert await scene.reckoning() == []
            assert proxy.cut_at == cuts
            assert any("commit_settled" in line for line in scene.services["processor"].lines)
            assert scene.services["processor"].exits == []
