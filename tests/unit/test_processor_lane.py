"""The lane's hand on rows in memory: the log's answers are held back, the worker is away, the store hangs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from schemas.events import BatchEvent
from schemas.records import NewRecord, StoredRecord
from services.blobs import LocalFile
from services.eventlog import LogOutcomeUnknown
from services.lifecycle import cancelled
from services.processor import lane as module
from services.processor import workbench
from services.processor.health import Health
from services.processor.lane import LaneWorker, LookBack
from services.processor.projection import Projected, Projection
from services.processor.work.port import Job, WorkCancelled, WorkerUnavailable
from services.processor.workbench import Workbench
from tests.examples import (
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_UPLOAD,
    RESULT,
    UPLOAD,
    a_batch_cancelled,
    a_batch_created,
    a_batch_sealed,
    an_upload_queued,
    an_upload_started,
    records_of,
)
from tests.fakes_rows import MemoryRows, Tables

WAIT_S = 30
OFTEN = 3
LOG = records_of(*OPENING, a_batch_created(), an_upload_queued(), a_batch_sealed())
STARTED, INTERRUPTED, SUCCEEDED, COMPLETED = (
    f"sluice.{name}.v1" for name in ("UploadStarted", "UploadInterrupted", "UploadSucceeded", "BatchCompleted")
)


@dataclass
class Log:
    """A log whose reader is as quick as its answers. `landing` and `landed` are awaited around the first append of a
    start; `doubts` is how many appends land and are not answered."""

    projection: Projection
    see: Callable[[Projected], None] = lambda _projected: None
    landing: Callable[[], Any] | None = None
    landed: Callable[[], Any] | None = None
    doubts: int = 0
    said: list[str] = field(default_factory=list)
    effective: list[str] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    async def append(self, _partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        assert timeout_s > 0
        types = [dict(record.headers)["ce_type"].decode() for record in records]
        landing, landed = (self.landing, self.landed) if STARTED in types else (None, None)
        if landing is not None:
            self.landing = None
            await landing()
        self.said += types
        offset = await self.land(records)
        self.grown.set()
        if landed is not None:
            self.landed = None
            await landed()
        if self.doubts:
            self.doubts -= 1
            raise LogOutcomeUnknown("the answer was lost")
        return offset

    async def land(self, records: Sequence[NewRecord]) -> int:
        first, time_ms = self.projection.lane.next_offset, self.projection.lane.time_ms
        stored = [
            StoredRecord(0, first + number, time_ms, record.key, record.value, record.headers)
            for number, record in enumerate(records)
        ]
        for projected in await self.projection.fold(stored):
            if not isinstance(projected.outcome, str):
                self.effective.append(projected.fact.event.type)
            self.see(projected)
        return first

    async def has(self, kind: str) -> None:
        """Wait until the hand's fact of this type has landed."""
        while kind not in self.said:
            self.grown.clear()
            await self.grown.wait()

    async def tell(self, event: BatchEvent) -> None:
        """Somebody else's fact lands."""
        (record,) = records_of(event, first_offset=self.projection.lane.next_offset)
        await self.land([NewRecord(record.key, record.value, record.headers)])

    def publish_progress(self, _partition: int, _record: NewRecord) -> None:
        """Nobody listens."""


@dataclass
class Worker:
    """Works as long as it is not let `finish`; `away` says why there is no child."""

    away: str | None = None
    finish: asyncio.Event = field(default_factory=asyncio.Event)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    tried_often: asyncio.Event = field(default_factory=asyncio.Event)
    runs: int = 0
    tries: int = 0

    async def run(self, job: Job, **_: object) -> dict[str, Any]:
        self.runs += 1
        if self.away is not None:
            raise WorkerUnavailable(self.away)
        self.killed.clear()
        self.began.set()
        finished, killed = asyncio.create_task(self.finish.wait()), asyncio.create_task(self.killed.wait())
        await asyncio.wait({finished, killed}, return_when=asyncio.FIRST_COMPLETED)
        stopped = self.killed.is_set()
        await cancelled(finished, killed)
        if stopped:
            raise WorkCancelled
        job.thumbnail_path.write_bytes(b"thumbnail")
        return dict(RESULT)

    async def cancel(self) -> None:
        self.killed.set()

    async def warm(self) -> None:
        self.tries += 1
        if self.tries == OFTEN:
            self.tried_often.set()
        if self.away is not None:
            raise WorkerUnavailable(self.away)


