"""Bugs on purpose: each breaks one promise of the product in one place, and the simulation must find it.

What is broken is the lane, the tables, the log, the api or the tail of the simulated processes, never `evolve` itself
or the checks, which judge by it. Each names the story in which it shows and in how many seeds it must have shown.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from schemas.batch import Batch, Changed, Ignored, Lane, Upload, evolve
from schemas.events import Fact, Failure, UploadAttemptFailed, UploadInterrupted, UploadStarted
from schemas.position import Position
from schemas.records import NewRecord
from services.api.asking import RequestKey
from services.blobs import Intake
from services.database import DatabaseUnavailable
from services.eventlog import LogOutcomeUnknown, LogUnavailable
from services.folding import Held
from services.processor import decisions, lane, projection, taking
from services.processor.health import Health
from services.processor.projection import Payload
from services.processor.replay import Replay
from services.tail import Tail
from tests.fakes_rows import MemoryRows
from tests.faults.simulation.ports import SimulatedWriter
from tests.faults.simulation.run import at_random, crash_at
from tests.faults.simulation.world import Broker


@dataclass(frozen=True)
class Planted:
    """`story`: where it shows, with everything breaking at random, or (`quiet`) with nothing; `seeds`: in how many of
    them it must be found."""

    story: str
    plant: Callable[[], AbstractContextManager[Any]]
    seeds: int = 40
    quiet: bool = False

    def found_at(self) -> int | None:
        """The first seed that finds it."""
        with self.plant():
            return next((seed for seed in range(self.seeds) if self._shows(str(seed))), None)

    def _shows(self, seed: str) -> bool:
        run = crash_at(self.story, seed=seed, points=()) if self.quiet else at_random(self.story, seed=seed)
        return bool(run.violations)


def no_fence_in_the_rows() -> AbstractContextManager[Any]:
    """The projection takes facts of any epoch."""

    def unfenced(at: Lane, batch: Batch | None, upload: Upload | None, fact: Fact) -> Changed | Ignored:
        epoch = getattr(fact.event, "epoch", at.epoch)
        return evolve(at if epoch == at.epoch else replace(at, epoch=epoch), batch, upload, fact)

    return mock.patch.object(projection, "evolve", unfenced)


def rows_before_position() -> AbstractContextManager[Any]:
    """Rows and position are two transactions."""

    async def write(self: MemoryRows, payload: Payload) -> list[str]:
        self._tables.write_rows(payload)
        payload.events, payload.deleted, payload.cancelled = [], [], []
        async with self._gate("rows.write"):
            self._tables.commit(payload)
        return payload.removed

    return mock.patch.object(MemoryRows, "write", write)


def lost_although_acknowledged() -> AbstractContextManager[Any]:
    """The log acknowledges what it does not keep, now and then."""
    land = SimulatedWriter._land

    def forgetful(self: SimulatedWriter, broker: Broker, records: list[NewRecord], answer: Any) -> None:
        if self._world.delays.random() < 0.05:
            if answer is not None and not answer.done():
                answer.set_result(broker.end)
            return
        land(self, broker, records, answer)

    return mock.patch.object(SimulatedWriter, "_land", forgetful)


def unknown_told_as_refused() -> AbstractContextManager[Any]:
    """What may have landed is said not to have been sent."""
    append = SimulatedWriter.append

    async def sure(self: SimulatedWriter, partition: int, records: Sequence[NewRecord], *, timeout_s: float) -> int:
        try:
            return await append(self, partition, records, timeout_s=timeout_s)
        except LogOutcomeUnknown as error:
            raise LogUnavailable(str(error)) from error

    return mock.patch.object(SimulatedWriter, "append", sure)


def crashes_that_cost_nothing() -> AbstractContextManager[Any]:
    """An attempt that took its worker down is taken for one that was given back."""

    def given_back(upload: Upload, *, epoch: int) -> UploadInterrupted:
        begun = decisions.start(replace(upload, attempts=upload.attempts - 1), epoch=epoch)
        return decisions.given_back(begun, reason="it may have been a restart")

    return mock.patch.object(decisions, "crashed", given_back)


def interruptions_that_cost() -> AbstractContextManager[Any]:
    """A file that is given back counts as a crash."""

    def failed(started: UploadStarted, *, reason: str) -> UploadAttemptFailed:
        error = Failure(code="worker_crashed", message=reason)
        return UploadAttemptFailed(**started.model_dump(exclude={"type"}), error=error)

    return mock.patch.object(decisions, "given_back", failed)


def a_new_id_each_time() -> AbstractContextManager[Any]:
    """Ids of repeated requests are not derived from their key."""
    counted = iter(range(10_000))
    derived = RequestKey.id

    def fresh(self: RequestKey, *place: int, partition: int) -> str:
        return derived(self, *place, next(counted), partition=partition)

    return mock.patch.object(RequestKey, "id", fresh)


def bytes_dropped_in_doubt() -> AbstractContextManager[Any]:
    """On an unknown outcome the bytes are removed, as if the fact could not land any more."""
    return mock.patch.object(Intake, "keep")


def kept_facts_forgotten() -> AbstractContextManager[Any]:
    """A batch that is loaded is not brought up to the tail's head."""

    def take_in(self: Tail, held: Held, _partition: object) -> Held:
        return self._held.setdefault(held.id, held)

    return mock.patch.object(Tail, "_take_in", take_in)


