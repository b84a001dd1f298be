"""The OpenAPI document: what FastAPI knows of its routes, and beside it the raw routes that stream bytes.

Shapes of the raw routes come from the same models their answers are made of; that every route is described, and every
description has its route, is tested.
"""

import copy
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from schemas.errors import Code
from schemas.requests import CreateBatch
from schemas.views import Added, BatchAdded, BatchView, UploadView

_SCHEMAS = "#/components/schemas/"
_WITHOUT_TOKEN = frozenset({"/v1/config", "/livez", "/readyz", "/metrics"})
_DESCRIPTION = """Upload pictures and videos in batches, and follow what becomes of each.

Send a token with every call: `Authorization: Bearer …`. A 2xx to a write says that it is in the log and took effect;
its header `Sluice-Position` names where, and `?min_position=` on a GET waits for it. What goes wrong is answered as
`application/problem+json` with a `code` that never changes its meaning."""


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document, made once."""
    made: dict[str, Any] | None = getattr(app.state, "document", None)
    if made is None:
        made = app.state.document = _make(copy.deepcopy(app.openapi()))
    return made


def _make(found: dict[str, Any]) -> dict[str, Any]:
    found["info"]["description"] = _DESCRIPTION
    found["security"] = [{"token": []}]
    components = found.setdefault("components", {})
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    components.setdefault("schemas", {}).update(_raw_schemas())
    for generated in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(generated, None)
    for path, calls in _raw_paths().items():
        found["paths"].setdefault(path, {}).update(calls)
    for path, calls in found["paths"].items():
        for call in calls.values():
            call["responses"].pop("422", None)
            call["responses"]["default"] = _problem()
            if path in _WITHOUT_TOKEN:
                call["security"] = []
    return found


def _raw_schemas() -> dict[str, Any]:
    _, models = models_json_schema(
        [(model, "serialization") for model in (BatchView, UploadView, Added, BatchAdded)]
        + [(CreateBatch, "validation")],
        ref_template=f"{_SCHEMAS}{{model}}",
    )
    problem = {
        "title": "Problem",
        "description": "Problem details (RFC 9457).",
        "type": "object",
        "required": ["type", "title", "status", "detail", "code"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string", "description": "what is wrong, with which value, and what to do"},
            "code": {"type": "string", "enum": [str(code) for code in Code]},
        },
    }
    return {**models["$defs"], "Problem": problem}


def _raw_paths() -> dict[str, Any]:
    batch_id, upload_id = _in_path("batch_id"), _in_path("upload_id")
    filename, digest = _in_path("filename"), _in_header("Repr-Digest", "`sha-256=:BASE64:`, checked if given")
    key = _in_header("Idempotency-Key", "the same key and body again change nothing")
    form_of_batch = _form({"name": {"type": "string", "maxLength": 200}})
    return {
        "/v1/batches": {
            "post": _call(
                "Make a batch: open from JSON, or sealed and with its files from a form",
                "Batches",
                parameters=[key],
                takes={"application/json": _ref("CreateBatch"), "multipart/form-data": form_of_batch},
                gives={"201": ("An open batch", "BatchView"), "202": ("A sealed batch of files", "BatchAdded")},
            )
        },
        "/v1/batches/{batch_id}/uploads": {
            "post": _call(
                "Add files to an open batch; bad ones are rejected, the good ones go on",
                "Uploads",
                parameters=[batch_id, key],
                takes={"multipart/form-data": _form({})},
                gives={"202": ("What was taken and what was not", "Added")},
            )
        },
        "/v1/batches/{batch_id}/uploads/{filename}": {
            "put": _call(
                "Add one file under its name; the same bytes again change nothing",
                "Uploads",
                parameters=[batch_id, filename, digest],
                takes={"application/octet-stream": {"type": "string", "format": "binary"}},
                gives={"202": ("The upload", "UploadView")},
            )
        },
        "/v1/uploads/{upload_id}/content": {"get": _bytes("The file as it came", [upload_id])},
        "/v1/uploads/{upload_id}/thumbnail": {"get": _bytes("A JPEG of at most 256 pixels a side", [upload_id])},
        "/livez": {"get": _plain("Whether the process runs")},
        "/readyz": {"get": _plain("Whether it can do all it should, and why not")},
        "/metrics": {"get": _plain("Metrics for Prometheus")},
    }


def _call(
    summary: str,
    tag: str,
    *,
    parameters: list[dict[str, Any]],
    takes: dict[str, Any],
    gives: dict[str, tuple[str, str]],
) -> dict[str, Any]:
    return {
        "summary": summary,
        "tags": [tag],
        "parameters": parameters,
        "requestBody": {"content": {kind: {"schema": schema} for kind, schema in takes.items()}},
        "responses": {
            status: {"description": says, "content": {"application/json": {"schema": _ref(name)}}}
            for status, (says, name) in gives.items()
        },
    }


def _bytes(summary: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
    return {
        "summary": summary,
        "tags": ["Uploads"],
        "parameters": [*parameters, _in_header("Range", "one range of bytes")],
        "responses": {"200": {"description": "The bytes", **body}, "206": {"description": "The range", **body}},
    }


def _plain(summary: str) -> dict[str, Any]:
    return {"summary": summary, "tags": ["Service"], "responses": {"200": {"description": "It is so"}}}


def _form(fields: dict[str, Any]) -> dict[str, Any]:
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    return {"type": "object", "required": ["files"], "properties": {"files": files, **fields}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"{_SCHEMAS}{name}"}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_header(name: str, says: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": says}


def _problem() -> dict[str, Any]:
    return {"description": "A problem", "content": {"application/problem+json": {"schema": _ref("Problem")}}}
