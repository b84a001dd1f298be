"""The OpenAPI document: what FastAPI knows of its routes, beside it the raw routes that stream bytes, and for each call
its codes and examples.

Shapes of the raw routes come from the same models their answers are made of; that every route is described, and every
description has its route, is tested. `python -m services.api.openapi` prints it as it is committed in
schemas/generated/openapi.json.
"""

import copy
import sys
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from schemas.errors import MEANINGS, Code
from schemas.generate import text_of
from schemas.requests import CreateBatch
from schemas.views import Added, BatchAdded, BatchView, UploadView
from services.api import samples
from services.api.promises import CODES
from services.api.reading import MIN_POSITION

_SCHEMAS = "#/components/schemas/"
_WITHOUT_TOKEN = frozenset({"/v1/config", "/livez", "/readyz", "/metrics"})
_CONDITIONAL = frozenset({"BatchView", "BatchPage", "UploadView", "UploadPage", "EventPage"})
_DESCRIPTION = """Upload pictures and videos in batches, and follow what becomes of each.

Send a token with every call: `Authorization: Bearer …`. Its scopes (`scope`, or the list `scopes`) are `read` for GET
and `write` for the rest; without any it has both. `RateLimit` tells how many requests are left to you.

A 2xx to a write says that it is in the log and took effect; its header `Sluice-Position` names where, and
`?min_position=` on a GET waits for it. What goes wrong is answered as `application/problem+json` with a `code` that
never changes its meaning."""
_TAGS = {
    "Batches": "A batch is a set of files of one user; it ends when all of them did.",
    "Uploads": "An upload is one file of a batch and what became of it.",
    "Service": "How Sluice is, and what it takes.",
}
_PARAMETER_EXAMPLES: dict[str, Any] = {
    "batch_id": samples.BATCH_ID,
    "upload_id": samples.UPLOAD_ID,
    "filename": "geysir.jpg",
    "limit": 50,
    "at": "2026-01-31T12:00:00Z",
    "min_position": samples.POSITION,
    "Idempotency-Key": samples.KEY,
}
_HEADERS: dict[str, dict[str, Any]] = {
    "Sluice-Position": {"description": "where in the log this stands", "schema": {"type": "string"}},
    "Location": {"description": "where the new thing is", "schema": {"type": "string"}},
    "ETag": {"description": "of just this answer, for If-None-Match", "schema": {"type": "string"}},
    "Retry-After": {"description": "seconds after which asking again makes sense", "schema": {"type": "string"}},
    "RateLimit": {"description": "what is left of your allowance", "schema": {"type": "string"}},
    "RateLimit-Policy": {"description": "your allowance", "schema": {"type": "string"}},
}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document, made once."""
    made: dict[str, Any] | None = getattr(app.state, "document", None)
    if made is None:
        made = app.state.document = _make(copy.deepcopy(app.openapi()))
    return made


def _make(found: dict[str, Any]) -> dict[str, Any]:
    found["info"] |= {"description": _DESCRIPTION, "license": {"name": "MIT", "identifier": "MIT"}}
    found["servers"] = [{"url": "/"}]
    found["security"] = [{"token": []}]
    found["tags"] = [{"name": name, "description": says} for name, says in _TAGS.items()]
    components = found.setdefault("components", {})
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    components["headers"] = copy.deepcopy(_HEADERS)
    components["examples"] = {str(code): {"value": samples.problem_of(code)} for code in Code}
    components.setdefault("schemas", {}).update(_raw_schemas())
    for generated in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(generated, None)
    for path, calls in _raw_paths().items():
        found["paths"].setdefault(path, {}).update(calls)
    for path, calls in found["paths"].items():
        for method, call in calls.items():
            _complete(call, method, path)
    return found


def _complete(call: dict[str, Any], method: str, path: str) -> None:
    """Add what every call has: examples, headers, what is answered when nothing changed or something went wrong."""
    if path.endswith("/retry"):
        call["parameters"].append(_key())
    responses = call["responses"]
    responses.pop("422", None)
    for status, response in list(responses.items()):
        _complete_response(response, status, method)
        if status == "200" and _CONDITIONAL & _names_of(response):
            response["headers"]["ETag"] = {"$ref": "#/components/headers/ETag"}
            call.setdefault("parameters", []).append(_in_header("If-None-Match", "an ETag; 304 if nothing changed"))
            responses["304"] = {"description": "Nothing changed since that ETag"}
    for parameter in call.get("parameters", ()):
        _complete_parameter(parameter)
    codes = CODES[method, path] | {Code.INTERNAL_ERROR}
    for status in sorted({str(MEANINGS[code].status) for code in codes}):
        responses[status] = _problem([code for code in Code if code in codes and MEANINGS[code].status == int(status)])
    if path in _WITHOUT_TOKEN:
        call["security"] = []
    else:
        for response in responses.values():
            for name in ("RateLimit", "RateLimit-Policy"):
                response.setdefault("headers", {})[name] = {"$ref": f"#/components/headers/{name}"}


def _complete_parameter(parameter: dict[str, Any]) -> None:
    parameter["schema"] = _without_null(parameter["schema"])
    if parameter["name"] in _PARAMETER_EXAMPLES:
        parameter["example"] = _PARAMETER_EXAMPLES[parameter["name"]]


def _complete_response(response: dict[str, Any], status: str, method: str) -> None:
    if response["description"] == "Successful Response":
        response["description"] = {"202": "Done: as it is now", "204": "Done"}.get(status, "As it is now")
    headers = response.setdefault("headers", {})
    if method != "get":
        headers["Sluice-Position"] = {"$ref": "#/components/headers/Sluice-Position"}
    if status == "201" or "BatchAdded" in _names_of(response):
        headers["Location"] = {"$ref": "#/components/headers/Location"}
    for name in _names_of(response) & set(samples.OF_SCHEMA):
        response["content"]["application/json"]["example"] = samples.OF_SCHEMA[name]


def _names_of(response: dict[str, Any]) -> set[str]:
    """The names of the shapes a response has."""
    bodies = response.get("content", {}).values()
    return {str(body.get("schema", {}).get("$ref", "")).removeprefix(_SCHEMAS) for body in bodies}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a parameter that may be left out: null is what nobody can send there."""
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "title", "description")}
    return {**rest, **kinds[0]} if len(kinds) == 1 else rest


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
            "rejected": {
                "type": "array",
                "items": {"$ref": f"{_SCHEMAS}Rejected"},
                "description": "the files that were refused, where all of a request's were",
            },
        },
    }
    health = {
        "title": "Health",
        "type": "object",
        "required": ["status"],
        "properties": {
            "status": {"type": "string", "enum": ["ok", "failing"]},
            "problems": {"type": "array", "items": {"type": "string"}, "description": "why, in sentences"},
        },
    }
    return {**models["$defs"], "Problem": problem, "Health": health}


