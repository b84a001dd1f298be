"""The tail: what api and notifier know of the log beyond the read models, and how they read it on.

It reads every partition from the position Postgres holds, folds the facts of batches in use with `evolve`, and keeps
the facts of all others until the read models include them. A batch is loaded when somebody asks: its rows at P′ plus
the kept facts after P′. So nothing after the projected position is ever missing here, whichever of the two is ahead.
Everything runs on one event loop; listeners are called synchronously, in log order within a partition.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Self

from schemas.batch import Batch, Ignored, Lane, evolve, step
from schemas.events import Fact, LaneClaimed, LogCreated, Undecodable, UploadQueued, decode
from schemas.ids import partition_of
from schemas.position import Position
from services.database import Database, DatabaseUnavailable, Snapshot
from services.eventlog import Log, LogError, LogReader, LogUnavailable
from services.folding import Folded, Held, Kept
from services.following import FollowedUsers, touched_by
from services.lifecycle import cancelled
from services.observability import LOG_LAG, TAIL_BATCHES_HELD, TAIL_FACTS_HELD, logger, say_change
from services.partitions import Partition, first_waiting
from services.recognising import Recogniser
from services.waiting import Conditions, ReadBack

__all__ = ["Folded", "Held", "Kept", "ReadBack", "Tail"]

_log = logger("tail")

Past = Callable[[str, int], Awaitable[Held]]
"""A batch as it was before an offset, from the index of its facts; see services/history.py."""

READ_RECORDS_MAX = 2_000
READ_TIMEOUT_MS = 200
WATCH_INTERVAL_S = 1.0
SILENCE_S_MAX = 5.0
LOAD_TIMEOUT_S = 5.0
CREATED_UNUSED_S = 60.0
FOLLOWED_LOAD_TIMEOUT_S = 3.0
READ_TOO_SLOWLY = "the log is read more slowly than the read models are written; try again"
FACTS_OVER_MAX = 10_000
"""So many more facts than `facts_max` are held for the read models before the log is read no further: those of writes
that were under way."""
FOLLOWED_HELD_MAX = 10
"""How many times `batches_max` batches may be in memory before no more are held for users who are followed."""


class Tail:
    """Reads the log on; see the module's text. Open it with `Tail.open`."""

    def __init__(
        self,
        *,
        reader: LogReader,
        recogniser: Recogniser,
        database: Database,
        log_id: str,
        lanes: Mapping[int, Lane],
        facts_max: int,
        batches_max: int,
        past: Past | None,
    ) -> None:
        self.log_id = log_id
        self._reader = reader
        self._recogniser = recogniser
        self._database = database
        self._facts_max = facts_max
        self._batches_max = batches_max
        self._past = past
        self._partitions = {number: Partition.at(lane) for number, lane in lanes.items()}
        self._held: dict[str, Held] = {}
        self._kept: dict[str, list[Kept]] = {}
        self._batch_of_upload: dict[str, str] = {}
        self._loading: dict[str, asyncio.Task[Held]] = {}
        self._in_hand: list[Fact | Undecodable] = []
        """Read, and to be taken when the batches are in memory that must be."""
        self._bringing: set[str] = set()
        self._followed = FollowedUsers()
        self.keeping = self._followed.keeping
        self._waiting: dict[str, asyncio.Future[Folded]] = {}
        self._listeners: list[Callable[[Folded], None]] = []
        self._conditions = Conditions()
        self._generation: str | None = None
        self._ends: dict[int, int] = {}
        self._caught_up_at_s: float | None = None
        self._log_problem: str | None = None
        self._database_problem: str | None = None
        self._answered_at_s = time.monotonic()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        *,
        log: Log,
        database: Database,
        log_id: str,
        partitions: int,
        facts_max: int = 200_000,
        batches_max: int = 2_000,
        past: Past | None = None,
    ) -> AsyncIterator[Self]:
        """A tail that reads on from the projected position until the block is left. Following users needs the `past`.

        Raises DatabaseUnavailable, LogUnavailable, LogRefused where the log does not reach that position.
        """
        projected = await database.positions()
        lanes = {number: projected.get(number) or Lane(number, log_id) for number in range(partitions)}
        reader = log.reader(range(partitions))
        tail = cls(
            reader=reader,
            recogniser=Recogniser(reader, topic=log.settings.topic, log_id=log_id),
            database=database,
            log_id=log_id,
            lanes=lanes,
            facts_max=facts_max,
            batches_max=batches_max,
            past=past,
        )
        tail._generation = await database.generation()
        try:
            for number, lane in lanes.items():
                await reader.seek(number, lane.next_offset)
            tasks = [
                asyncio.create_task(work(), name=f"tail.{work.__name__}")
                for work in (tail._read, tail._measure, tail._watch_projection)
            ]
            try:
                tail._tasks = tasks
                yield tail
            finally:
                await cancelled(*tasks, *tail._loading.values())
        finally:
            await reader.close()

    _tasks: list[asyncio.Task[None]]

    # What is known

    def position(self) -> Position:
        """The last record read, of every partition."""
        return Position.of(self.log_id, {n: p.lane.next_offset - 1 for n, p in self._partitions.items()})

    def projected(self) -> Position:
        """What the read models include, as last heard; partitions of which they include nothing are left out."""
        return Position.of(self.log_id, {n: p.includes - 1 for n, p in self._partitions.items() if p.includes})

    def oldest_unprojected_ms(self) -> int | None:
        """When the oldest fact was appended that the read models do not include; None where there is none."""
        waiting = (first_waiting(p.kept_order, p.projected) for p in self._partitions.values())
        kept = [self._kept[batch_id][0].time_ms for batch_id in waiting if batch_id in self._kept]
        return min(kept, default=None)

    @property
    def lacking(self) -> list[str]:
        """Why the read models include less than they did before, in sentences: they are not to be asked meanwhile."""
        return [complaint for each in self._partitions.values() if (complaint := each.complaint) is not None]

    def check_whole(self) -> None:
        """Raises DatabaseUnavailable while the read models lack something."""
        if self.lacking:
            raise DatabaseUnavailable(self.lacking[0])

    def unprojected(self) -> int:
        """How many records were read that the read models do not include yet."""
        return sum(max(0, p.lane.next_offset - p.includes) for p in self._partitions.values())

    @property
    def full(self) -> bool:
        """Whether so many facts wait for the read models that new ones are not taken."""
        return self._facts_held() >= self._facts_max

    @property
    def _overfull(self) -> bool:
        return self._facts_held() >= self._facts_max + FACTS_OVER_MAX

    def _facts_held(self) -> int:
        return sum(max(0, p.lane.next_offset - p.projected) for p in self._partitions.values())

    def lag_s(self) -> float:
        """Seconds since everything that was in the log had been read; infinite before the first time."""
        return float("inf") if self._caught_up_at_s is None else time.monotonic() - self._caught_up_at_s

    def behind_s(self, lag_max_s: float) -> float | None:
        """The lag where it is more than this and nothing else says why; None where it is not."""
        lag_s = self.lag_s()
        return lag_s if self._log_problem is None and lag_max_s < lag_s < float("inf") else None

    def problems(self) -> list[str]:
        """What keeps the tail from being up to date, in sentences; empty when it is."""
        ended = [str(task.exception()) for task in self._tasks if task.done() and not task.cancelled()]
        database = self._database_problem or self._silence()
        lost = filter(None, (self._log_problem, self._recogniser.complaint, database))
        return [*ended, *lost, *self.lacking, *self._waits()]

    def _silence(self) -> str | None:
        """A Postgres that is paused refuses nothing: it only does not answer."""
        silent_s = time.monotonic() - self._answered_at_s
        return f"Postgres has not answered for {silent_s:.0f} s" if silent_s > SILENCE_S_MAX else None

    def _waits(self) -> list[str]:
        if self._overfull:
            waiting = self._facts_held()
            return [f"{waiting} facts wait for the read models, so the log is read no further until these move"]
        behind = self._caught_up_at_s is None and self._log_problem is None
        return ["the log was not read to its end yet"] if behind else []

    @property
    def log_problem(self) -> str | None:
        """Why the log cannot be read just now; None when it can."""
        return self._log_problem

    @property
    def database_problem(self) -> str | None:
        """Why the read models cannot be asked how far they are; None where they can."""
        return self._database_problem

    async def failure(self) -> None:
        """Return never, but raise what ended one of the tail's tasks; nobody can go on without them."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    # What others wait for

    async def caught_up(self) -> None:
        """Wait until everything that was in the log at one moment after the call has been read."""
        began = time.monotonic()
        await self._conditions.until(lambda: self._caught_up_at_s is not None and self._caught_up_at_s >= began)

    async def reached(self, position: Position, timeout_s: float) -> bool:
        """Whether the tail has read so far within `timeout_s`."""
        return await self._conditions.within(lambda: self.position().includes(position), timeout_s)

    async def reached_end(self, timeout_s: float) -> bool:
        """Whether the tail has read, within `timeout_s`, to where the log ended at the call."""
        try:
            async with asyncio.timeout(timeout_s):
                ends = await self._reader.ends()
        except (TimeoutError, LogUnavailable):
            return False
        return await self._conditions.within(lambda: self._read_to(ends), timeout_s)

    async def projected_past(self, position: Position, timeout_s: float) -> bool:
        """Whether the read models include the position within `timeout_s`, and so does what is known here: it answers
        what they do not have, and may be behind them."""
        return await self._conditions.within(
            lambda: self.projected().includes(position) and self.position().includes(position), timeout_s
        )

    def read_back(self, event_ids: Sequence[str]) -> ReadBack:
        """Await these facts, which are appended next; their batch must be held or created here meanwhile."""
        return ReadBack(self._waiting, event_ids)

    def listen(self, callback: Callable[[Folded], None]) -> Callable[[], None]:
        """Call back for every fact of every batch in memory, effective or ignored; the result ends it."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    # Batches in use

    def ahead(self, batch_id: str) -> bool:
        """Whether facts of this batch were read here that the read models do not include."""
        held = self._held.get(batch_id)
        if held is None:
            return batch_id in self._kept
        return held.batch is not None and held.batch.offset >= self._partitions[held.batch.partition].projected

    def batch_of(self, upload_id: str) -> str | None:
        """The batch of an upload that the read models do not include yet; None where that is not known here."""
        return self._batch_of_upload.get(upload_id)

    def create(self, batch_id: str) -> None:
        """Fold this batch from its first fact on: the caller made its id just now, so nobody else knows it."""
        self._held[batch_id] = Held(batch_id, None, {}, folded_to=0, created_at_s=time.monotonic())

    @contextlib.asynccontextmanager
    async def hold(self, batch_id: str) -> AsyncIterator[Held | None]:
        """The batch as of the tail's head, kept up to date as long as the block lasts; None where nobody heard of it
        (facts that come meanwhile are folded all the same).

        Raises DatabaseUnavailable where the batch is not in memory and its rows cannot be had.
        """
        if partition_of(batch_id) not in self._partitions:
            yield None
            return
        held = await self._load(batch_id)
        while self._held.get(batch_id) is not held:  # it was let go of before we could say that we use it
            held = await self._load(batch_id)
        held.users += 1
        try:
            yield held if held.batch is not None else None
        finally:
            held.users -= 1

    async def _load(self, batch_id: str) -> Held:
        if held := self._held.get(batch_id):
            return held
        loading = self._loading.get(batch_id)
        if loading is None:
            loading = asyncio.create_task(self._load_rows(batch_id), name="tail.load")
            loading.add_done_callback(lambda _: self._loading.pop(batch_id, None))
            self._loading[batch_id] = loading
        return await asyncio.shield(loading)

    async def _load_rows(self, batch_id: str) -> Held:
        partition = self._partitions[partition_of(batch_id)]
        snapshot = await self._snapshot(batch_id, partition)
        included = snapshot.lane.next_offset
        if not await self._conditions.within(lambda: partition.lane.next_offset >= included, LOAD_TIMEOUT_S):
            raise DatabaseUnavailable(READ_TOO_SLOWLY)
        return self._take_in(Held(batch_id, snapshot.batch, snapshot.uploads, folded_to=included), partition)

    async def _snapshot(self, batch_id: str, partition: Partition) -> Snapshot:
        """The rows; the facts after them are at hand, as long as the batch is being loaded."""
        complete_from = partition.projected
        snapshot = await self._database.snapshot(batch_id)
        if snapshot.lane.next_offset < complete_from:
            raise DatabaseUnavailable(
                f"the read models are being rebuilt: they include {snapshot.lane.next_offset} records of partition "
                f"{partition.lane.partition}, of {complete_from} they included before"
            )
        return snapshot

    def _take_in(self, held: Held, partition: Partition) -> Held:
        """Keep up to date what was loaded, unless that was done meanwhile: the facts after it are at hand."""
        if (known := self._held.get(held.id)) is not None:
            return known
        self._held[held.id] = held
        for kept in self._kept.get(held.id, ()):
            self._fold(held, partition, kept)
        return held

    def peek(self, batch_id: str) -> Held | None:
        """The batch, if it is in memory."""
        return self._held.get(batch_id)

    def unprojected_of(self, batch_id: str) -> list[Kept]:
        """The facts of a batch in memory that the read models may not include yet, in order, and what they did."""
        return [kept for kept in self._kept.get(batch_id, ()) if kept.folded]

    # Users who are followed

    def follow(self, user_id: str, on_lost: Callable[[str], None]) -> frozenset[str]:
        """From now on, hold every unfinished batch of this user that comes into memory, and bring any other one there
        before its next effective fact is folded: none is missed, whoever listens. What is unfinished now must be held
        once by the caller: that is what Postgres has, and the result, the batches this user did something with that
        the read models may not know of.

        `on_lost`: called with the reason when that could not be done; the user is followed no more then.
        """
        assert self._past is not None, "a tail that follows users needs to look at the past"
        self._followed.add(user_id, on_lost)
        in_hand = touched_by(user_id, self._in_hand)
        self._bringing |= in_hand
        return frozenset(in_hand.union(*(touched_by(user_id, (k.fact for k in kept)) for kept in self._kept.values())))

    def let_sleep(self, user_id: str, batch_ids: Collection[str]) -> set[str]:
        """Have these unfinished batches of a followed user in memory only when facts name them. Without the result:
        those there already, or with facts that what the caller read may not include; these are to be held once."""
        in_hand = {fact.batch_id for fact in self._in_hand if isinstance(fact, Fact)}
        awake = {each for each in batch_ids if each in self._held or each in self._kept or each in in_hand}
        self._followed.let_sleep(user_id, set(batch_ids) - awake)
        return awake

    def unfollow(self, user_id: str) -> None:
        self._followed.remove(user_id)

    def held_of(self, user_id: str) -> list[Batch]:
        """This user's batches in memory, the deleted ones too."""
        batches = (held.batch for held in self._held.values())
        return [batch for batch in batches if batch is not None and batch.user_id == user_id]

    async def _bring_followed(self, facts: Sequence[Fact | Undecodable]) -> None:
        """Before these facts are taken: bring the batches into memory that they name and somebody follows."""
        for user_id, batch_id, is_first in self._followed.named_in(facts):
            self._bringing.add(batch_id)
            if batch_id in self._held:
                continue
            if len(self._held) >= FOLLOWED_HELD_MAX * self._batches_max:
                self._followed.lose(user_id, "too many batches are in work to follow all of them")
            elif is_first and batch_id not in self._kept:
                self.create(batch_id)
            elif self._database_problem is not None:
                self._followed.lose(user_id, self._database_problem)
            else:
                await self._bring(user_id, batch_id)

    async def _bring(self, user_id: str, batch_id: str) -> None:
        """Load a batch as of where its partition was read to; where the rows are ahead of that, from its past."""
        assert self._past is not None
        partition = self._partitions[partition_of(batch_id)]
        try:
            async with asyncio.timeout(FOLLOWED_LOAD_TIMEOUT_S):
                snapshot = await self._snapshot(batch_id, partition)
                if (included := snapshot.lane.next_offset) > partition.lane.next_offset:
                    held = await self._past(batch_id, partition.lane.next_offset)
                else:
                    held = Held(batch_id, snapshot.batch, snapshot.uploads, folded_to=included)
        except (DatabaseUnavailable, LogError, TimeoutError) as error:
            self._followed.lose(user_id, getattr(error, "told", "the database does not answer"))
        else:
            self._take_in(held, partition)

    # Reading on

    async def _read(self) -> None:
        while True:
            await self._conditions.until(lambda: not self._overfull)
            try:
                records = await self._reader.read(records_max=READ_RECORDS_MAX, timeout_ms=READ_TIMEOUT_MS)
            except LogUnavailable as error:
                self._say_log_problem(error)
                await asyncio.sleep(WATCH_INTERVAL_S / 2)
                continue
            self._say_log_problem(None)
            self._in_hand = [decode(record) for record in records]
            if self._followed:
                await self._bring_followed(self._in_hand)
            for fact in self._in_hand:
                self._take(fact)
            self._in_hand = []
            self._bringing.clear()
            self._conditions.wake()

    def _take(self, fact: Fact | Undecodable) -> None:
        partition = self._partitions[fact.partition]
        step(partition.lane, fact.offset, fact.timestamp_ms)
        if isinstance(fact, Undecodable):
            return
        batch_id = fact.batch_id
        if isinstance(fact.event, LogCreated | LaneClaimed) or batch_id is None:
            evolve(partition.lane, None, None, fact)
            return
        if isinstance(fact.event, UploadQueued) and fact.offset >= partition.projected:
            self._batch_of_upload.setdefault(fact.event.upload_id, batch_id)
            partition.queued_order.append((fact.offset, fact.event.upload_id))
        kept = Kept(fact, partition.lane.epoch, partition.lane.time_ms)
        if fact.offset >= partition.projected or batch_id in self._loading:
            self._kept.setdefault(batch_id, []).append(kept)
            partition.kept_order.append((fact.offset, batch_id))
        if held := self._held.get(batch_id):
            self._fold(held, partition, kept)

    def _fold(self, held: Held, partition: Partition, kept: Kept) -> None:
        fact = kept.fact
        if fact.offset < held.folded_to:
            return
        outcome = held.fold(fact, log_id=self.log_id, epoch=kept.epoch, time_ms=kept.time_ms)
        kept.folded, kept.ignored = True, outcome if isinstance(outcome, Ignored) else None
        position = self.position().at(partition.lane.partition, fact.offset)
        folded = Folded(fact, outcome, held.batch, kept.time_ms, position)
        if (reader := self._waiting.pop(fact.id, None)) and not reader.done():
            reader.set_result(folded)
        for listener in self._listeners:
            listener(folded)

    # How far the log and the read models are

    async def _measure(self) -> None:
        while True:
            asked_at_s = time.monotonic()
            try:
                await self._recogniser.look()
                self._ends = await self._reader.ends()
                await self._conditions.within(lambda: self._read_to(self._ends), WATCH_INTERVAL_S)
                if self._read_to(self._ends):
                    self._caught_up_at_s = asked_at_s
                    self._conditions.wake()
            except LogUnavailable:
                pass  # `_read` meets and says the same, and the lag grows meanwhile
            for number, partition in self._partitions.items():
                LOG_LAG.labels(number).set(max(0, self._ends.get(number, 0) - partition.lane.next_offset))
            await asyncio.sleep(WATCH_INTERVAL_S / 2)

    def _read_to(self, ends: Mapping[int, int]) -> bool:
        return all(self._partitions[number].lane.next_offset >= end for number, end in ends.items())

    async def _watch_projection(self) -> None:
        while True:
            lost = asyncio.Event()
            try:
                connection = await self._database.listen(self._heard_projected, lost)
                try:
                    while not lost.is_set():
                        await self._ask_projected()
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(lost.wait(), WATCH_INTERVAL_S)
                finally:
                    connection.terminate()
            except DatabaseUnavailable as error:
                self._say_database_problem(error)
                await asyncio.sleep(WATCH_INTERVAL_S)

    async def _ask_projected(self) -> None:
        before = {number: partition.includes for number, partition in self._partitions.items()}
        lanes = await self._database.positions()
        self._answered_at_s = time.monotonic()
        for number, partition in self._partitions.items():
            partition.found(lanes[number].next_offset if number in lanes else 0, before=before[number])
        await self._renew(await self._database.generation())
        self._say_database_problem(None)
        self._evict()
        self._conditions.wake()

    async def _renew(self, generation: str) -> None:
        """Where other read models are live than before, load again what was loaded from the old ones: rebuilt with what
        was in quarantine, they may say more. Raises DatabaseUnavailable, and is called again then."""
        if self._generation not in (None, generation):
            _log.info("read_models_rebuilt", generation=generation, batches=len(self._held))
            for held in list(self._held.values()):
                await self._renew_held(held)
                self._answered_at_s = time.monotonic()  # Postgres answers, however many there are
            for user_id in self._followed.users:
                rows = await self._database.read(
                    "SELECT id FROM {generation}.upload_batches "
                    "WHERE user_id = $1 AND status IN ('pending', 'processing')",
                    user_id,
                )
                for batch_id in self.let_sleep(user_id, [row["id"] for row in rows]):
                    await self._load(batch_id)
        self._generation = generation

    async def _renew_held(self, held: Held) -> None:
        """Load a batch again, in place: it may be in use, and goes on being folded meanwhile."""
        if held.id in self._loading:
            await asyncio.wait({self._loading[held.id]})
        if self._held.get(held.id) is not held:
            return
        self._loading[held.id] = asyncio.create_task(self._reloaded(held), name="tail.reload")
        try:
            await self._loading[held.id]
        finally:
            del self._loading[held.id]

    async def _reloaded(self, held: Held) -> Held:
        partition = self._partitions[partition_of(held.id)]
        snapshot = await self._snapshot(held.id, partition)
        included = snapshot.lane.next_offset
        if not await self._conditions.within(lambda: partition.lane.next_offset >= included, LOAD_TIMEOUT_S):
            raise DatabaseUnavailable(READ_TOO_SLOWLY)
        if snapshot.batch is not None or held.batch is None:
            kept = self._kept.get(held.id, ())
            held.renew(snapshot.batch, snapshot.uploads, folded_to=included, kept=kept, log_id=self.log_id)
        return held

    def _heard_projected(self, number: int, next_offset: int) -> None:
        if (partition := self._partitions.get(number)) is not None:
            partition.heard(next_offset)
        self._conditions.wake()

    def _evict(self) -> None:
        for partition in self._partitions.values():
            self._drop_kept(partition)
        now_s = time.monotonic()
        for held in list(self._held.values()):
            if len(self._held) <= self._batches_max:
                break
            if held.users == 0 and held.id not in self._bringing and self._is_projected(held, now_s):
                del self._held[held.id]
        TAIL_BATCHES_HELD.set(len(self._held))
        TAIL_FACTS_HELD.set(self._facts_held())

    def _is_projected(self, held: Held, now_s: float) -> bool:
        """Whether Postgres has all there is to it, and nobody needs it here."""
        if held.batch is None:
            return now_s - held.created_at_s > CREATED_UNUSED_S
        projected = self._partitions[held.batch.partition].projected
        return held.batch.offset < projected and not self._followed.needs(held.batch)

    def _drop_kept(self, partition: Partition) -> None:
        while partition.queued_order and partition.queued_order[0][0] < partition.projected:
            self._batch_of_upload.pop(partition.queued_order.popleft()[1], None)
        order = partition.kept_order
        while order and order[0][0] < partition.projected:
            if order[0][1] in self._loading or order[0][1] in self._bringing:
                break
            offset, batch_id = order.popleft()
            kept = self._kept.get(batch_id)
            if kept and kept[0].fact.offset == offset:
                kept.pop(0)
                if not kept:
                    del self._kept[batch_id]

    def _say_log_problem(self, error: LogError | None) -> None:
        self._log_problem = say_change(_log, "log", self._log_problem, error)

    def _say_database_problem(self, error: DatabaseUnavailable | None) -> None:
        self._database_problem = say_change(_log, "database", self._database_problem, error)
