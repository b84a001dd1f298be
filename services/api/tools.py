"""The tools that assistants are offered over MCP: what each takes, what it gives, and a description to act on.

A tool is a few calls of the REST API in its caller's name, so that rights, limits, states and codes are those of REST
and written once; only waiting listens to the tail. A description says when to use the tool and what to do next, since
an assistant reads nothing else. How a call gets here: `mcp.py`.
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import Code, RequestError
from schemas.views import BatchPage, BatchStatus, BatchView, EventPage, UploadPage, UploadStatus, UploadView, View
from services.folding import Folded
from services.tail import Tail

WAIT_S, WAIT_MAX_S = 50.0, 300.0  # assistants commonly give a call a minute
BATCHES_LOOKED_AT_MAX = 200
FAILED_SHOWN_MAX = 100

Report = Callable[[BatchView], Awaitable[None]]


class Rest(Protocol):
    """The REST API, as the user of this call: a path and its query in, the JSON answer out; raises RequestError."""

    async def get(self, path: str, **query: Any) -> Any: ...

    async def post(self, path: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Call:
    """What a tool works with. `report`: tells the caller how far a batch is; `leaving`: done when the api stops."""

    rest: Rest
    tail: Tail
    report: Report
    leaving: asyncio.Future[None]


class Arguments(BaseModel):
    """What a tool takes; a name it does not know is refused, so that a slip is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Tool:
    """`changes`: it writes; `ends_work`: what it does cannot be taken back."""

    name: str
    title: str
    description: str
    takes: type[Arguments]
    gives: type[View]
    run: Callable[[Call, Any], Awaitable[View]]
    changes: bool
    ends_work: bool
    repeatable: bool


TOOLS: dict[str, Tool] = {}
"""Every tool by its name, in the order they are shown."""

_Taken = TypeVar("_Taken", bound=Arguments)
_Given = TypeVar("_Given", bound=View)
_Run = Callable[[Call, _Taken], Awaitable[_Given]]

BatchId = Annotated[str, Field(description="the batch's id, a UUID as `list_batches` shows it")]
UploadId = Annotated[str, Field(description="the upload's id, a UUID as `list_uploads` shows it")]
Limit = Annotated[int, Field(ge=1, le=200, description="how many at most")]
Cursor = Annotated[str | None, Field(description="`next_cursor` of the page before; leave it out for the first page")]


def _tool(
    title: str, *, changes: bool = False, ends_work: bool = False, repeatable: bool = False
) -> Callable[[_Run[_Taken, _Given]], _Run[_Taken, _Given]]:
    """Offer a function as a tool: its name, its docstring and its types say what it is."""

    def offer(run: _Run[_Taken, _Given]) -> _Run[_Taken, _Given]:
        name: str = getattr(run, "__name__", "")
        hints = get_type_hints(run)
        TOOLS[name] = Tool(
            name=name,
            title=title,
            description=inspect.cleandoc(run.__doc__ or ""),
            takes=hints["wanted"],
            gives=hints["return"],
            run=run,
            changes=changes,
            ends_work=ends_work,
            repeatable=repeatable,
        )
        return run

    return offer


class ListBatches(Arguments):
    status: Annotated[BatchStatus | None, Field(description="only batches of this status")] = None
    limit: Limit = 20
    cursor: Cursor = None


@_tool("Batches")
async def list_batches(call: Call, wanted: ListBatches) -> BatchPage:
    """List the user's batches, newest first, each with its status, its counts of files and its progress (0 to 1).

    Use it to find a batch's id. A batch is `pending` until work on it begins, then `processing`, and ends as
    `completed` (at least one file succeeded; look at `failed_uploads` all the same), `failed` (none did) or
    `cancelled`. Where `next_cursor` is not null, call again with it for older ones.
    """
    query = wanted.model_dump(exclude_none=True)
    return BatchPage.model_validate(await call.rest.get("/v1/batches", **query))


class OneBatch(Arguments):
    batch_id: BatchId


class BatchThen(OneBatch):
    at: Annotated[
        str | None,
        Field(description="a `position` or a time such as 2026-01-31T12:00:00Z, to see the batch as it was then"),
    ] = None


