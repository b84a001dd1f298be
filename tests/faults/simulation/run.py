"""One run, from a seed to its violations; and many, with a crash at each point.

While a run lasts, the clocks, the chance and a few names of the product stand for simulated ones (`ground`); nothing
else of it is replaced. After the story everything is healed, and the run goes on until nothing is left to do.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import structlog

from schemas.batch import Lane
from schemas.events import Envelope, LogCreated, encode
from schemas.ids import new_id
from services import tail as tail_module
from services.api import queries
from services.api import reading as reading_module
from services.eventlog import LogIdentity
from services.processor import main as processor_main
from services.processor import projection as projection_module
from services.processor import rebuilding, replay, taking
from services.processor.projection import Projection
from tests.fakes_rows import MemoryRows, Tables
from tests.faults.simulation.checks import Evidence, violations
from tests.faults.simulation.clients import History
from tests.faults.simulation.generations import (
    SimulatedRebuildLock,
    SimulatedRows,
    SimulatedShadowRows,
    drop,
    made,
    replayer,
)
from tests.faults.simulation.loop import Stuck
from tests.faults.simulation.ports import SimulatedLock, SimulatedPresence, SimulatedSelf
from tests.faults.simulation.processes import Process, Stream, api, processor, watcher
from tests.faults.simulation.reference import Folding, fold_one
from tests.faults.simulation.scenarios import SCENARIOS, Scene
from tests.faults.simulation.world import AtRandom, CrashAt, Plan, World

STORY_S_MAX = 400.0
REST_S_MAX = 120.0
REST_LOOK_S = 0.25
IDLE_POLL_MS = 1_500
"""An idle reader asks less often than in earnest: in no time nothing is missed by it, and runs are shorter."""


@dataclass
class Result:
    """What became of a run. `passed`: who came by each point; `command` runs it again."""

    scenario: str
    seed: str
    violations: list[str]
    passed: list[str]
    crashes: list[tuple[str, str]]
    failures: int
    records: int
    seconds: float
    steps: int
    fingerprint: str
    trace: list[tuple[float, str, str, str]] = field(repr=False, default_factory=list)
    replayed_with: str = ""

    @property
    def points(self) -> int:
        return len(self.passed)

    @property
    def command(self) -> str:
        chosen = f"--scenario {self.scenario} --seed {self.seed}{self.replayed_with}"
        return f"python -m tests.faults.simulation {chosen} --trace"


def simulate(scenario: str, *, seed: str, plan: Plan) -> Result:
    """Tell one story under one plan."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-simulated-", dir=_memory()))
    partitions = SCENARIOS[scenario].partitions
    world = World(seed=f"{scenario}/{seed}", plan=plan, folder=folder, partitions=partitions)
    with ground(world):
        try:
            found = world.loop.run(_run(world, scenario))
        except Stuck as stuck:
            found = [str(stuck)]
        finally:
            trace = list(world.trace)
            shown = [*world.violations, *world.loop.complaints]
            world.loop.dispose()
            shutil.rmtree(folder, ignore_errors=True)
    return Result(
        scenario=scenario,
        seed=seed,
        violations=[*shown, *found],
        passed=world.passed,
        crashes=world.crashes,
        failures=world.failures,
        records=len(world.records),
        seconds=world.loop.now_s - 1_000,
        steps=world.loop.steps,
        fingerprint=_fingerprint(trace),
        trace=trace,
    )


