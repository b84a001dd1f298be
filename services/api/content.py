"""Giving bytes back: a file as it came, and its thumbnail. What users sent is never run or rendered as a page.

The type is the one told by content when it came; `nosniff`, a sandbox without any source and a disposition keep
browsers from making more of it.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from schemas.batch import Upload
from schemas.errors import Code, RequestError
from services.api.asking import caller_of
from services.api.ranges import Span, names, unchanged, wanted
from services.api.resources import resources_of
from services.blobs import Blob, BlobStore
from services.serving import problem_answer

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-site",
    "Cache-Control": "private, no-cache",
    "Accept-Ranges": "bytes",
}


async def get_content(request: Request) -> Response:
    """`GET /v1/uploads/{upload_id}/content`: the bytes as they came."""
    resources, upload = resources_of(request), await _upload(request)
    headers = {
        "ETag": f'"{upload.sha256}"',
        "Content-Type": upload.content_type,
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(upload.filename, safe='')}",
    }
    return await _bytes(request, resources.blobs, upload.blob, headers)


async def get_thumbnail(request: Request) -> Response:
    """`GET /v1/uploads/{upload_id}/thumbnail`: a JPEG, once the upload is completed."""
    resources, upload = resources_of(request), await _upload(request)
    if upload.status != "completed" or not (upload.result or {}).get("thumbnail"):
        raise RequestError(Code.NOT_FOUND, f"the upload is {upload.status} and has no thumbnail")
    name = await resources.blobs.thumbnail(upload.id, attempt=upload.attempts)
    headers = {
        "ETag": f'"{name.rpartition("/")[2]}"',
        "Content-Type": "image/jpeg",
        "Content-Disposition": "inline",
    }
    return await _bytes(request, resources.blobs, name, headers)


async def _upload(request: Request) -> Upload:
    """The upload that is asked for; raises RequestError, also where the read models do not reach `min_position`."""
    caller, reading = await caller_of(request), resources_of(request).reading
    await reading.wait_for(request.query_params.get("min_position"))
    return await reading.upload(request.path_params["upload_id"], user_id=caller.user_id)


async def _bytes(request: Request, blobs: BlobStore, name: str, headers: dict[str, str]) -> Response:
    headers = {**_SAFE_HEADERS, **headers}
    etag = headers["ETag"]
    if names(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    async with AsyncExitStack() as stack:
        blob = await stack.enter_async_context(blobs.reading(name))
        asked = request.headers.get("range") if unchanged(request.headers.get("if-range"), etag) else None
        span = wanted(asked, size_bytes=blob.size_bytes)
        if span is None:
            return _outside(blob, etag)
        headers["Content-Length"] = str(span.stop - span.start)
        if span.partial:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{blob.size_bytes}"
        if request.method == "HEAD":
            return Response(status_code=206 if span.partial else 200, headers=headers)
        body = _streamed(blob, span, stack.pop_all())
        return StreamingResponse(body, status_code=206 if span.partial else 200, headers=headers)


def _outside(blob: Blob, etag: str) -> Response:
    detail = f"there are {blob.size_bytes} bytes, and none of them is in the range; ask for another, or for all"
    headers = {**_SAFE_HEADERS, "ETag": etag, "Content-Range": f"bytes */{blob.size_bytes}"}
    return problem_answer(RequestError(Code.RANGE_NOT_SATISFIABLE, detail), headers=headers)


async def _streamed(blob: Blob, span: Span, stack: AsyncExitStack) -> AsyncIterator[bytes]:
    async with stack:
        async for chunk in blob.chunks(span.start, span.stop):
            yield chunk
