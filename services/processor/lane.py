"""The lane's hand: one upload after the other, each choice and each outcome a fact in the log.

It decides from the folded state plus an overlay of its own appends that were not read back yet: such an upload is
neither in the queue nor chosen again. UploadStarted is durable before the work begins, in one record batch with the
outcome before it and the batch's completion. What comes back ignored is undone here: the log decides, not this process.
"""

import asyncio
import contextlib
import copy
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import structlog

from schemas.batch import Batch, Ignored, Upload, completion
from schemas.events import (
    BatchCompleted,
    BatchEvent,
    BatchSealed,
    Envelope,
    LaneClaimed,
    UploadProgressed,
    UploadStarted,
    UploadSucceeded,
    encode,
)
from schemas.ids import new_id
from schemas.views import rfc3339
from services.blobs import StorageUnavailable
from services.database import DatabaseUnavailable
from services.eventlog import Log, LogOutcomeUnknown, LogUnavailable, LogWriter
from services.faults import reach
from services.observability import UPLOADS_WORKED, WORK_SECONDS, logger
from services.processor import decisions
from services.processor.projection import GenerationChangedError, LaneLostError, Projected, Projection
from services.processor.work.port import WorkCancelled, WorkError, WorkerUnavailable
from services.processor.workbench import Work, Workbench

_log = logger("lane")

SOURCE = "sluice/processor"
APPEND_TIMEOUT_S = 10.0
RETRY_INTERVAL_S = 0.5
FINISH_GRACE_S = 1.0  # a clean stop hands the lane over within two seconds
READ_BACK_TIMEOUT_S = 2.0
PROGRESS_INTERVAL_S = 0.1

LookBack = Callable[[Mapping[str, int]], Awaitable[Collection[str]]]
"""Of which uploads the attempt in work (number by upload) was begun by a late copy of a start."""


def envelope() -> Envelope:
    """A fresh envelope for a fact of this process."""
    now_ms = time.time_ns() // 1_000_000
    return Envelope(id=new_id(now_ms=now_ms, random=os.urandom(9)), source=SOURCE, time=rfc3339(now_ms))


@dataclass(frozen=True, slots=True)
class Doing:
    """What the hand is at, since when (monotonic): the file of `started`, or an append where that is None."""

    since_s: float
    started: UploadStarted | None = None


