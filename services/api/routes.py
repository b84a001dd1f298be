"""The calls that carry no files: reading, and changing a batch or an upload. HTTP only; what they mean is elsewhere.

Lists and details come through `Reading`, changes through `decisions` and `Writing`. The answer to a change is the thing
as it is after the change was folded; where there was nothing to change, as it is.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from schemas.batch import Batch, Ignored, Upload
from schemas.events import LogEvent
from schemas.events import Request as Fingerprint
from schemas.views import BatchPage, BatchStatus, BatchView, EventPage, UploadPage, UploadStatus, UploadView
from services.api import decisions
from services.api.answers import POSITION_HEADER, answer, shown
from services.api.asking import Caller, caller_of, key_of, small_body
from services.api.queries import LIMIT_DEFAULT, LIMIT_MAX, Page
from services.api.reading import MIN_POSITION
from services.api.resources import Resources, resources_of

Decide = Callable[[Batch, Mapping[str, Upload]], list[LogEvent]]


async def _caller(request: Request) -> Caller:
    return await caller_of(request)


async def _resources(request: Request) -> Resources:
    return resources_of(request)


By = Annotated[Caller, Depends(_caller)]
With = Annotated[Resources, Depends(_resources)]
Limit = Annotated[int, Query(ge=1, le=LIMIT_MAX, description="how many at most")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before")]
At = Annotated[
    str | None,
    Query(
        description="as it was then: a position (that fact included), or a time (RFC 3339, that millisecond included)"
    ),
]
MinPosition = Annotated[str | None, Query(description=MIN_POSITION)]

router = APIRouter(prefix="/v1")


@router.get("/batches", response_model=BatchPage, summary="Your batches, newest first", tags=["Batches"])
async def list_batches(
    request: Request,
    by: By,
    resources: With,
    *,
    status: BatchStatus | None = None,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
    min_position: MinPosition = None,
) -> Response:
    await resources.reading.wait_for(min_position)
    return shown(request, await resources.reading.batches(user_id=by.user_id, page=Page(limit, cursor, status)))


@router.get("/batches/{batch_id}", response_model=BatchView, summary="A batch as it is, or was", tags=["Batches"])
async def get_batch(
    request: Request, by: By, resources: With, batch_id: str, *, at: At = None, min_position: MinPosition = None
) -> Response:
    await resources.reading.wait_for(min_position)
    if at is not None:
        return shown(request, await resources.reading.batch_at(batch_id, user_id=by.user_id, at=at))
    return shown(request, await resources.reading.batch(batch_id, user_id=by.user_id))


@router.get(
    "/batches/{batch_id}/events",
    response_model=EventPage,
    summary="What happened to a batch, in the log's order",
    tags=["Batches"],
)
async def list_events(
    request: Request,
    by: By,
    resources: With,
    batch_id: str,
    *,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
    min_position: MinPosition = None,
) -> Response:
    await resources.reading.wait_for(min_position)
    return shown(request, await resources.reading.events(batch_id, user_id=by.user_id, page=Page(limit, cursor, None)))


@router.get(
    "/batches/{batch_id}/uploads",
    response_model=UploadPage,
    summary="A batch's uploads, in the order they were queued",
    tags=["Uploads"],
)
async def list_uploads(
    request: Request,
    by: By,
    resources: With,
    batch_id: str,
    *,
    status: UploadStatus | None = None,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
    min_position: MinPosition = None,
) -> Response:
    await resources.reading.wait_for(min_position)
    page = Page(limit, cursor, status)
    return shown(request, await resources.reading.uploads(batch_id, user_id=by.user_id, page=page))


@router.get("/uploads/{upload_id}", response_model=UploadView, summary="An upload as it is now", tags=["Uploads"])
async def get_upload(
    request: Request, by: By, resources: With, upload_id: str, *, min_position: MinPosition = None
) -> Response:
    await resources.reading.wait_for(min_position)
    upload = await resources.reading.upload(upload_id, user_id=by.user_id)
    return shown(request, resources.reading.upload_view(upload))


@router.post(
    "/batches/{batch_id}/seal",
    status_code=202,
    response_model=BatchView,
    summary="Say that no more files come; repeating it changes nothing",
    tags=["Batches"],
)
async def seal_batch(by: By, resources: With, batch_id: str) -> Response:
    return await _change_batch(resources, by, batch_id, lambda batch, _: decisions.seal(batch, user_id=by.user_id))


@router.post(
    "/batches/{batch_id}/cancel",
    status_code=202,
    response_model=BatchView,
    summary="Stop the work on a batch; repeating it changes nothing",
    tags=["Batches"],
)
async def cancel_batch(by: By, resources: With, batch_id: str) -> Response:
    return await _change_batch(resources, by, batch_id, lambda batch, _: decisions.cancel(batch, user_id=by.user_id))


@router.post(
    "/batches/{batch_id}/retry",
    status_code=202,
    response_model=BatchView,
    summary="Try every failed upload of a batch again",
    tags=["Batches"],
)
async def retry_batch(request: Request, by: By, resources: With, batch_id: str) -> Response:
    fingerprint = await _fingerprint(request, by)
    return await _change_batch(
        resources,
        by,
        batch_id,
        lambda batch, uploads: decisions.retry_batch(batch, uploads.values(), user_id=by.user_id, request=fingerprint),
        passed_over=frozenset({Ignored.NOT_FAILED}),  # somebody else retried it first: it is as was wished
        request=fingerprint,
    )


@router.post(
    "/uploads/{upload_id}/retry",
    status_code=202,
    response_model=UploadView,
    summary="Try a failed upload again",
    tags=["Uploads"],
)
async def retry_upload(request: Request, by: By, resources: With, upload_id: str) -> Response:
    fingerprint = await _fingerprint(request, by)
    resources.writing.check_open()
    known = await resources.reading.upload(upload_id, user_id=by.user_id)
    async with resources.writing.theirs(known.batch_id, by) as (batch, uploads):
        if upload_id not in uploads:
            raise decisions.not_found("upload")
        events = decisions.retry_upload(batch, uploads[upload_id], user_id=by.user_id, request=fingerprint)
        offset = await _append(resources, by, batch, events, request=fingerprint)
        if upload_id not in uploads:
            raise decisions.not_found("upload")
        return answer(
            resources.reading.upload_view(uploads[upload_id]),
            status=202,
            position=resources.writing.position(batch.partition, offset),
        )


@router.delete(
    "/batches/{batch_id}", status_code=204, summary="Remove a batch with its files and its history", tags=["Batches"]
)
async def delete_batch(by: By, resources: With, batch_id: str) -> Response:
    resources.writing.check_open()
    async with resources.writing.theirs(batch_id, by) as (batch, _):
        offset = await _append(resources, by, batch, decisions.delete(batch, user_id=by.user_id))
        position = resources.writing.position(batch.partition, offset)
        return Response(status_code=204, headers={POSITION_HEADER: position})


async def _change_batch(
    resources: Resources,
    by: Caller,
    batch_id: str,
    decide: Decide,
    *,
    passed_over: frozenset[Ignored] = frozenset(),
    request: Fingerprint | None = None,
) -> Response:
    """Append what `decide` says of the batch and answer with the batch as it is then; raises RequestError."""
    resources.writing.check_open()
    async with resources.writing.theirs(batch_id, by) as (batch, uploads):
        offset = await _append(resources, by, batch, decide(batch, uploads), passed_over=passed_over, request=request)
        if batch.deleted:
            raise decisions.not_found("batch")
        return answer(
            BatchView.of_log(batch, log_id=resources.tail.log_id),
            status=202,
            position=resources.writing.position(batch.partition, offset),
        )


async def _append(
    resources: Resources,
    by: Caller,
    batch: Batch,
    events: Sequence[LogEvent],
    *,
    passed_over: frozenset[Ignored] = frozenset(),
    request: Fingerprint | None = None,
) -> int:
    """The offset to answer with: of the newest effective fact of this request, whenever it came, or the batch's."""
    became = await resources.writing.append(events, partition=batch.partition, caller=by)
    if retry := decisions.known_retry(batch, request):  # if not by these facts, by those of the same request
        return retry["last"]
    for each in became:
        if each.ignored is not None and each.ignored not in passed_over:
            raise decisions.refusal(each.ignored, batch)
    return max((each.offset for each in became if each.effective), default=batch.offset)


async def _fingerprint(request: Request, by: Caller) -> Fingerprint | None:
    key = key_of(request, by)
    if key is None:
        return None
    return Fingerprint(key_hash=key.hash, body_hash=hashlib.sha256(await small_body(request)).hexdigest())