@_tool("One batch")
async def get_batch(call: Call, wanted: BatchThen) -> BatchView:
    """Get one batch as it is now, or with `at` as it was then: status, counts, progress, error message, times.

    `sealed` false means that more files may come and that the batch cannot end yet. Next: `list_uploads` for its
    files, `failed_uploads` for what went wrong, `wait_for_batch` while it is `processing`.
    """
    return BatchView.model_validate(await call.rest.get(_batch(wanted.batch_id), at=wanted.at))


class ListUploads(OneBatch):
    status: Annotated[UploadStatus | None, Field(description="only uploads of this status")] = None
    limit: Limit = 20
    cursor: Cursor = None


@_tool("Files of a batch")
async def list_uploads(call: Call, wanted: ListUploads) -> UploadPage:
    """List a batch's uploads (its files) in the order they were queued: name, size, status, attempts, error, result.

    `result` of a completed picture or video holds format, width, height, when it was taken, EXIF and hashes. Where
    `next_cursor` is not null, call again with it for the rest. For failures alone `failed_uploads` is shorter.
    """
    query = wanted.model_dump(exclude={"batch_id"}, exclude_none=True)
    return UploadPage.model_validate(await call.rest.get(f"{_batch(wanted.batch_id)}/uploads", **query))


class OneUpload(Arguments):
    upload_id: UploadId


@_tool("One file")
async def get_upload(call: Call, wanted: OneUpload) -> UploadView:
    """Get one upload (a file of a batch) as it is now: status, attempts, `error` if it failed, `result` if it is done.

    The bytes themselves are not given here; over HTTP they are at /v1/uploads/ID/content and /thumbnail.
    """
    return UploadView.model_validate(await call.rest.get(f"/v1/uploads/{quote(wanted.upload_id, safe='')}"))


class WhoseFailures(Arguments):
    batch_id: Annotated[str | None, Field(description="only this batch; left out: the user's newest batches")] = None


class FailedUploads(View):
    """`batches`: how many were looked at; `truncated`: there are more failures than are shown."""

    items: list[UploadView]
    batches: int
    truncated: bool


@_tool("What failed")
async def failed_uploads(call: Call, wanted: WhoseFailures) -> FailedUploads:
    """List the uploads that failed for good, each with `error.code` and `error.message`: of one batch, or of the 200
    newest.

    What helps depends on the code. `retry_failed` may help with worker_crashed, work_timeout and internal_error. It
    does not help with corrupt_media (a good copy must be sent), media_too_complex and out_of_memory (send a smaller
    file), nor with blob_missing (send the file again in a new batch): tell the user so.
    """
    if wanted.batch_id is not None:
        batches = [BatchView.model_validate(await call.rest.get(_batch(wanted.batch_id)))]
    else:
        batches = BatchPage.model_validate(await call.rest.get("/v1/batches", limit=BATCHES_LOOKED_AT_MAX)).items
    found: list[UploadView] = []
    truncated = False
    for batch in batches:
        if batch.failed_uploads and not truncated:
            path = f"{_batch(batch.id)}/uploads"
            left = FAILED_SHOWN_MAX - len(found)
            page = UploadPage.model_validate(await call.rest.get(path, status="failed", limit=max(1, left)))
            found += page.items[:left]
            truncated = page.next_cursor is not None or len(page.items) > left
    return FailedUploads(items=found, batches=len(batches), truncated=truncated)


class History(OneBatch):
    limit: Limit = 50
    cursor: Cursor = None


@_tool("History of a batch")
async def batch_history(call: Call, wanted: History) -> EventPage:
    """List everything that happened to a batch, oldest first: each fact with its time, position, type and data.

    Use it to explain how a batch came to be as it is: who sealed it, which attempts failed and why. `ignored` null
    means the fact took effect; otherwise it names why it changed nothing. Any `position` can be given to `get_batch`
    as `at`. Where `next_cursor` is not null, call again with it for what came later.
    """
    query = wanted.model_dump(exclude={"batch_id"}, exclude_none=True)
    return EventPage.model_validate(await call.rest.get(f"{_batch(wanted.batch_id)}/events", **query))


class Wait(OneBatch):
    timeout_s: Annotated[float, Field(ge=0, le=WAIT_MAX_S, description="the longest wait, in seconds")] = WAIT_S


