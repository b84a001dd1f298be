"""The calls that bring files, on raw routes: bytes first, facts second, the answer when the facts were folded.

The log decides every race (the last place in a batch, a file against the seal, fifty posts under one key); here is
only what follows from it. An id that is derived from the request, or from the batch and a name, makes twice equal once.
"""

import base64
import binascii
import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote_to_bytes

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import Response

from schemas.batch import Batch, Ignored, Upload
from schemas.errors import Code, RequestError
from schemas.events import Limits
from schemas.events import Request as Fingerprint
from schemas.ids import partition_of
from schemas.requests import CreateBatch, safe_filename
from schemas.views import Added, BatchAdded, BatchView, UploadView
from services.api import decisions
from services.api.answers import answer, invalid
from services.api.asking import (
    Caller,
    RequestKey,
    body_of,
    caller_of,
    canonical_json,
    content_length,
    key_of,
    small_body,
)
from services.api.deliveries import Delivery
from services.api.forms import FilePart, Form, FormReader
from services.api.resources import Resources, resources_of
from services.blobs import Intake, Room

_DIGEST = re.compile(r"(?:^|,)[ \t]*sha-256(?![a-z0-9_.*-])[ \t]*(?:=[ \t]*:([A-Za-z0-9+/=]*):)?", re.ASCII)
_SHA256_BYTES = 32
FORM_BYTES_OVER_MAX = 256 * 1024 * 1024
"""So much longer than a batch may be is a form of which parts are refused; beyond that it is refused as a whole."""


