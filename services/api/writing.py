"""Appending facts and hearing what became of them: nobody is told "done" before the fold said so.

The records of one wish are one record batch (several only where they would not fit), awaited from the tail. What is
sent and not read back in time is unknown, never failed: the same request may be sent again.
"""

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from schemas.batch import Batch, Changed, Ignored, Upload
from schemas.errors import Code, RequestError
from schemas.events import Envelope, LogEvent, encode
from schemas.ids import is_id, new_id
from schemas.position import Position
from schemas.records import NewRecord
from schemas.views import rfc3339
from services.api import decisions
from services.api.asking import Caller, RequestKey
from services.api.reading import read_to_end
from services.eventlog import (
    GROUP_BYTES_MAX,
    LogOutcomeUnknown,
    LogRefused,
    LogUnavailable,
    LogWriter,
    RecordTooLarge,
)
from services.faults import reach
from services.observability import APPEND_SECONDS, READ_BACK_SECONDS
from services.settings import Settings
from services.tail import Folded, Held, Tail

_SOURCE = "sluice/api"


@dataclass(frozen=True, slots=True)
class Became:
    """What became of one event: None where it is effective, or was before (a repetition)."""

    event: LogEvent
    offset: int
    ignored: Ignored | None
    repeated: bool

    @property
    def effective(self) -> bool:
        """Whether it was this one that was effective, and none before."""
        return self.ignored is None and not self.repeated


class Writing:
    """Appends for the api; see the module's text."""

    def __init__(self, *, tail: Tail, writer: LogWriter, settings: Settings) -> None:
        self._tail = tail
        self._writer = writer
        self._settings = settings

    def check_open(self) -> None:
        """Raises RequestError where no write can be answered just now: asked before any byte of it is read."""
        if self._tail.full:
            raise RequestError(
                Code.PROJECTION_BEHIND,
                f"{self._tail.unprojected()} facts wait for the read models; is the processor running?",
            )
        if (lag_s := self._tail.lag_s()) > self._settings.tail_lag_max_s:
            raise RequestError(
                Code.LOG_UNAVAILABLE,
                self._tail.log_problem or f"the log was not read to its end for {lag_s:.1f} s; try again",
            )

    async def append(self, events: Sequence[LogEvent], *, partition: int, caller: Caller) -> list[Became]:
        """Append the events and say what became of each; their batch must be held.

        Raises RequestError: LOG_UNAVAILABLE where nothing was sent, OUTCOME_UNKNOWN where something may have been.
        """
        became: list[Became] = []
        deadline_s = time.monotonic() + self._settings.read_back_timeout_s
        for group in _groups(self._records(events, partition, caller)):
            try:
                folded = await self._append_group(partition, group, deadline_s)
            except RequestError as error:
                if became:  # the groups before are in the log
                    raise RequestError(Code.OUTCOME_UNKNOWN, error.detail) from error
                raise
            became += [_became(event, each) for (event, _, _), each in zip(group, folded, strict=True)]
        return became

    @contextlib.asynccontextmanager
    async def theirs(self, batch_id: str, caller: Caller) -> AsyncIterator[tuple[Batch, dict[str, Upload]]]:
        """A batch of the caller and its uploads, live; raises RequestError(NOT_FOUND), DatabaseUnavailable.

        Where it is not known here, the log is read to its end first: another replica may have made it just now.
        """
        if not is_id(batch_id):
            raise decisions.not_found("batch")
        async with self._tail.hold(batch_id) as held:
            if held is None:
                await read_to_end(self._tail, self._settings)
            async with self._tail.hold(batch_id) as now:
                yield _theirs(now, caller)

    async def new_batch_id(self, key: RequestKey | None) -> str:
        """An id for a batch to be made; the same for the same key, also after partitions were added.

        Raises DatabaseUnavailable for one with a key: whether it is known already must be looked up.
        """
        partitions = self._settings.partitions
        if key is None:
            batch_id = new_id(now_ms=_now_ms(), random=os.urandom(9), partition=os.urandom(1)[0] % partitions)
            self._tail.create(batch_id)
            return batch_id
        for partition in range(partitions):
            async with self._tail.hold(known := key.id(partition=partition)) as held:
                if held is not None:
                    return known
        return key.id(partition=int(key.hash[:8], 16) % partitions)

    def new_upload_id(self, *, partition: int) -> str:
        return new_id(now_ms=_now_ms(), random=os.urandom(9), partition=partition)

    def position(self, partition: int, offset: int) -> str:
        """The position of a record, as it is answered."""
        return str(Position.of(self._tail.log_id, {partition: offset}))

    def _records(
        self, events: Sequence[LogEvent], partition: int, caller: Caller
    ) -> Iterator[tuple[LogEvent, str, NewRecord]]:
        now_ms = _now_ms()
        for event in events:
            event_id = new_id(now_ms=now_ms, random=os.urandom(9), partition=partition)
            envelope = Envelope(event_id, _SOURCE, rfc3339(now_ms), caller.traceparent)
            yield event, event_id, encode(event, envelope)

    async def _append_group(
        self, partition: int, group: "Sequence[tuple[LogEvent, str, NewRecord]]", deadline_s: float
    ) -> list[Folded]:
        began_s = time.monotonic()
        reading = self._tail.read_back([event_id for _, event_id, _ in group])
        try:
            reach("api.before_append")
            with contextlib.suppress(LogOutcomeUnknown):  # if it landed after all, the tail tells in what time is left
                await self._writer.append(
                    partition, [record for _, _, record in group], timeout_s=max(0.001, deadline_s - began_s)
                )
            reach("api.after_append")
            APPEND_SECONDS.observe(time.monotonic() - began_s)
            folded = await reading.wait(max(0.001, deadline_s - time.monotonic()))
        except TimeoutError:
            raise RequestError(
                Code.OUTCOME_UNKNOWN,
                f"it was not read back from the log in {self._settings.read_back_timeout_s:g} s: it may have been "
                "done or may yet be; send the same request again, with the same Idempotency-Key if it had one",
            ) from None
        except (LogUnavailable, LogRefused, RecordTooLarge) as error:
            raise RequestError(Code.LOG_UNAVAILABLE, error.told) from error
        finally:
            reading.cancel()
        READ_BACK_SECONDS.observe(time.monotonic() - began_s)
        reach("api.before_answer")
        return folded


def _groups(
    records: Iterator[tuple[LogEvent, str, NewRecord]],
) -> Iterator[list[tuple[LogEvent, str, NewRecord]]]:
    """The records in order, in as few groups as fit a record batch each."""
    group: list[tuple[LogEvent, str, NewRecord]] = []
    size_bytes = 0
    for each in records:
        size_bytes += each[2].size_bytes
        if group and size_bytes > GROUP_BYTES_MAX:
            yield group
            group, size_bytes = [], each[2].size_bytes
        group.append(each)
    if group:
        yield group


def _became(event: LogEvent, folded: Folded) -> Became:
    outcome = folded.outcome
    repeated = outcome is Ignored.REPETITION
    ignored = None if repeated or isinstance(outcome, Changed) else outcome
    return Became(event, folded.fact.offset, ignored, repeated)


def _theirs(held: Held | None, caller: Caller) -> tuple[Batch, dict[str, Upload]]:
    if held is None or held.batch is None or held.batch.deleted or held.batch.user_id != caller.user_id:
        raise decisions.not_found("batch")
    return held.batch, held.uploads


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