class Waited(View):
    """The batch when the wait was over; `ended`: whether it came to its end; `next_step`: what to do now."""

    ended: bool
    next_step: str
    batch: BatchView


@_tool("Wait for a batch")
async def wait_for_batch(call: Call, wanted: Wait) -> Waited:
    """Wait until a batch has ended (completed, failed or cancelled), for `timeout_s` at most, and get it as it is then.

    `ended` false means that the time was up first: the work goes on, so call again, or do something else meanwhile.
    A batch that is not `sealed` waits for more files and may never end. Progress is told while waiting.
    """
    batch = BatchView.model_validate(await call.rest.get(_batch(wanted.batch_id)))
    if not _ended(batch):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wanted.timeout_s), contextlib.aclosing(_as_it_changes(call, batch.id)) as states:
                async for batch in states:
                    await call.report(batch)
                    if _ended(batch) or call.leaving.done():
                        break
    return Waited(ended=_ended(batch), next_step=_next_step(batch), batch=batch)


class Retry(OneBatch):
    upload_id: Annotated[str | None, Field(description="only this failed upload; left out: all of the batch's")] = None


@_tool("Try failed files again", changes=True)
async def retry_failed(call: Call, wanted: Retry) -> BatchView:
    """Queue a batch's failed uploads again (or just one of them); the batch is `processing` again until they are done.

    Each gets two more attempts. A cancelled batch cannot be retried (batch_ended), a file that did not fail neither
    (not_failed). Look at `failed_uploads` first: for damaged files it is of no use. Next: `wait_for_batch`.
    """
    if wanted.upload_id is None:
        return BatchView.model_validate(await call.rest.post(f"{_batch(wanted.batch_id)}/retry"))
    upload = UploadView.model_validate(await call.rest.get(f"/v1/uploads/{quote(wanted.upload_id, safe='')}"))
    if upload.batch_id != wanted.batch_id:
        raise RequestError(Code.NOT_FOUND, f"upload {upload.id} is of batch {upload.batch_id}; name that one")
    await call.rest.post(f"/v1/uploads/{upload.id}/retry")
    return BatchView.model_validate(await call.rest.get(_batch(wanted.batch_id)))


@_tool("Cancel a batch", changes=True, ends_work=True, repeatable=True)
async def cancel_batch(call: Call, wanted: OneBatch) -> BatchView:
    """Stop the work on a batch for good: what is queued or in work becomes cancelled, what is done stays done.

    It cannot be taken back, and the batch cannot be retried afterwards, so ask the user first. Cancelling twice
    changes nothing; a batch that has completed or failed answers batch_ended.
    """
    return BatchView.model_validate(await call.rest.post(f"{_batch(wanted.batch_id)}/cancel"))


def _batch(batch_id: str) -> str:
    return f"/v1/batches/{quote(batch_id, safe='')}"


def _ended(batch: BatchView) -> bool:
    return batch.status in ("completed", "failed", "cancelled")


def _next_step(batch: BatchView) -> str:
    if not _ended(batch):
        why = "" if batch.sealed else " It takes more files still and cannot end before it is sealed."
        return f"The batch has not ended; call wait_for_batch again.{why}"
    if batch.failed_uploads:
        return f"{batch.failed_uploads} of {batch.total_uploads} files failed; failed_uploads says why."
    return "Nothing more is to be done; list_uploads shows the results."


async def _as_it_changes(call: Call, batch_id: str) -> AsyncGenerator[BatchView]:
    """The batch now, and again whenever a fact of it was folded; what comes while the caller is busy is joined."""
    changed = asyncio.Event()

    def heard(folded: Folded) -> None:
        if folded.batch is not None and folded.batch.id == batch_id:
            changed.set()

    def left(_leaving: asyncio.Future[None]) -> None:
        changed.set()

    with contextlib.ExitStack() as listening:
        listening.callback(call.tail.listen(heard))
        call.leaving.add_done_callback(left)
        listening.callback(call.leaving.remove_done_callback, left)
        async with call.tail.hold(batch_id) as held:
            while held is not None and held.batch is not None and not held.batch.deleted:
                changed.clear()
                yield BatchView.of_log(held.batch, log_id=call.tail.log_id)
                await changed.wait()
    raise RequestError(Code.NOT_FOUND, "the batch was deleted while you waited")
