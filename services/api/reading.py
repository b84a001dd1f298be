"""Answering from the read models, and from the tail where it knows more.

A thing that was made a moment ago, on this api or another, is found even while nothing is projected: what the read
models do not have is looked for in the tail once that has read to the log's end.
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator

from schemas.batch import Batch, Upload
from schemas.errors import Code, RequestError
from schemas.ids import is_id, partition_of
from schemas.position import InvalidPositionError, Position
from schemas.views import BatchPage, BatchView, UploadPage, UploadView
from services.api import queries
from services.api.decisions import not_found
from services.api.queries import Page
from services.database import Database
from services.settings import Settings
from services.tail import Held, Tail


class Reading:
    """Reads for the api; see the module's text. All of it is as the user may see it; the rest is not found."""

    def __init__(self, *, tail: Tail, database: Database, settings: Settings) -> None:
        self._tail = tail
        self._database = database
        self._settings = settings

    async def wait_for(self, min_position: str | None) -> None:
        """Wait until the read models include this position; raises RequestError."""
        if min_position is None:
            return
        try:
            position = Position.parse(min_position)
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
        if is_id(batch_id) and not self._tail.ahead(batch_id):
            found = await queries.batch_of(self._database, batch_id, user_id=user_id)
            if found is not None:
                return BatchView.of_log(found, log_id=self._tail.log_id)
        async with self._held(batch_id, user_id) as (batch, _):
            return BatchView.of_log(batch, log_id=self._tail.log_id)

    async def batches(self, *, user_id: str, page: Page) -> BatchPage:
        batches, cursor = await queries.batches_of(self._database, user_id=user_id, page=page)
        views = [BatchView.of_log(batch, log_id=self._tail.log_id) for batch in batches]
        return BatchPage(items=views, next_cursor=cursor)

    async def uploads(self, batch_id: str, *, user_id: str, page: Page) -> UploadPage:
        """Raises RequestError(NOT_FOUND), DatabaseUnavailable."""
        known = None
        if is_id(batch_id) and not self._tail.ahead(batch_id):
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
        if found is None and await self._tail.reached_end(self._settings.tail_lag_max_s):
            found = await self._upload(upload_id, user_id)
        if found is None:
            raise not_found("upload")
        return found

    def upload_view(self, upload: Upload) -> UploadView:
        return UploadView.of_log(upload, log_id=self._tail.log_id, partition=partition_of(upload.batch_id))

    async def oldest_unfinished_ms(self) -> int | None:
        return await queries.oldest_unfinished_ms(self._database)

    async def _upload(self, upload_id: str, user_id: str) -> Upload | None:
        batch_id = self._tail.batch_of(upload_id)
        if batch_id is None:
            found = await queries.upload_of(self._database, upload_id, user_id=user_id)
            if found is None or not self._tail.ahead(found.batch_id):
                return found
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
                await self._tail.reached_end(self._settings.tail_lag_max_s)
            async with self._tail.hold(batch_id) as now:
                yield _seen(now, user_id)


def _seen(held: Held | None, user_id: str) -> tuple[Batch, dict[str, Upload]]:
    if held is None or held.batch is None or not _visible(held.batch, user_id):
        raise not_found("batch")
    return held.batch, held.uploads


def _visible(batch: Batch | None, user_id: str) -> bool:
    return batch is not None and not batch.deleted and batch.user_id == user_id
