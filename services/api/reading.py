"""Answering from the read models, and from the tail where it knows more.

A thing that was made a moment ago, on this api or another, is found even while nothing is projected: what the read
models do not have is looked for in the tail once that has read to the log's end.
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator

from schemas.batch import Batch, Upload
from schemas.errors import Code, RequestError
from schemas.events import EventView
from schemas.ids import is_id, partition_of
from schemas.position import InvalidPositionError, Position
from schemas.times import read_rfc3339
from schemas.views import BatchPage, BatchView, EventPage, PastEvent, UploadPage, UploadView, rfc3339
from services.api import queries
from services.api.decisions import not_found
from services.api.queries import Page
from services.database import Database
from services.eventlog import LogIdentity
from services.history import History, PastFact
from services.settings import Settings
from services.tail import Held, Tail

MIN_POSITION = "wait until the read models include this position, such as a write answered with"
"""What `Reading.wait_for` does, in the words of the OpenAPI document."""


class Reading:
    """Reads for the api; see the module's text. All of it is as the user may see it; the rest is not found."""

    def __init__(
        self, *, tail: Tail, history: History, database: Database, identity: LogIdentity, settings: Settings
    ) -> None:
        self._tail = tail
        self._identity = identity
        self._history = history
        self._database = database
        self._settings = settings

    async def wait_for(self, min_position: str | None) -> None:
        """Wait until the read models include this position; raises RequestError."""
        if min_position is None:
            return
        try:
            position = self._identity.here(Position.parse(min_position))
        except InvalidPositionError as error:
            raise RequestError(Code.INVALID_POSITION, f"min_position: {error}") from None
        if position.log != (ours := self._tail.position().log):
            raise RequestError(
                Code.POSITION_OF_ANOTHER_LOG,
                f"min_position is of the log {position.log}, this is the log {ours}; ask without it",
            )
        if not await self._tail.projected_past(position, self._settings.projection_timeout_s):
            raise RequestError(
                Code.PROJECTION_BEHIND,
                f"after {self._settings.projection_timeout_s:g} s the read models include "
                f"{self._tail.projected()}, not yet {position}; ask again, or without min_position",
            )

    async def batch(self, batch_id: str, *, user_id: str) -> BatchView:
        """Raises RequestError(NOT_FOUND), DatabaseUnavailable."""
        if is_id(batch_id) and not self._tail.lacking and not self._tail.ahead(batch_id):
            found = await queries.batch_of(self._database, batch_id, user_id=user_id)
            if found is not None:
                return BatchView.of_log(found, log_id=self._tail.log_id)
        async with self._held(batch_id, user_id) as (batch, _):
            return BatchView.of_log(batch, log_id=self._tail.log_id)

    async def batch_at(self, batch_id: str, *, user_id: str, at: str) -> BatchView:
        """A batch as it was at a position or a time; raises RequestError, DatabaseUnavailable, LogUnavailable."""
        moment = _moment(at)
        if isinstance(moment, Position):
            moment = self._identity.here(moment)
        batch, _, _ = await self._history.state_at(batch_id, user_id=user_id, at=moment)
        return BatchView.of_log(batch, log_id=self._tail.log_id)

    async def events(self, batch_id: str, *, user_id: str, page: Page) -> EventPage:
        """A batch's facts in log order; raises RequestError(NOT_FOUND), DatabaseUnavailable, LogUnavailable."""
        after, _ = queries.read_cursor(page.cursor, "e")
        found = await self._history.events(batch_id, user_id=user_id, after=after, limit=page.limit + 1)
        shown, more = found[: page.limit], len(found) > page.limit
        return EventPage(
            items=[self._past_event(past) for past in shown],
            next_cursor=queries.cursor_of("e", shown[-1].fact.offset, "-") if more else None,
        )

    def _past_event(self, past: PastFact) -> PastEvent:
        event = EventView.of(past.fact, time=rfc3339(past.time_ms))
        position = Position.of(self._tail.log_id, {past.fact.partition: past.fact.offset})
        return PastEvent(**event.model_dump(), position=str(position), ignored=past.ignored)

    async def batches(self, *, user_id: str, page: Page) -> BatchPage:
        batches, cursor = await queries.batches_of(self._database, user_id=user_id, page=page)
        self._tail.check_whole()
        held = [self._tail.peek(batch.id) for batch in batches]
        gone = {each.id for each in held if each is not None and each.batch is not None and each.batch.deleted}
        views = [BatchView.of_log(batch, log_id=self._tail.log_id) for batch in batches if batch.id not in gone]
        return BatchPage(items=views, next_cursor=cursor)

    async def uploads(self, batch_id: str, *, user_id: str, page: Page) -> UploadPage:
        """Raises RequestError(NOT_FOUND), DatabaseUnavailable."""
        known = None
        if is_id(batch_id) and not self._tail.lacking and not self._tail.ahead(batch_id):
            known = await queries.batch_of(self._database, batch_id, user_id=user_id)
        if known is not None:
            uploads, cursor = await queries.uploads_of(self._database, batch_id, page=page)
            return UploadPage(items=[self.upload_view(upload) for upload in uploads], next_cursor=cursor)
        async with self._held(batch_id, user_id) as (_, held):
            uploads, cursor = queries.uploads_among(held, page=page)
            return UploadPage(items=[self.upload_view(upload) for upload in uploads], next_cursor=cursor)

    async def upload(self, upload_id: str, *, user_id: str) -> Upload:
        """An upload as it is now, a copy; raises RequestError(NOT_FOUND), DatabaseUnavailable."""
        if not is_id(upload_id):
            raise not_found("upload")
        found = await self._upload(upload_id, user_id)
        if found is None:
            await read_to_end(self._tail, self._settings)
            found = await self._upload(upload_id, user_id)
        if found is None:
            raise not_found("upload")
        return found

    def upload_view(self, upload: Upload) -> UploadView:
        return UploadView.of_log(upload, log_id=self._tail.log_id, partition=partition_of(upload.batch_id))

    async def _upload(self, upload_id: str, user_id: str) -> Upload | None:
        batch_id = self._tail.batch_of(upload_id)
        if batch_id is None:
            self._tail.check_whole()
            before = self._tail.projected()
            found = await queries.upload_of(self._database, upload_id, user_id=user_id)
            if found is None:
                return None
            if not self._tail.ahead(found.batch_id):
                # Only what is asked for after that is surely as new as what was read here.
                unmoved = before == self._tail.projected()
                return found if unmoved else await queries.upload_of(self._database, upload_id, user_id=user_id)
            batch_id = found.batch_id
        async with self._tail.hold(batch_id) as held:
            if held is None or not _visible(held.batch, user_id):
                return None
            upload = held.uploads.get(upload_id)
            return None if upload is None else dataclasses.replace(upload)

    @contextlib.asynccontextmanager
    async def _held(self, batch_id: str, user_id: str) -> AsyncIterator[tuple[Batch, dict[str, Upload]]]:
        if not is_id(batch_id):
            raise not_found("batch")
        async with self._tail.hold(batch_id) as held:
            if held is None:
                await read_to_end(self._tail, self._settings)
            async with self._tail.hold(batch_id) as now:
                yield _seen(now, user_id)