def late_copies_overlooked() -> AbstractContextManager[Any]:
    """A start that was given back and lands once more is taken for one that somebody works on."""
    see = lane.LaneWorker.see

    def careless(self: lane.LaneWorker, projected: Any) -> None:
        before = list(self._left_over)
        see(self, projected)
        self._left_over = before

    return mock.patch.object(lane.LaneWorker, "see", careless)


def never_looked_back() -> AbstractContextManager[Any]:
    """Who takes a lane calls crashed whatever is in work there, late copies too."""

    async def nothing(*_: object) -> frozenset[str]:
        return frozenset()

    return mock.patch.object(taking, "landed_late", nothing)


def written_again_after_the_commit() -> AbstractContextManager[Any]:
    """A COMMIT whose answer was lost is not settled by reading the position: the payload is written once more."""

    async def write(self: MemoryRows, payload: Payload) -> list[str]:
        async with self._gate("rows.write"):
            payload.deleted, payload.events = [], []
            self._tables.commit(payload)
        return payload.removed

    return mock.patch.object(MemoryRows, "write", write)


def rows_ahead_of_the_tail() -> AbstractContextManager[Any]:
    """Who waits for a position is answered once the rows include it, though by a tail that does not."""

    async def projected_past(self: Tail, position: Position, timeout_s: float) -> bool:
        return await self._conditions.within(lambda: self.projected().includes(position), timeout_s)

    return mock.patch.object(Tail, "projected_past", projected_past)


def rows_of_another_folded_onto() -> AbstractContextManager[Any]:
    """Whoever takes the lane does not notice that the one before still moves the rows."""

    async def carefree(_self: projection.Projection) -> None:
        """All is well."""

    return mock.patch.object(projection.Projection, "_check_alone", carefree)


def no_fence_before_the_commit() -> AbstractContextManager[Any]:
    """What was folded under somebody else's claim is written all the same."""

    def unfenced(_self: projection.Projection) -> None:
        """All is well."""

    return mock.patch.object(projection.Projection, "_check_fence", unfenced)


def switched_too_early() -> AbstractContextManager[Any]:
    """A replay does not see to it that the new rows include what the live ones do."""

    async def nothing(*_: object) -> dict[int, int]:
        return {}

    return mock.patch.object(Replay, "_needed", nothing)


def lost_for_the_next_lane_too() -> AbstractContextManager[Any]:
    """A lane that begins anew does not take note that Postgres is there, until it has something to write."""
    back = Health.back

    def forgetful(self: Health, part: str) -> None:
        if part != "database" or self.state == "working":
            back(self, part)

    return mock.patch.object(Health, "back", forgetful)


@contextlib.contextmanager
def rows_read_as_gone() -> Iterator[None]:
    """A question to the tables that fails is answered as if nothing were there."""
    uploads = MemoryRows.uploads

    async def forgiving(self: MemoryRows, ids: Sequence[str]) -> dict[str, Upload]:
        try:
            return await uploads(self, ids)
        except DatabaseUnavailable:
            return {}

    with mock.patch.object(MemoryRows, "uploads", forgiving):
        yield


PLANTED: dict[str, Planted] = {
    "no fence in the rows": Planted("zombie", no_fence_in_the_rows, seeds=60),
    "rows before position": Planted("bad_file_and_retry", rows_before_position),
    "lost although acknowledged": Planted("two_users", lost_although_acknowledged),
    "unknown told as refused": Planted("cancelled_in_work", unknown_told_as_refused),
    "crashes that cost nothing": Planted("zombie", crashes_that_cost_nothing),
    "interruptions that cost": Planted("deploy", interruptions_that_cost),
    "a new id each time": Planted("duplicates", a_new_id_each_time),
    "bytes dropped in doubt": Planted("last_place", bytes_dropped_in_doubt),
    "kept facts forgotten": Planted("two_users", kept_facts_forgotten),
    "late copies overlooked": Planted("decoder_away", late_copies_overlooked, seeds=80),
    "never looked back": Planted("rebuilt", never_looked_back, seeds=400),
    "written again after the commit": Planted("bad_file_and_retry", written_again_after_the_commit),
    "rows ahead of the tail": Planted("deleted", rows_ahead_of_the_tail, quiet=True),
    "no fence before the commit": Planted("claimed_and_paused", no_fence_before_the_commit, quiet=True),
    "switched too early": Planted("rebuilt", switched_too_early),
    "lost for the next lane too": Planted("rebuilt", lost_for_the_next_lane_too, quiet=True),
    "rows of another folded onto": Planted("zombie", rows_of_another_folded_onto, seeds=700),
    "rows read as gone": Planted("bad_file_and_retry", rows_read_as_gone),
}
