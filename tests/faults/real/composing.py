"""Faults composed at random: an act is a scene in which whatever can break does, several times, while clients work.

One lane or several, each with its processor; of api and of the first lane's processor there are two. Postgres is
reached through a proxy; where a tmpfs may be mounted, files are kept on a small disk, and so are Kafka's and Postgres'
data. Some acts leave the processes alive, so that it can be seen whether they grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil

from services.faults import POINTS
from tests.faults.real.clocks import Clocks
from tests.faults.real.disks import SmallDisk
from tests.faults.real.poisons import poisons
from tests.faults.real.proxy import Proxy
from tests.faults.real.scene import Places, Scene, a_scene
from tests.faults.real.servers import Breakable, let_pass

NAMES = ("api-1", "api-2", "notifier-1", "processor-1", "processor-2")
OF_OTHER_LANES = ("processor-lane1", "processor-lane2")
PARTITIONS = (1, 2, 3)
STRIKE_TIMEOUT_S = 12.0
BLOBS_BYTES = 1_000_000_000
"""Far more than the files of an act; services start with 100 MB of room."""
Say = Callable[[str], None]
Fault = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Stage:
    """What acts are played on."""

    kafka: Breakable
    postgres: Breakable
    folder: Path
    say: Say


async def act(stage: Stage, *, seed: int, lasts_s: float) -> tuple[list[str], Path]:
    """Play one act; what did not hold, and where its files are."""
    chance = random.Random(seed)
    name = f"act{seed}{uuid.uuid4().hex[:6]}"
    folder = stage.folder / name
    folder.mkdir()
    deadly = chance.random() < 0.7
    partitions = chance.choice(PARTITIONS)
    names = (*NAMES, *OF_OTHER_LANES[: partitions - 1])
    async with contextlib.AsyncExitStack() as stack:
        where = urlsplit(await _new_database(stage.postgres.server.url, name))
        proxy = await stack.enter_async_context(Proxy(target_port=stage.postgres.server.port).carrying())
        through = where._replace(netloc=where.netloc.replace(f":{where.port}", f":{proxy.port}")).geturl()
        disk = await stack.enter_async_context(SmallDisk.where_allowed(folder / "small", size_bytes=BLOBS_BYTES))
        places = Places(
            kafka=stage.kafka.server.bootstrap_servers,
            database_url=where.geturl(),
            folder=folder,
            unique=name,
            partitions=partitions,
            services_database_url=through,
            clocks=stack.enter_context(Clocks.kept_in(folder)),
            blobs=disk.folder if disk is not None else None,
        )
        scene = await stack.enter_async_context(a_scene(places, seed=seed, pause_s=chance.uniform(1, 7)))
        for server in (stage.kafka, stage.postgres):
            server.on_strike = scene.strike
            server.away.clear()
        proxy.on_cut = scene.strike
        await scene.start(*names)
        await scene.join()
        lanes = f"{partitions} lane{'s' if partitions > 1 else ''}"
        stage.say(f"act {seed}: {lanes}, {'anything may die' if deadly else 'the processes live'}")
        company = _Company(scene, stage, proxy, disk, chance, names=names, deadly=deadly)
        async with scene.looking():
            await company.play(until_s=time.monotonic() + lasts_s)
            await scene.settle()
        scene.evidence.away.extend([*stage.kafka.away, *stage.postgres.away])
        return await scene.reckoning(), folder


@dataclass(slots=True)
class _Company:
    """Those who break things in a scene."""

    scene: Scene
    stage: Stage
    proxy: Proxy
    disk: SmallDisk | None
    chance: random.Random
    names: Sequence[str]
    deadly: bool

    async def play(self, *, until_s: float) -> None:
        """Rounds of faults, each followed by a look at whether the read models come even again, and who grew."""
        while time.monotonic() < until_s:
            async with self.scene.lively(pause_s=0.2):
                faults = self.chance.choices(self._faults(), k=self.chance.randint(2, 5))
                together = self.chance.random() < 0.3
                await _all(faults, together=together)
                await self.scene.even()
            await self.scene.settle()
            await self.scene.note_usage()
            recent = ", ".join(dict.fromkeys(self.scene.struck[-6:]))
            self.stage.say(f"  {len(self.scene.journal.operations)} requests; last faults: {recent}")

    def _faults(self) -> list[Fault]:
        sparing: list[Fault] = [
            self._stop_somebody,
            self._pause_a_server,
            self._cut,
            self._cut_at_commits,
            self._poison,
        ]
        if self.scene.places.clocks is not None:
            sparing.append(self._set_a_clock)
        if self.disk is not None:
            sparing.append(self._fill_the_disk)
        deadly: list[Fault] = [self._strike_at_a_point] * 6 + [self._signal_somebody] * 2
        deadly += [self._kill_a_decoder, self._break_a_server]
        if self.stage.kafka.disk is not None and self.stage.postgres.disk is not None:
            deadly.append(self._fill_a_server)
        return [*sparing, *(deadly if self.deadly else [])]

    async def _strike_at_a_point(self) -> None:
        """A service is begun anew with a fault armed; where its point is not reached in time, nothing happened."""
        name = self.chance.choice(self.names)
        service = self.scene.services[name]
        point = self.chance.choice([each for each in POINTS if each.startswith(f"{service.kind}.")])
        action = self.chance.choice(("kill", "kill", "stop", "term", "error"))
        struck = len(service.struck)
        service.arm([f"{point}:{action}:{self.chance.choice((1, 1, 2, 5, 20))}"])
        service.send(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.until_struck(struck + 1), STRIKE_TIMEOUT_S)

    async def _signal_somebody(self) -> None:
        name = self.chance.choice(self.names)
        number = self.chance.choice((signal.SIGKILL, signal.SIGTERM))
        service = self.scene.services[name]
        service.send(number)
        self.scene.strike(f"{service.kind}: {number.name} at any instruction")

    async def _kill_a_decoder(self) -> None:
        processors = [service for service in self.scene.services.values() if service.kind == "processor"]
        with contextlib.suppress(psutil.Error, IndexError):  # it ended, or has no child just now
            self.chance.choice(psutil.Process(self.chance.choice(processors).pid).children()).kill()
            self.scene.strike("processor: a decoder killed")

    async def _stop_somebody(self) -> None:
        service = self.scene.services[self.chance.choice(self.names)]
        await service.pause(self.chance.uniform(0.5, 8))
        self.scene.strike(f"{service.kind}: SIGSTOP at any instruction")

    async def _pause_a_server(self) -> None:
        await self._server().pause(self.chance.uniform(0.5, 12))

    async def _break_a_server(self) -> None:
        server = self._server()
        broken = self.chance.choice((server.kill, server.restart))
        await broken(away_s=self.chance.choice((0, 0, 3)))

    async def _fill_a_server(self) -> None:
        await self._server().fill(self.chance.uniform(0.5, 8))

    def _server(self) -> Breakable:
        return self.chance.choice((self.stage.kafka, self.stage.postgres))

    async def _set_a_clock(self) -> None:
        self.scene.set_clock(self.chance.choice(self.names), hours_ahead=self.chance.choice((-1, 0, 1)))

    async def _fill_the_disk(self) -> None:
        assert self.disk is not None, "there is no small disk here"
        await self.disk.fill()
        self.scene.strike("blobs: disk full")
        try:
            await let_pass(self.chance.uniform(0.5, 8))
        finally:
            await self.disk.clear()

    async def _cut(self) -> None:
        self.proxy.cut_all()
        self.scene.strike("postgres: all connections cut")

    async def _cut_at_commits(self) -> None:
        for _ in range(self.chance.randint(1, 4)):
            self.proxy.cuts.append(self.chance.choice(("before the commit", "after the commit")))

    async def _poison(self) -> None:
        what, record = self.chance.choice(list(poisons().items()))
        writer = self.scene.log.writer()
        try:
            await writer.append(self.chance.randrange(self.scene.places.partitions), [record], timeout_s=20)
        finally:
            await writer.close()
        self.scene.strike(f"log: {what}")


async def _all(faults: Sequence[Fault], *, together: bool) -> None:
    if together and len(set(faults)) == len(faults):
        await asyncio.gather(*(fault() for fault in faults))
        return
    for fault in faults:
        await fault()


async def _new_database(url: str, name: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return urlsplit(url)._replace(path=f"/{name}").geturl()