def _raw_paths() -> dict[str, Any]:
    batch_id, upload_id = _in_path("batch_id"), _in_path("upload_id")
    filename, digest = _in_path("filename"), _in_header("Repr-Digest", "`sha-256=:BASE64:`, checked if given")
    form_of_batch = _form({"name": {"type": "string", "maxLength": 200}})
    new_batch = {"schema": _ref("CreateBatch"), "example": samples.NEW_BATCH}
    octets = {"schema": {"type": "string", "format": "binary"}}
    return {
        "/v1/batches": {
            "post": _call(
                "create_batch",
                "Make a batch: open from JSON, or sealed and with its files from a form",
                "Batches",
                parameters=[_key()],
                takes={"application/json": new_batch, "multipart/form-data": form_of_batch},
                gives={"201": ("An open batch", "BatchView"), "202": ("A sealed batch of files", "BatchAdded")},
            )
        },
        "/v1/batches/{batch_id}/uploads": {
            "post": _call(
                "add_uploads",
                "Add files to an open batch; bad ones are rejected, the good ones go on",
                "Uploads",
                parameters=[batch_id, _key()],
                takes={"multipart/form-data": _form({})},
                gives={"202": ("What was taken and what was not", "Added")},
            )
        },
        "/v1/batches/{batch_id}/uploads/{filename}": {
            "put": _call(
                "put_upload",
                "Add one file under its name; the same bytes again change nothing",
                "Uploads",
                parameters=[copy.deepcopy(batch_id), filename, digest],
                takes={"application/octet-stream": octets},
                gives={"202": ("The upload", "UploadView")},
            )
        },
        "/v1/uploads/{upload_id}/content": {
            "get": _bytes("get_content", "The file as it came", "*/*", upload_id),
        },
        "/v1/uploads/{upload_id}/thumbnail": {
            "get": _bytes("get_thumbnail", "A JPEG of at most 256 pixels a side", "image/jpeg", upload_id),
        },
        "/livez": {"get": _health("get_live", "Whether the process runs", ["200"])},
        "/readyz": {"get": _health("get_ready", "Whether it can do all it should, and why not", ["200", "503"])},
        "/metrics": {"get": _metrics()},
    }


