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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from schemas.batch import Batch, Ignored, Upload, completion
from schemas.errors import WorkCode
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
from services.blobs import BlobMissing, BlobStore, LocalFile, StorageUnavailable
from services.database import DatabaseUnavailable
from services.eventlog import Log, LogOutcomeUnknown, LogUnavailable, LogWriter
from services.faults import reach
from services.lifecycle import cancelled
from services.observability import UPLOADS_WORKED, WORK_SECONDS, logger
from services.processor import decisions
from services.processor.projection import GenerationChangedError, LaneLostError, Projected, Projection
from services.processor.storage import Patience, unreadable
from services.processor.work.port import Job, WorkCancelled, WorkError, WorkerUnavailable
from services.processor.work.process import WorkerProcess

_log = logger("lane")

SOURCE = "sluice/processor"
APPEND_TIMEOUT_S = 10.0
RETRY_INTERVAL_S = 0.5
FINISH_GRACE_S = 1.0  # a clean stop hands the lane over within two seconds
READ_BACK_TIMEOUT_S = 2.0
PROGRESS_INTERVAL_S = 0.1


def envelope() -> Envelope:
    """A fresh envelope for a fact of this process."""
    now_ms = time.time_ns() // 1_000_000
    return Envelope(id=new_id(now_ms=now_ms, random=os.urandom(9)), source=SOURCE, time=rfc3339(now_ms))