async def post_batch(request: Request) -> Response:
    """`POST /v1/batches`: an open batch from JSON, or a sealed one with the files of a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    caller = await caller_of(request)
    key = key_of(request, caller)
    resources_of(request).writing.check_open()
    match kind:
        case "multipart/form-data":
            return await _post_filled_batch(request, caller, key)
        case "application/json" | "":
            return await _post_open_batch(request, caller, key)
        case _:
            raise RequestError(
                Code.INVALID_REQUEST, f"Content-Type is {kind!r:.80}; send application/json or multipart/form-data"
            )


async def _post_open_batch(request: Request, caller: Caller, key: RequestKey | None) -> Response:
    resources = resources_of(request)
    wish = _wish_of_json(await small_body(request))
    body_hash = hashlib.sha256(canonical_json(wish.model_dump(mode="json"))).hexdigest()
    fingerprint = _fingerprint(key, body_hash)
    batch_id = await resources.writing.new_batch_id(key)
    partition = partition_of(batch_id)
    async with resources.tail.hold(batch_id) as known:
        if known is None:
            events = decisions.create_batch(
                wish, batch_id=batch_id, user_id=caller.user_id, limits=resources.limits, request=fingerprint
            )
            await resources.writing.append(events, partition=partition, caller=caller)
        async with resources.writing.theirs(batch_id, caller) as (batch, _):
            decisions.made_by(batch, fingerprint)
            return answer(
                BatchView.of_log(batch, log_id=resources.tail.log_id),
                status=201,
                position=resources.writing.position(partition, batch.created_offset),
                location=f"/v1/batches/{batch_id}",
            )


async def _post_filled_batch(request: Request, caller: Caller, key: RequestKey | None) -> Response:
    resources = resources_of(request)
    batch_id = await resources.writing.new_batch_id(key)
    async with contextlib.AsyncExitStack() as stack:
        known = await stack.enter_async_context(resources.tail.hold(batch_id))
        batch, uploads = (known.batch, known.uploads) if known else (None, {})
        if batch is not None and batch.deleted:
            raise decisions.not_found("batch")
        limits = decisions.limits_of(batch) if batch else resources.limits
        intake = await stack.enter_async_context(Intake(resources.blobs, _room(limits, batch)))
        form = await _read_form(request, intake, batch_id, key, uploads, limits=limits, fields=frozenset({"name"}))
        wish = _wish_of_form(form)
        fingerprint = _fingerprint(key, form.body_hash)
        delivery = Delivery(form.files, intake, limits)
        async with resources.tail.hold(batch_id) as now:  # another request under this key may have been faster
            files = delivery.new_files(now.uploads if now else {})
            if now is None and not files:
                raise delivery.nothing_taken()
            events = decisions.fill_batch(
                now.batch if now else None,
                wish,
                files,
                batch_id=batch_id,
                user_id=caller.user_id,
                limits=limits,
                request=fingerprint,
            )
            await delivery.append(events, writing=resources.writing, caller=caller)
        async with resources.writing.theirs(batch_id, caller) as (batch, uploads):
            accepted, rejected = await delivery.settle(batch, uploads)
            decisions.made_by(batch, fingerprint)
            sealed_at = max((upload.created_offset for upload in accepted), default=batch.created_offset) + 1
            return answer(
                BatchAdded(
                    batch=BatchView.of_log(batch, log_id=resources.tail.log_id),
                    accepted=_views(accepted, batch, resources),
                    rejected=rejected,
                ),
                status=202,
                position=resources.writing.position(batch.partition, sealed_at),
                location=f"/v1/batches/{batch.id}",
            )


async def post_uploads(request: Request) -> Response:
    """`POST /v1/batches/{batch_id}/uploads`: more files for an open batch."""
    resources, caller = resources_of(request), await caller_of(request)
    key = key_of(request, caller)
    resources.writing.check_open()
    async with resources.writing.theirs(request.path_params["batch_id"], caller) as (batch, uploads):
        if key is None or key.hash not in batch.requests:
            decisions.addable(batch)
        limits = decisions.limits_of(batch)
        async with Intake(resources.blobs, _room(limits, batch)) as intake:
            form = await _read_form(request, intake, batch.id, key, uploads, limits=limits, fields=frozenset())
            fingerprint = _fingerprint(key, form.body_hash)
            decisions.same_request(batch, fingerprint)
            delivery = Delivery(form.files, intake, limits)
            files = delivery.addable_files(batch, uploads)
            events = decisions.queue_files(files, batch_id=batch.id, user_id=caller.user_id, request=fingerprint)
            await delivery.append(events, writing=resources.writing, caller=caller)
            accepted, rejected = await delivery.settle(batch, uploads)
            decisions.same_request(batch, fingerprint)
            if batch.deleted:
                raise decisions.not_found("batch")
            newest = max((upload.created_offset for upload in accepted), default=batch.offset)
            return answer(
                Added(accepted=_views(accepted, batch, resources), rejected=rejected),
                status=202,
                position=resources.writing.position(batch.partition, newest),
            )


async def put_upload(request: Request) -> Response:
    """`PUT /v1/batches/{batch_id}/uploads/{filename}`: one file under its name; the same bytes again change nothing."""
    resources, caller = resources_of(request), await caller_of(request)
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError:  # decoded with substitutes, two such names would be one
        raise RequestError(Code.INVALID_REQUEST, "the file's name in the path is not UTF-8; encode it so") from None
    filename = safe_filename(request.path_params["filename"])
    if filename is None:
        raise RequestError(Code.INVALID_REQUEST, "nothing is left of the file's name; give it another")
    digest = _announced_digest(request)
    resources.writing.check_open()
    async with resources.writing.theirs(request.path_params["batch_id"], caller) as (batch, uploads):
        part_id = decisions.named_upload_id(batch.id, filename)
        limits = decisions.limits_of(batch)
        if part_id not in uploads:
            decisions.addable(batch)
            if (content_length(request) or 0) > limits.file_bytes_max:
                raise RequestError(Code.FILE_TOO_LARGE, decisions.refused_file(Code.FILE_TOO_LARGE, limits=limits))
        async with Intake(resources.blobs, _room(limits, batch)) as intake:
            part = await _read_file(request, intake, part_id, filename, known=uploads.get(part_id))
            _check_digest(digest, part)
            delivery = Delivery([part], intake, limits)
            files = delivery.new_files(uploads)
            events = decisions.queue_files(files, batch_id=batch.id, user_id=caller.user_id, request=None)
            await delivery.append(events, writing=resources.writing, caller=caller)
            accepted, rejected = await delivery.settle(batch, uploads)
            for refused in rejected:
                raise RequestError(Code(refused.code), refused.detail)
            if not accepted:  # it was there, and its batch was deleted while the bytes came
                raise decisions.not_found("batch")
            return _named(part, accepted[0], batch, resources)


def _named(part: FilePart, upload: Upload, batch: Batch, resources: Resources) -> Response:
    """The upload of this name, if it has these bytes; raises RequestError."""
    if upload.sha256 != part.incoming.sha256:
        raise decisions.refusal(Ignored.FILENAME_TAKEN, batch, upload)
    return answer(
        UploadView.of_log(upload, log_id=resources.tail.log_id, partition=batch.partition),
        status=202,
        position=resources.writing.position(batch.partition, upload.created_offset),
        location=f"/v1/uploads/{upload.id}",
    )


async def _read_form(
    request: Request,
    intake: Intake,
    batch_id: str,
    key: RequestKey | None,
    uploads: Mapping[str, Upload],
    *,
    limits: Limits,
    fields: frozenset[str],
) -> Form:
    """The form, its files in the intake; raises RequestError where no file came."""
    partition = partition_of(batch_id)
    writing = resources_of(request).writing

    def upload_id_at(place: int) -> str:
        return key.id(place, partition=partition) if key else writing.new_upload_id(partition=partition)

    bytes_max = limits.batch_bytes_max + FORM_BYTES_OVER_MAX
    reader = FormReader(intake, fields, upload_id_at, known=uploads.__contains__, bytes_max=bytes_max)
    form = await reader.read(request)
    if not form.files:
        raise RequestError(Code.INVALID_REQUEST, "no file came; send each as a part named `files`, with a filename")
    return form


async def _read_file(
    request: Request, intake: Intake, upload_id: str, filename: str, *, known: Upload | None
) -> FilePart:
    """The file, read only as far as it may still be taken, or be the one that is `known` under this name."""
    incoming = intake.begin(upload_id, hash_only=known is not None)
    whole = True
    async with contextlib.aclosing(body_of(request)) as chunks:
        async for chunk in chunks:
            await intake.write(incoming, chunk)
            if incoming.problem is not None or (known is not None and incoming.size_bytes > known.size_bytes):
                whole = False
                break
    await intake.end(incoming)
    await intake.flush()
    return FilePart(0, "", filename, filename, upload_id, incoming, whole=whole)


def _views(uploads: Iterable[Upload], batch: Batch, resources: Resources) -> list[UploadView]:
    log_id = resources.tail.log_id
    return [UploadView.of_log(upload, log_id=log_id, partition=batch.partition) for upload in uploads]


def _room(limits: Limits, batch: Batch | None = None) -> Room:
    """What still fits into the batch, as far as is known before the bytes come."""
    files, size_bytes = (batch.total, batch.size_bytes) if batch else (0, 0)
    return Room(limits.file_bytes_max, limits.files_max - files, limits.batch_bytes_max - size_bytes)


def _wish_of_json(body: bytes) -> CreateBatch:
    try:
        return CreateBatch.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _wish_of_form(form: Form) -> CreateBatch:
    try:
        return CreateBatch(name=form.text("name"))
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _fingerprint(key: RequestKey | None, body_hash: str) -> Fingerprint | None:
    return Fingerprint(key_hash=key.hash, body_hash=body_hash) if key else None


def _announced_digest(request: Request) -> str | None:
    """The SHA-256 of `Repr-Digest` (RFC 9530, section 3) in hex; None without one. Other algorithms are passed over."""
    header = ", ".join(request.headers.getlist("repr-digest"))
    if (match := _DIGEST.search(header)) is None:
        return None
    try:
        digest = base64.b64decode(match[1] or "", validate=True)
    except binascii.Error:
        digest = b""
    if len(digest) != _SHA256_BYTES:
        raise RequestError(Code.INVALID_REQUEST, f"Repr-Digest {header!r:.120} is not of the form sha-256=:BASE64:")
    return digest.hex()


def _check_digest(announced: str | None, part: FilePart) -> None:
    if announced is not None and part.whole and announced != part.incoming.sha256:
        raise RequestError(
            Code.DIGEST_MISMATCH,
            f"Repr-Digest announced the SHA-256 {announced}, the bytes that came have {part.incoming.sha256}",
        )