class LaneWorker:
    """Works one lane under one epoch; `see` is called with every fact as it is folded, `run` until the end."""

    def __init__(
        self,
        *,
        epoch: int,
        log: Log,
        writer: LogWriter,
        projection: Projection,
        bench: Workbench,
        may_start: Callable[[], bool],
    ) -> None:
        self.epoch = epoch
        self.bench = bench
        self._log = log
        self._writer = writer
        self._projection = projection
        self._partition = projection.lane.partition
        self._may_start = may_start
        self._queue = decisions.Queue()
        self._due: dict[str, Batch] = {}
        self._completing: set[str] = set()
        self._unread: dict[str, BatchEvent] = {}
        self._unread_starts: set[str] = set()
        self._work: Work | None = None
        self.doing: Doing | None = None
        self.steps = 0
        self._stopping = False
        self._changed = asyncio.Event()
        self._newest_start = 0
        self._left_over: list[BatchEvent] = []

    @property
    def queued(self) -> int:
        """How many uploads wait."""
        return len(self._queue)

    @property
    def has_to_do(self) -> bool:
        """Whether the hand is at something, or should be."""
        return self.doing is not None or (bool(self.queued) and self._may_start())

    def wake(self) -> None:
        """Something that `run` waits for may have changed."""
        self._changed.set()

    # What was folded

    async def load(self, look_back: LookBack) -> None:
        """Begin with what the read models hold; attempts that nobody ended took their worker down with them, but for
        those that were begun by late copies only: nobody worked at these. `look_back` tells which these are."""
        in_work: list[Upload] = []
        self._queue, self._left_over = decisions.Queue(), []  # Postgres may have gone away in the midst of it before
        by_id: dict[str, Batch] = {}
        async with contextlib.aclosing(self._projection.unended()) as pages:
            async for page in pages:
                for user_id, offset in page.starts.items():
                    self._queue.started(user_id, offset)
                for batch in page.batches:
                    by_id[batch.id] = batch
                    self._note_completion(batch)
                for upload in page.uploads:
                    if upload.status == "processing":
                        in_work.append(upload)
                    else:
                        self._place(by_id[upload.batch_id], upload)
                await asyncio.sleep(0)
        late = await look_back({upload.id: upload.attempts for upload in in_work}) if in_work else ()
        for upload in in_work:
            ended = decisions.never_begun if upload.id in late else decisions.crashed
            self._left_over.append(ended(upload, epoch=self.epoch))

    def see(self, projected: Projected) -> None:
        """Take in a fact after it was folded; raises LaneLostError on a newer claim of this lane."""
        fact, batch, upload = projected.fact, projected.batch, projected.upload
        own = self._unread.pop(fact.id, None)
        if isinstance(own, UploadStarted):
            self._unread_starts.discard(own.upload_id)
        if isinstance(own, BatchCompleted):
            self._completing.discard(own.batch_id)
        if isinstance(projected.outcome, Ignored):
            self._see_ignored(own, projected.outcome)
        elif isinstance(fact.event, LaneClaimed) and fact.offset > self.epoch:
            raise LaneLostError(f"{fact.event.worker_id} claimed the lane at {fact.partition}-{fact.offset}")
        elif isinstance(fact.event, UploadStarted) and batch is not None:
            self._queue.started(batch.user_id, fact.offset)
            if own is None and fact.event.epoch == self.epoch:
                # A late copy of a start that was given back since: its number was free again, but nobody works on it.
                self._left_over.append(decisions.given_back(fact.event, reason=decisions.LATE_COPY))
        if batch is not None:
            self._see_batch(batch, upload)
        self._changed.set()

    def _see_batch(self, batch: Batch, upload: Upload | None) -> None:
        if batch.deleted or batch.status == "cancelled":
            self._queue.remove_batch(batch.id, batch.user_id)
            self._stop_work_of(batch.id)
        elif upload is not None:
            self._place(batch, upload)
        self._note_completion(batch)

    def _see_ignored(self, own: BatchEvent | None, reason: Ignored) -> None:
        if own is None:
            return
        _log.info("own_fact_ignored", type=own.type, batch_id=own.batch_id, reason=str(reason))
        if isinstance(own, UploadStarted) and self._work is not None and self._work.started is own:
            self.bench.stop(self._work, why="batch")

    def _place(self, batch: Batch, upload: Upload) -> None:
        if upload.status != "queued":
            self._queue.remove(upload.id)
        elif upload.id not in self._unread_starts:
            self._queue.put(
                user_id=batch.user_id,
                batch_id=batch.id,
                batch_created=batch.created_offset,
                upload_id=upload.id,
                place=upload.place,
            )

    def _note_completion(self, batch: Batch) -> None:
        if batch.completable and batch.id not in self._completing:
            self._due[batch.id] = batch
        else:
            self._due.pop(batch.id, None)

    def _stop_work_of(self, batch_id: str) -> None:
        if self._work is not None and self._work.started.batch_id == batch_id:
            self.bench.stop(self._work, why="batch")

    # What is done

    async def run(self) -> None:
        """Work until `stop`; what an attempt came to, what completes and the next start are one append."""
        try:
            await self._go_on()
        finally:
            self._ended_work()

    async def _go_on(self) -> None:
        outcomes: list[BatchEvent] = []
        while True:
            self._changed.clear()
            outcomes, self._left_over = [*outcomes, *self._left_over], []
            completions = self._completions(outcomes)
            # In work from here on: whoever stops it need not wait until its start is in the log.
            work = self._work = await self._choose()
            started = [] if work is None else [work.started]
            if facts := [*outcomes, *completions, *started]:
                await self._say(facts, ended=bool(outcomes), started=bool(started))
            outcomes = []
            if work is not None:
                outcomes = await self._attempt(work)
            elif self._stopping and not self._left_over:
                return
            elif not facts:
                await self._changed.wait()

    async def stop(self) -> None:
        """Start nothing more; let the file in work finish within a few seconds, else give it back unharmed."""
        self._stopping = True
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_GRACE_S):
                while self._work is not None:
                    self._changed.clear()
                    await self._changed.wait()
        if self._work is not None:
            self.bench.stop(self._work, why="shutdown")
        self._changed.set()

    async def read_back(self) -> None:
        """Wait, for a bounded time, until what was appended here has been folded: then the read models end with it.
        What lands late meanwhile is given back, as `run` would have done."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READ_BACK_TIMEOUT_S):
                while self._unread or self._left_over:
                    self._changed.clear()
                    facts, self._left_over = self._left_over, []
                    if facts:
                        await self._append(facts)
                    else:
                        await self._changed.wait()

    async def seal_idle(self, before_ms: int) -> None:
        """Seal the open batches that nothing was queued into since `before_ms`."""
        said = {event.batch_id for event in self._unread.values() if isinstance(event, BatchSealed)}
        if idle := [batch for batch in await self._projection.idle_batches(before_ms) if batch.id not in said]:
            await self._append([BatchSealed(batch_id=b.id, user_id=b.user_id, reason="idle") for b in idle])

    def _completions(self, outcomes: Sequence[BatchEvent]) -> list[BatchCompleted]:
        completed = [completion(batch, epoch=self.epoch) for batch in self._due.values()]
        self._due.clear()
        for outcome in outcomes:
            batch = self._work_batch
            if batch is not None and batch.id == outcome.batch_id and decisions.completes(batch, outcome):
                after = copy.copy(batch)
                after.move("processing", "completed" if isinstance(outcome, UploadSucceeded) else "failed")
                completed.append(completion(after, epoch=self.epoch))
        self._completing.update(event.batch_id for event in completed)
        return completed

    _work_batch: Batch | None = None

    async def _choose(self) -> Work | None:
        """The upload whose turn it is, taken out of the queue, and its start; None where nothing waits or may start."""
        while self._starts() and (upload_id := self._queue.next()) is not None:
            try:
                upload = await self._projection.upload(upload_id)
                batch = await self._projection.batch(upload.batch_id) if upload else None
            except (DatabaseUnavailable, GenerationChangedError):
                return None
            if upload_id not in self._queue or not self._starts():
                continue
            self._queue.remove(upload_id)
            if upload is None or batch is None or upload.status != "queued":
                continue
            self._work_batch = batch
            self._unread_starts.add(upload_id)
            self._newest_start = max(self._newest_start + 1, self._projection.lane.next_offset)
            self._queue.started(batch.user_id, self._newest_start)
            return Work(decisions.start(upload, epoch=self.epoch), upload)
        return None

    def _starts(self) -> bool:
        return not self._stopping and self._may_start()

    async def _say(self, facts: Sequence[BatchEvent], *, ended: bool, started: bool) -> None:
        if ended:
            reach("processor.before_outcome")
        if started:
            reach("processor.before_start")
        self.doing = Doing(time.monotonic())
        await self._append(facts)
        self.doing = None
        self.steps += 1
        if ended:
            reach("processor.after_outcome")
        if started:
            reach("processor.after_start")

    async def _append(self, events: Sequence[BatchEvent]) -> None:
        envelopes = [envelope() for _ in events]
        self._unread.update({e.id: event for e, event in zip(envelopes, events, strict=True)})
        records = [encode(event, e) for event, e in zip(events, envelopes, strict=True)]
        lost_said = False
        while True:
            try:
                await self._writer.append(self._partition, records, timeout_s=APPEND_TIMEOUT_S)
            except (LogUnavailable, LogOutcomeUnknown) as error:
                # The same ids again: what landed already is folded once.
                if not lost_said:
                    _log.warning("append_failed", reason=str(error), facts=len(records))
                    lost_said = True
                await asyncio.sleep(RETRY_INTERVAL_S)
            else:
                return

    async def _attempt(self, work: Work) -> list[BatchEvent]:
        started, upload = work.started, work.upload
        began = time.monotonic()
        self.doing = Doing(began, started)
        with structlog.contextvars.bound_contextvars(upload_id=upload.id, attempt=started.attempt):
            try:
                outcomes = await self._outcome(work, began)
            finally:
                self._ended_work()
            outcome = outcomes[0].type.split(".")[1] if outcomes else "stopped"
            WORK_SECONDS.labels(outcome).observe(time.monotonic() - began)
            UPLOADS_WORKED.labels(outcome).inc()
            _log.info("upload_worked", outcome=outcome, filename=upload.filename, ms=_ms_since(began))
        return outcomes

    def _ended_work(self) -> None:
        self._work = self.doing = None
        self._changed.set()

    async def _outcome(self, work: Work, began: float) -> list[BatchEvent]:
        started, upload = work.started, work.upload
        try:
            result = await self.bench.result(work, on_progress=self._progress(started))
        except WorkCancelled:
            return [decisions.given_back(started, reason="shutdown")] if work.stopped == "shutdown" else []
        except (WorkerUnavailable, StorageUnavailable) as error:
            _log.warning("upload_given_back", reason=str(error))
            return [decisions.given_back(started, reason=str(error)[:500])]
        except WorkError as error:
            code, message, final = error.code, error.message, error.final
        else:
            succeeded = UploadSucceeded(
                batch_id=started.batch_id,
                upload_id=started.upload_id,
                attempt=started.attempt,
                epoch=self.epoch,
                result=result,
                duration_ms=_ms_since(began),
            )
            return [succeeded]
        attempt, epoch = started.attempt, self.epoch
        return [decisions.failed(upload, attempt=attempt, epoch=epoch, code=code, message=message, final=final)]

    def _progress(self, started: UploadStarted) -> Callable[[str, int], None]:
        said: tuple[str, int, float] = ("", -1, 0.0)

        def report(stage: str, percent: int) -> None:
            nonlocal said
            reach("processor.in_work")
            now = time.monotonic()
            if stage == said[0] and (percent == said[1] or now - said[2] < PROGRESS_INTERVAL_S):
                return
            said = (stage, percent, now)
            progressed = UploadProgressed(
                batch_id=started.batch_id,
                upload_id=started.upload_id,
                attempt=started.attempt,
                epoch=started.epoch,
                stage=stage,
                percent=percent,
            )
            self._log.publish_progress(self._partition, encode(progressed, envelope()))

        return report


def _ms_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