def _fingerprint(trace: list[tuple[float, str, str, str]]) -> str:
    """The same for the same run."""
    return hashlib.sha256(repr(trace).encode()).hexdigest()


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def ground(world: World) -> Iterator[None]:
    """What is replaced while the simulation runs: clocks, chance, the lane's lock, rows, the api's queries."""
    replaced: list[Any] = [
        mock.patch.object(time, "monotonic", world.loop.time),
        mock.patch.object(time, "time", world.time),
        mock.patch.object(time, "time_ns", world.time_ns),
        mock.patch.object(os, "urandom", world.random_bytes),
        mock.patch.object(secrets, "token_urlsafe", world.token),
        mock.patch.object(taking, "Rows", SimulatedRows),
        mock.patch.object(rebuilding, "ShadowRows", SimulatedShadowRows),
        mock.patch.object(rebuilding, "_made", made),
        mock.patch.object(replay, "RebuildLock", SimulatedRebuildLock),
        mock.patch.object(replay, "_drop", drop),
        mock.patch.object(processor_main, "LaneLock", SimulatedLock),
        mock.patch.object(processor_main, "Presence", SimulatedPresence),
        mock.patch.object(processor_main, "Worker", SimulatedSelf),
        mock.patch.object(taking, "Worker", SimulatedSelf),
        mock.patch.object(taking, "READ_TIMEOUT_MS", IDLE_POLL_MS),
        mock.patch.object(projection_module, "CACHED_ROWS_MAX", world.choices.choice((0, 3, 50_000))),
        mock.patch.object(tail_module, "READ_TIMEOUT_MS", IDLE_POLL_MS),
        mock.patch.object(reading_module, "queries", _QUERIES),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what is said of those who were killed in the middle of something
        stack.enter_context(_silent())
        for each in replaced:
            stack.enter_context(each)
        yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The processes' log lines would be millions."""
    before = structlog.get_config()
    structlog.configure(processors=[_drop], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


def _drop(_logger: object, _name: str, _event: object) -> Any:
    raise structlog.DropEvent


_QUERIES = SimpleNamespace(
    batch_of=lambda database, batch_id, user_id: database.batch_of(batch_id, user_id=user_id),
    upload_of=lambda database, upload_id, user_id: database.upload_of(upload_id, user_id=user_id),
    uploads_of=lambda database, batch_id, page: database.uploads_of(batch_id, page=page),
    uploads_among=queries.uploads_among,
)


async def _run(world: World, name: str) -> list[str]:
    _begin_log(world)
    scenario = SCENARIOS[name]
    history, watched = History(), []
    streams: list[Stream] = []
    replicas = [Process(world, f"api-{number}", api) for number in (1, 2)]
    processors = [
        Process(world, f"processor-{partition}-{number}", processor, partition=partition)
        for partition in range(scenario.partitions)
        for number in range(1, scenario.processors + 1)
    ]
    replaying = Process(world, "replayer", replayer)
    processes = [*replicas, *processors, Process(world, "watcher", watcher(watched, streams))]
    for process in processes:
        process.start()
    scene = Scene(world, history, replicas, processors, replaying, watched)
    await asyncio.sleep(0.5)
    try:
        async with asyncio.timeout(STORY_S_MAX):
            await scenario.story(scene)
    except TimeoutError:
        world.violations.append(f"the story took more than {STORY_S_MAX:.0f} s")
    world.tell("healed")
    world.healed = True
    settled = await _rest(world, replaying)
    for batch_id in watched:
        for user_id in sorted({wish.sent.user_id for wish in history.wishes}):
            await scene.client(user_id).read(f"/v1/batches/{batch_id}")
    settled = settled and await _rest(world, replaying)
    return violations(
        Evidence(
            records=world.records,
            tables=world.tables,
            refolded=[await _refold(world)],
            wishes=history.wishes,
            reads=history.reads,
            streams=streams,
            blobs=lambda blob: (world.folder / blob).is_file(),
            settled=settled,
            undisturbed=_undisturbed(world, processors),
            heard_all=lambda stream: not stream.node.dead,
        )
    )


def _undisturbed(world: World, processors: Sequence[Process]) -> bool:
    """Whether no attempt can have crashed: no processor was killed or paused, or lost its lane to another one."""
    if world.paused or any(name.startswith(each.name) for name, _ in world.crashes for each in processors):
        return False
    return len(processors) == len(world.brokers) or not (world.failures or world.away_until_s)


def _begin_log(world: World) -> None:
    world.identity = LogIdentity(new_id(now_ms=world.now_ms(), random=world.random_bytes(9)), {})
    for broker in world.brokers:
        said = Envelope(id=new_id(now_ms=world.now_ms(), random=world.random_bytes(9)), source="test", time="")
        broker.land([encode(LogCreated(log_id=world.log_id), said)], world.now_ms())


async def _rest(world: World, replaying: Process) -> bool:
    """Whether it came to rest: what was sealed ended, a replay that was begun too, the rows are at the log's end, and
    nothing is added any more."""
    folding, ends, since_s = Folding(), [0], world.loop.now_s
    deadline_s = world.loop.now_s + REST_S_MAX
    while world.loop.now_s < deadline_s:
        await asyncio.sleep(REST_LOOK_S)
        for broker in world.brokers:
            for record in broker.records[folding.lane(broker.partition).next_offset :]:
                fold_one(folding, record)
        positions = [world.tables.lanes.get(number, Lane(number)).next_offset for number in range(len(world.brokers))]
        now = [broker.end for broker in world.brokers]
        if not ends == now == positions:
            ends, since_s = now, world.loop.now_s
        busy = any(batch.sealed and not batch.ended and not batch.deleted for batch, _ in folding.batches())
        busy = busy or any(
            upload.status in ("queued", "processing")
            for batch, uploads in folding.batches()
            for upload in uploads.values()
            if not batch.deleted
        )
        busy = busy or any(node.paused for node in world.on_death) or (replaying.starts > 0 and replaying.wanted)
        if not busy and world.loop.now_s - since_s > 1.0 and world.tables.lanes:
            return True
    return False


async def _refold(world: World) -> Tables:
    """The rows as a replay from zero makes them, by polls of other sizes."""
    tables = Tables()
    polls = random.Random(f"{world.seed}/refold")
    for broker in world.brokers:
        projection = await Projection.open(MemoryRows(tables), partition=broker.partition, log_id=world.log_id)
        records = list(broker.records)
        while records:
            some = polls.choice((1, 2, 7, len(records)))
            await projection.fold(records[:some])
            del records[:some]
            if polls.random() < 0.7:
                await projection.flush()
        await projection.flush()
    return tables


# Many runs


def crash_at(scenario: str, *, seed: str, points: Iterable[int]) -> Result:
    """A story in which the processes that come by these points, counted from 1, die there."""
    chosen = sorted(points)
    found = simulate(scenario, seed=seed, plan=CrashAt(frozenset(chosen)))
    return replace(found, replayed_with=f" --crash {','.join(map(str, chosen))}")


def at_random(scenario: str, *, seed: str) -> Result:
    """A story in which everything breaks sometimes."""
    return simulate(scenario, seed=seed, plan=AtRandom(f"{scenario}/{seed}"))


def every_crash(scenario: str, *, seed: str, runs: int | None = None, of: str = "") -> Iterator[Result]:
    """A story once for each point (or for so many, evenly spread; or for those of one process), with a crash there;
    first, as it is where nothing breaks."""
    yield (quiet := crash_at(scenario, seed=seed, points=[0]))
    points = [point for point, process in enumerate(quiet.passed, start=1) if of in ("", process)]
    for point in points[:: max(1, len(points) // runs) if runs else 1]:
        yield crash_at(scenario, seed=seed, points=[point])


def pairs_of_crashes(scenario: str, *, seed: str, pairs: int) -> Iterator[Result]:
    """A story with crashes at two points the seed chooses, so many times; first, as it is where nothing breaks."""
    yield (quiet := crash_at(scenario, seed=seed, points=[0]))
    choices = random.Random(f"{scenario}/{seed}/pairs")
    for _ in range(pairs):
        # A second crash may come while the first is being mended, after where the quiet story ended.
        yield crash_at(scenario, seed=seed, points=choices.sample(range(1, quiet.points + 40), 2))