def _call(
    name: str,
    summary: str,
    tag: str,
    *,
    parameters: list[dict[str, Any]],
    takes: dict[str, Any],
    gives: dict[str, tuple[str, str]],
) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "tags": [tag],
        "parameters": parameters,
        "requestBody": {"content": takes, "required": "application/json" not in takes},
        "responses": {
            status: {"description": says, "content": {"application/json": {"schema": _ref(shape)}}}
            for status, (says, shape) in gives.items()
        },
    }


def _bytes(name: str, summary: str, kind: str, upload_id: dict[str, Any]) -> dict[str, Any]:
    body = {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["Uploads"],
        "parameters": [
            copy.deepcopy(upload_id),
            _optional("min_position", MIN_POSITION, within="query"),
            _in_header("Range", "one range of bytes"),
            _in_header("If-Range", "an ETag: the range only if that is still so"),
            _in_header("If-None-Match", "an ETag; 304 if nothing changed"),
        ],
        "responses": {
            "200": {"description": "The bytes", **body},
            "206": {"description": "The range", **copy.deepcopy(body)},
            "304": {"description": "Nothing changed since that ETag"},
        },
    }


def _health(name: str, summary: str, statuses: list[str]) -> dict[str, Any]:
    says = {"200": "It is so", "503": "It is not so"}
    body = {"content": {"application/json": {"schema": _ref("Health")}}}
    responses = {status: {"description": says[status], **copy.deepcopy(body)} for status in statuses}
    return {"operationId": name, "summary": summary, "tags": ["Service"], "responses": responses}


def _metrics() -> dict[str, Any]:
    return {
        "operationId": "get_metrics",
        "summary": "Metrics for Prometheus",
        "tags": ["Service"],
        "responses": {"200": {"description": "As text", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    }


def _form(fields: dict[str, Any]) -> dict[str, Any]:
    files = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    return {"schema": {"type": "object", "required": ["files"], "properties": {"files": files, **fields}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"{_SCHEMAS}{name}"}


def _key() -> dict[str, Any]:
    key = _in_header("Idempotency-Key", "the same key and body again change nothing")
    key["schema"] |= {"minLength": 1, "maxLength": 255}
    return key


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_header(name: str, says: str) -> dict[str, Any]:
    return _optional(name, says, within="header")


def _optional(name: str, says: str, *, within: str) -> dict[str, Any]:
    return {"name": name, "in": within, "required": False, "schema": {"type": "string"}, "description": says}


def _problem(codes: list[Code]) -> dict[str, Any]:
    """The response of one status: its codes, with an example of each."""
    again = any(MEANINGS[code].retry_after_s is not None for code in codes)
    return {
        "description": "; ".join(f"`{code}`: {MEANINGS[code].title}" for code in codes),
        "headers": {"Retry-After": {"$ref": "#/components/headers/Retry-After"}} if again else {},
        "content": {
            "application/problem+json": {
                "schema": _ref("Problem"),
                "examples": {str(code): {"$ref": f"#/components/examples/{code}"} for code in codes},
            }
        },
    }


def main() -> None:
    """Print the document."""
    from services.api.app import described_app  # noqa: PLC0415  # the app's routes serve what is made here

    sys.stdout.write(text_of(document(described_app())))


if __name__ == "__main__":
    main()