@dataclass(slots=True)
class _Work:
    """The file in work. `stopped` says why it was stopped from outside: its batch, or `shutdown`; `bringing`: its bytes
    on their way here."""

    started: UploadStarted
    upload: Upload
    stopped: str | None = None
    bringing: "asyncio.Task[LocalFile] | None" = None


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
        blobs: BlobStore,
        worker: WorkerProcess,
        scratch: Path,
        work_timeout_s: float,
        may_start: Callable[[], bool],
    ) -> None:
        self.epoch = epoch
        self._log = log
        self._writer = writer
        self._projection = projection
        self._partition = projection.lane.partition
        self._blobs = blobs
        self._worker = worker
        self._patience = Patience(blobs)
        self._scratch = scratch
        self._work_timeout_s = work_timeout_s
        self._may_start = may_start
        self._queue = decisions.Queue()
        self._due: dict[str, Batch] = {}
        self._completing: set[str] = set()
        self._unread: dict[str, BatchEvent] = {}
        self._unread_starts: set[str] = set()
        self._work: _Work | None = None
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

    async def load(self) -> None:
        """Begin with what the read models hold; attempts that nobody ended took their worker down with them."""
        batches, uploads, starts = await self._projection.unended()
        by_id = {batch.id: batch for batch in batches}
        for user_id, offset in starts.items():
            self._queue.started(user_id, offset)
        for upload in uploads:
            if upload.status == "processing":
                self._left_over.append(decisions.crashed(upload, epoch=self.epoch))
            else:
                self._place(by_id[upload.batch_id], upload)
        for batch in batches:
            self._note_completion(batch)

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
                self._left_over.append(decisions.given_back(fact.event, reason="a late copy of an earlier start"))
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
            self._stop_work_of(own.batch_id)

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

    def _stop_work_of(self, batch_id: str, *, why: str = "batch") -> None:
        work = self._work
        if work is not None and work.started.batch_id == batch_id and work.stopped is None:
            work.stopped = why
            if work.bringing is not None:
                work.bringing.cancel()
            self._cancelling = asyncio.create_task(self._worker.cancel(), name="lane.cancel")

    _cancelling: "asyncio.Task[None]"

    # What is done

    async def run(self) -> None:
        """Work until `stop`; what an attempt came to, what completes and the next start are one append."""
        outcomes: list[BatchEvent] = []
        while True:
            self._changed.clear()
            outcomes, self._left_over = [*outcomes, *self._left_over], []
            completions = self._completions(outcomes)
            chosen = await self._choose()
            started = [] if chosen is None else [decisions.start(chosen, epoch=self.epoch)]
            if facts := [*outcomes, *completions, *started]:
                await self._say(facts, ended=bool(outcomes), started=bool(started))
            outcomes = []
            if chosen is not None:
                outcomes = await self._attempt(_Work(started[0], chosen))
            elif self._stopping:
                return
            elif not facts:
                await self._changed.wait()

    async def stop(self) -> None:
        """Start nothing more; let the file in work finish within a few seconds, else give it back unharmed."""
        self._stopping = True
        self._changed.set()
        deadline = time.monotonic() + FINISH_GRACE_S
        while (work := self._work) is not None and time.monotonic() < deadline:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                self._stop_work_of(work.started.batch_id, why="shutdown")
        self._changed.set()

    async def read_back(self) -> None:
        """Wait, for a bounded time, until what was appended here has been folded: then the read models end with it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READ_BACK_TIMEOUT_S):
                while self._unread:
                    self._changed.clear()
                    await self._changed.wait()

    async def seal_idle(self, before_ms: int) -> None:
        """Seal the open batches that nothing was queued into since `before_ms`."""
        idle = await self._projection.idle_batches(before_ms)
        if idle:
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

    async def _choose(self) -> Upload | None:
        """The upload whose turn it is, taken out of the queue; None where nothing waits or nothing may start."""
        while not self._stopping and self._may_start() and (upload_id := self._queue.next()) is not None:
            try:
                upload = await self._projection.upload(upload_id)
                batch = await self._projection.batch(upload.batch_id) if upload else None
            except (DatabaseUnavailable, GenerationChangedError):
                return None
            if upload_id not in self._queue:
                continue
            self._queue.remove(upload_id)
            if upload is None or batch is None or upload.status != "queued":
                continue
            self._work_batch = batch
            self._unread_starts.add(upload_id)
            self._newest_start = max(self._newest_start + 1, self._projection.lane.next_offset)
            self._queue.started(batch.user_id, self._newest_start)
            return upload
        return None

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

    async def _attempt(self, work: _Work) -> list[BatchEvent]:
        started, upload = work.started, work.upload
        self._work = work
        began = time.monotonic()
        self.doing = Doing(began, started)
        with structlog.contextvars.bound_contextvars(upload_id=upload.id, attempt=started.attempt):
            try:
                outcomes = await self._outcome(work, began)
            finally:
                self._work = self.doing = None
                self._changed.set()
            outcome = outcomes[0].type.split(".")[1] if outcomes else "stopped"
            WORK_SECONDS.labels(outcome).observe(time.monotonic() - began)
            UPLOADS_WORKED.labels(outcome).inc()
            _log.info("upload_worked", outcome=outcome, filename=upload.filename, ms=_ms_since(began))
        return outcomes

    async def _outcome(self, work: _Work, began: float) -> list[BatchEvent]:
        started, upload = work.started, work.upload
        try:
            result = await self._result(work)
        except WorkCancelled:
            return [decisions.given_back(started, reason="shutdown")] if work.stopped == "shutdown" else []
        except (WorkerUnavailable, StorageUnavailable) as error:
            _log.warning("upload_given_back", reason=str(error))
            await asyncio.sleep(RETRY_INTERVAL_S)
            if isinstance(error, WorkerUnavailable) or not await self._patience.ends_with(upload.id):
                return [decisions.given_back(started, reason=str(error)[:500])]
            problem = unreadable()
        except WorkError as error:
            problem = error
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
        code, message, final = problem.code, problem.message, problem.final
        attempt, epoch = started.attempt, self.epoch
        return [decisions.failed(upload, attempt=attempt, epoch=epoch, code=code, message=message, final=final)]

    async def _result(self, work: _Work) -> dict[str, object]:
        started, upload = work.started, work.upload
        copied = self._scratch / f"{upload.id}-{started.attempt}"
        thumbnail = self._scratch / f"{upload.id}-{started.attempt}.jpg"
        try:
            job = Job(
                upload_id=upload.id,
                batch_id=upload.batch_id,
                filename=upload.filename,
                content_type=upload.content_type,
                size_bytes=upload.size_bytes,
                sha256=upload.sha256,
                path=await self._bring(work, to=copied),
                thumbnail_path=thumbnail,
            )
            if work.stopped is not None:
                raise WorkCancelled
            result = await self._worker.run(job, on_progress=self._progress(started), timeout_s=self._work_timeout_s)
            reach("processor.after_work")
            if thumbnail.exists():
                await self._blobs.put_file(thumbnail, upload.id, epoch=self.epoch, attempt=started.attempt)
            return result
        finally:
            thumbnail.unlink(missing_ok=True)
            copied.unlink(missing_ok=True)

    async def _bring(self, work: _Work, *, to: Path) -> Path:
        """The upload's bytes as a file here, which may be a copy at `to`; given up once the work is stopped."""
        upload = work.upload
        work.bringing = asyncio.create_task(self._blobs.bring(upload.blob, to=to), name="lane.bring")
        try:
            await asyncio.wait({work.bringing})
        finally:
            if not work.bringing.done():
                await cancelled(work.bringing)
        if work.bringing.cancelled():
            raise WorkCancelled
        try:
            file = work.bringing.result()
        except BlobMissing:
            raise WorkError(WorkCode.BLOB_MISSING, "The stored file is gone.") from None
        if file.size_bytes != upload.size_bytes:
            raise WorkError(
                WorkCode.BLOB_MISSING,
                f"The stored file has {file.size_bytes} bytes, {upload.size_bytes} were accepted.",
            )
        return file.path

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
