"""The batches that clients watch: each is held in the tail once, and what it is told goes to the hub.

A batch is watched from the first subscription until a while after the last client left, so that one whose connection
broke finds what it missed. A fact is encoded here, once, in the moment the tail has folded it. Who may follow what is
decided in `subscriptions`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self

from schemas.batch import Changed
from schemas.errors import Code, RequestError
from schemas.events import UploadProgressed, decode_progress
from schemas.records import StoredRecord
from services.eventlog import ProgressReader
from services.lifecycle import cancelled
from services.notifier import messages
from services.notifier.hub import Frame, Hub
from services.tail import Folded, Held, Tail

LINGER_S = 30.0
PROGRESS_RECORDS_MAX = 500
PROGRESS_TIMEOUT_MS = 500
PROGRESS_DUE_TIMEOUT_MS = 25
END_TIMEOUT_S = 2.0
NOT_ALL_READ = "The batch is not known here, and the log cannot be read to its end just now; ask again"


@dataclass(slots=True, eq=False)
class _Watch:
    """`held`: what the tail knows of the batch (None: nobody heard of it) or why that cannot be said; `asking`: how
    many want to know just now; `leaving`: when it may end, if nobody uses it then."""

    held: asyncio.Future[Held | None]
    asking: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.TimerHandle | None = None


class Watches:
    """The batches in use by clients; see the module's text. Open it with `Watches.open`."""

    def __init__(self, *, tail: Tail, hub: Hub, linger_s: float) -> None:
        self._tail = tail
        self._hub = hub
        self.linger_s = linger_s
        self._watches: dict[str, _Watch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, *, tail: Tail, hub: Hub, linger_s: float = LINGER_S) -> AsyncIterator[Self]:
        watches = cls(tail=tail, hub=hub, linger_s=linger_s)
        stop_listening = tail.listen(watches._tell)
        try:
            yield watches
        finally:
            stop_listening()
            await cancelled(*watches._tasks)

    @property
    def batches(self) -> frozenset[str]:
        """Those that are held just now, or being looked up."""
        return frozenset(self._watches)

    @contextlib.asynccontextmanager
    async def find(self, batch_id: str) -> AsyncIterator[Held | None]:
        """The batch, watched at least as long as the block lasts; None where nobody heard of it by the log's end as of
        the call. Raises DatabaseUnavailable, and RequestError(LOG_UNAVAILABLE) where the log cannot be read to there
        now: nobody may be told "not found" then."""
        watch = self._watch(batch_id)
        try:
            held = await asyncio.shield(watch.held)
            if held is None:
                is_all_read = await self._tail.reached_end(END_TIMEOUT_S)
                watch = self._again(batch_id, watch)
                held = await asyncio.shield(watch.held)
                if held is None and not is_all_read:
                    raise RequestError(Code.LOG_UNAVAILABLE, NOT_ALL_READ)
            yield held
        finally:
            watch.asking -= 1
            self.left(batch_id)

    def left(self, batch_id: str) -> None:
        """A client left this batch: if it was the last one, let go of the batch in a while."""
        watch = self._watches.get(batch_id)
        if watch is None or watch.asking or not self._hub.watches(batch_id) or self._hub.watched_by(batch_id):
            return
        if watch.leaving is not None:
            watch.leaving.cancel()
        watch.leaving = asyncio.get_running_loop().call_later(self.linger_s, self._end_unless_used, batch_id)

    async def relay_progress(self, reader: ProgressReader) -> None:
        """Tell the percentages as they come, for ever."""
        loop = asyncio.get_running_loop()
        due = False
        while True:
            timeout_ms = PROGRESS_DUE_TIMEOUT_MS if due else PROGRESS_TIMEOUT_MS
            for record in await reader.read(records_max=PROGRESS_RECORDS_MAX, timeout_ms=timeout_ms):
                self._tell_progress(record, now_s=loop.time())
            due = self._hub.tell_due(now_s=loop.time())

    def _watch(self, batch_id: str) -> _Watch:
        """The watch of this batch, begun where there is none; one more asks for it."""
        watch = self._watches.get(batch_id)
        if watch is None:
            watch = self._watches[batch_id] = _Watch(asyncio.get_running_loop().create_future())
            task = asyncio.create_task(self._hold(batch_id, watch), name="watch")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        watch.asking += 1
        return watch

    def _again(self, batch_id: str, watch: _Watch) -> _Watch:
        watch.asking -= 1
        return self._watch(batch_id)

    async def _hold(self, batch_id: str, watch: _Watch) -> None:
        try:
            async with self._tail.hold(batch_id) as held:
                if held is None or held.batch is None:
                    del self._watches[batch_id]
                    watch.held.set_result(None)
                    return
                self._hub.watch(batch_id, floor=held.batch.offset, partition=held.batch.partition)
                watch.held.set_result(held)
                self.left(batch_id)  # who asked may have gone meanwhile
                await watch.over.wait()
        except Exception as error:  # noqa: BLE001  # it belongs to those who asked for the batch
            self._watches.pop(batch_id, None)
            watch.held.set_exception(error)
            watch.held.exception()

    def _end_unless_used(self, batch_id: str) -> None:
        if not self._watches[batch_id].asking and not self._hub.watched_by(batch_id):
            self._end(batch_id)

    def _end(self, batch_id: str) -> None:
        watch = self._watches.pop(batch_id)
        if watch.leaving is not None:
            watch.leaving.cancel()
        self._hub.forget(batch_id)
        watch.over.set()

    def _tell(self, folded: Folded) -> None:
        fact, batch = folded.fact, folded.batch
        if batch is None or not isinstance(folded.outcome, Changed):
            return
        if not (self._hub.watches(batch.id) or self._hub.watches_user(batch.user_id)):
            return
        text = messages.event(fact, time_ms=folded.time_ms, position=folded.position, batch=batch)
        frame = Frame.of(
            text, position=str(folded.position), partition=fact.partition, offset=fact.offset, batch_id=batch.id
        )
        self._hub.tell(batch.id, frame, upload_id=fact.upload_id, user_id=batch.user_id)
        if folded.outcome.swept == "deleted" and self._hub.watches(batch.id):
            self._end(batch.id)

    def _tell_progress(self, record: StoredRecord, *, now_s: float) -> None:
        told = decode_progress(record)
        held = self._tail.peek(told.batch_id) if told is not None else None
        if told is None or held is None or held.batch is None or not _in_work(held, told):
            return
        user_id = held.batch.user_id
        if self._hub.watches(told.batch_id) or self._hub.watches_user(user_id):
            frame = Frame.of(messages.progress(told))
            self._hub.tell_percentage(told.batch_id, told.upload_id, frame, now_s=now_s, user_id=user_id)


def _in_work(held: Held, told: UploadProgressed) -> bool:
    """Whether it is about the attempt that is in work, as far as the log was read."""
    upload = held.uploads.get(told.upload_id)
    return upload is not None and upload.status == "processing" and upload.attempts == told.attempt