@dataclass
class Blobs:
    """A store that takes thumbnails where it does not hang."""

    folder: Path
    hangs: bool = False
    putting: asyncio.Event = field(default_factory=asyncio.Event)

    async def bring(self, _name: str, *, to: Path) -> LocalFile:
        return LocalFile(to, an_upload_queued().size_bytes)

    async def put_file(self, *_: object, **__: object) -> str:
        self.putting.set()
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        return "thumb"


@dataclass
class Scene:
    hand: LaneWorker
    log: Log
    worker: Worker
    blobs: Blobs
    health: Health
    gates: dict[str, Callable[[], Any]]
    """What is awaited before a question to the rows, by its name."""


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(module, "FINISH_GRACE_S", 0.05)
    monkeypatch.setattr(module, "RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(workbench, "LOOK_INTERVAL_S", 0.01)
    gates: dict[str, Callable[[], Any]] = {}

    @contextlib.asynccontextmanager
    async def gate(name: str) -> AsyncIterator[None]:
        if name in gates:
            await gates.pop(name)()
        yield

    projection = await Projection.open(MemoryRows(Tables(), gate=gate), partition=0, log_id=LOG_ID)
    await projection.fold(LOG)
    await projection.flush()
    log, worker, blobs, health = Log(projection), Worker(), Blobs(tmp_path), Health()
    bench = Workbench(worker, blobs, health, scratch=tmp_path, work_timeout_s=60)  # type: ignore[arg-type]  # as asked
    hand = LaneWorker(
        epoch=EPOCH,
        log=log,  # type: ignore[arg-type]  # as far as it is asked
        writer=log,  # type: ignore[arg-type]  # as far as it is asked
        projection=projection,
        bench=bench,
        may_start=lambda: workbench.PART not in health.parts,
    )
    log.see, bench.on_change = hand.see, hand.wake
    await hand.load(late())
    return Scene(hand, log, worker, blobs, health, gates)


@contextlib.asynccontextmanager
async def working(scene: Scene) -> AsyncIterator["asyncio.Task[None]"]:
    """The hand at work, and its bench looked after."""
    tasks = asyncio.create_task(scene.hand.run()), asyncio.create_task(scene.hand.bench.keep())
    try:
        async with asyncio.timeout(WAIT_S):
            yield tasks[0]
    finally:
        await cancelled(*tasks)


async def test_a_stop_gives_the_file_in_work_back_however_busy_the_lane_is(scene: Scene) -> None:
    async def read() -> None:
        while True:
            scene.hand.wake()  # as each fact does that is read
            await asyncio.sleep(0)

    async with working(scene) as run:
        await scene.worker.began.wait()
        reading = asyncio.create_task(read())
        await scene.hand.stop()
        await run
        await cancelled(reading)

    assert scene.log.effective == [STARTED, INTERRUPTED]


async def test_a_file_whose_start_is_on_its_way_to_the_log_is_given_back_by_a_stop(scene: Scene) -> None:
    landing = asyncio.Event()

    async def land_after_the_stop() -> None:
        landing.set()
        await scene.hand.stop()

    scene.log.landing = land_after_the_stop
    async with working(scene) as run:
        await landing.wait()
        await run

    assert scene.log.effective == [STARTED, INTERRUPTED]
    assert scene.worker.runs == 0


async def test_a_file_that_can_be_worked_soon_is_finished_by_a_stop(scene: Scene) -> None:
    async def stop_meanwhile() -> None:
        scene.worker.finish.set()
        stopping.append(asyncio.create_task(scene.hand.stop()))

    stopping: list[asyncio.Task[None]] = []
    scene.log.landing = stop_meanwhile
    async with working(scene) as run:
        await run
        await asyncio.gather(*stopping)

    assert scene.log.effective == [STARTED, SUCCEEDED, COMPLETED]


async def test_a_start_in_doubt_is_said_again_and_then_given_back(scene: Scene) -> None:
    async def stop() -> None:
        await scene.hand.stop()

    scene.log.doubts, scene.log.landed = 2, stop
    async with working(scene) as run:
        await run

    assert scene.log.said == [STARTED, STARTED, STARTED, INTERRUPTED]
    assert scene.log.effective == [STARTED, INTERRUPTED]
    assert scene.worker.runs == 0


async def test_nothing_is_started_once_a_stop_was_told(scene: Scene) -> None:
    stopped = asyncio.Event()

    async def stop() -> None:
        await scene.hand.stop()
        stopped.set()

    scene.hand._projection._uploads.clear()  # so that the next look at an upload asks the rows
    scene.gates["rows.uploads"] = stop
    async with working(scene) as run:
        await run

    assert stopped.is_set()
    assert scene.log.said == []


async def stopped_after_a_start(scene: Scene) -> None:
    async with working(scene) as run:
        await scene.log.has(STARTED)
        await scene.hand.stop()
        await run


async def test_a_start_that_comes_back_ignored_before_its_answer_is_not_worked(scene: Scene) -> None:
    scene.log.landing = lambda: scene.log.tell(a_batch_cancelled())

    await stopped_after_a_start(scene)

    assert scene.worker.runs == 0
    assert scene.log.said == [STARTED]


async def test_a_batch_cancelled_before_its_start_is_answered_is_not_worked(scene: Scene) -> None:
    scene.log.landed = lambda: scene.log.tell(a_batch_cancelled())

    await stopped_after_a_start(scene)

    assert scene.worker.runs == 0
    assert scene.log.effective == [STARTED, "sluice.BatchCancelled.v1"]


async def test_where_no_child_can_be_had_a_file_is_taken_up_once_and_again_when_there_is_one(scene: Scene) -> None:
    scene.worker.away = "No child process can be had for the work on files: no memory."
    scene.worker.finish.set()
    async with working(scene) as run:
        await scene.log.has(INTERRUPTED)
        await scene.worker.tried_often.wait()
        while_away, runs_while_away = list(scene.log.effective), scene.worker.runs
        problems = scene.health.problems()
        has_to_do = scene.hand.has_to_do
        scene.worker.away = None
        await scene.log.has(COMPLETED)
        await scene.hand.stop()
        await run

    assert (while_away, runs_while_away) == ([STARTED, INTERRUPTED], 1)
    assert "No child process can be had for the work on files: no memory." in problems
    assert not has_to_do
    assert scene.log.effective == [STARTED, INTERRUPTED, STARTED, SUCCEEDED, COMPLETED]
    assert scene.health.parts == {}


async def test_a_thumbnail_that_the_store_does_not_take_does_not_hold_up_a_stop(scene: Scene) -> None:
    scene.blobs.hangs = True
    scene.worker.finish.set()
    async with working(scene) as run:
        await scene.blobs.putting.wait()
        await scene.hand.stop()
        await run

    assert scene.log.effective == [STARTED, INTERRUPTED]
    assert not list(scene.blobs.folder.iterdir())


async def test_a_late_copy_of_a_start_that_lands_behind_its_give_back_is_given_back_too(scene: Scene) -> None:
    starts: list[NewRecord] = []
    append = scene.log.append

    async def appended(partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        first_start, kind = not starts, dict(records[0].headers)["ce_type"].decode()
        offset = await append(partition, records, timeout_s=timeout_s)
        if kind == STARTED:
            starts.extend(records)
        elif kind == INTERRUPTED and not first_start:
            await scene.log.land(starts)
            starts.clear()
        return offset

    scene.log.append = appended  # type: ignore[method-assign]  # a log that says a thing twice
    async with working(scene) as run:
        await scene.worker.began.wait()
        await scene.hand.stop()
        await run

    assert scene.log.effective == [STARTED, INTERRUPTED, STARTED, INTERRUPTED]


@pytest.mark.parametrize(
    ("uploads", "said"), [([UPLOAD], INTERRUPTED), ([OTHER_UPLOAD], "sluice.UploadAttemptFailed.v1")]
)
async def test_what_is_found_in_work_has_crashed_unless_only_a_late_copy_began_it(
    scene: Scene, uploads: list[str], said: str
) -> None:
    await scene.log.tell(an_upload_started())
    await scene.log.projection.flush()
    await scene.hand.load(late(*uploads))
    scene.worker.finish.set()

    async with working(scene):
        await scene.log.has(COMPLETED)

    assert scene.log.effective[:3] == [STARTED, said, STARTED]


async def test_a_late_copy_that_is_read_after_the_hand_has_stopped_is_given_back(scene: Scene) -> None:
    async with working(scene) as run:
        await scene.worker.began.wait()
        await scene.hand.stop()
        await run
        await scene.log.tell(an_upload_started())
        await scene.hand.read_back()

    assert scene.log.effective == [STARTED, INTERRUPTED, STARTED, INTERRUPTED]


def late(*uploads: str) -> LookBack:
    """A look back that finds these to have been begun by late copies."""

    async def look_back(in_work: Mapping[str, int]) -> list[str]:
        assert set(in_work.values()) == {1}, "the number of the attempt that is in work"
        return [upload_id for upload_id in in_work if upload_id in uploads]

    return look_back