async def read_to_end(tail: Tail, settings: Settings) -> None:
    """What is known nowhere yet may just have been handed out by another replica: first read what there is.

    Raises RequestError(LOG_UNAVAILABLE) where that cannot be done now, since nobody may be told "not found" then.
    """
    if not await tail.reached_end(settings.tail_lag_max_s):
        raise RequestError(
            Code.LOG_UNAVAILABLE, "it is not known here, and the log cannot be read to its end just now; ask again"
        )


def _moment(at: str) -> Position | int:
    """A position, or a time in milliseconds; raises RequestError."""
    try:
        return Position.parse(at)
    except InvalidPositionError:
        time_ms = read_rfc3339(at)
    if time_ms is None:
        raise RequestError(
            Code.INVALID_POSITION,
            f"at={at[:80]!r} is neither a position, such as 1f3a9c02.0-1234, nor a time, such as 2026-01-31T12:00:00Z",
        )
    return time_ms


def _seen(held: Held | None, user_id: str) -> tuple[Batch, dict[str, Upload]]:
    if held is None or held.batch is None or not _visible(held.batch, user_id):
        raise not_found("batch")
    return held.batch, held.uploads


def _visible(batch: Batch | None, user_id: str) -> bool:
    return batch is not None and not batch.deleted and batch.user_id == user_id
