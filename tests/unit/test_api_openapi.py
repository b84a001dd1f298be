"""The OpenAPI document and the pages: every call that is described is there, and nothing points nowhere."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import jsonschema
import pytest
from fastapi import FastAPI

from schemas.errors import Code
from schemas.generate import GENERATED, text_of
from services.api.app import build_app
from services.api.openapi import document, main
from services.api.pages import home, reference
from services.api.promises import CODES
from services.api.resources import Resources
from services.api.samples import OF_SCHEMA
from services.settings import Settings

OF_THE_CONTRACT = {
    ("post", "/v1/batches"),
    ("get", "/v1/batches"),
    ("get", "/v1/batches/{batch_id}"),
    ("get", "/v1/batches/{batch_id}/events"),
    ("delete", "/v1/batches/{batch_id}"),
    ("post", "/v1/batches/{batch_id}/uploads"),
    ("get", "/v1/batches/{batch_id}/uploads"),
    ("put", "/v1/batches/{batch_id}/uploads/{filename}"),
    ("post", "/v1/batches/{batch_id}/seal"),
    ("post", "/v1/batches/{batch_id}/cancel"),
    ("post", "/v1/batches/{batch_id}/retry"),
    ("get", "/v1/uploads/{upload_id}"),
    ("post", "/v1/uploads/{upload_id}/retry"),
    ("get", "/v1/uploads/{upload_id}/content"),
    ("get", "/v1/uploads/{upload_id}/thumbnail"),
    ("get", "/v1/status"),
    ("get", "/v1/config"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/metrics"),
}
WITHOUT_TOKEN = {"/v1/config", "/livez", "/readyz", "/metrics"}


@pytest.fixture
def app() -> FastAPI:
    """The app without anything behind it: enough for what is answered before a token was seen."""
    settings = Settings(jwt_secret="a secret for tests that is long enough")
    limits = SimpleNamespace(files_max=1, batch_bytes_max=1, file_bytes_max=1)
    health = SimpleNamespace(problems=list)
    return build_app(cast("Resources", SimpleNamespace(settings=settings, limits=limits, health=health)))


def calls(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method, path) for path, methods in found["paths"].items() for method in methods}


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_the_document_describes_the_calls_of_the_contract(app: FastAPI) -> None:
    found = document(app)

    assert calls(found) == OF_THE_CONTRACT
    assert json.loads(json.dumps(found)) == found
    assert document(app) is found


def test_every_reference_in_the_document_leads_somewhere(app: FastAPI) -> None:
    found = document(app)

    named = {tuple(reference.split("/")[-2:]) for reference in references(found)}

    assert {kind for kind, _ in named} == {"schemas", "headers", "examples"}
    assert {name for kind, name in named if name not in found["components"][kind]} == set()
    assert found["components"]["schemas"]["Problem"]["properties"]["code"]["enum"] == list(Code)


def test_the_committed_document_is_what_the_api_says(app: FastAPI) -> None:
    committed = (GENERATED / "openapi.json").read_text(encoding="utf-8")

    assert committed == text_of(document(app)), "run python -m services.api.openapi > schemas/generated/openapi.json"


def test_the_command_prints_the_committed_document(capsys: pytest.CaptureFixture[str]) -> None:
    main()

    assert capsys.readouterr().out == (GENERATED / "openapi.json").read_text(encoding="utf-8")


def test_every_call_says_what_may_come_of_it(app: FastAPI) -> None:
    for path, methods in document(app)["paths"].items():
        for method, call in methods.items():
            statuses = set(call["responses"])
            assert call["operationId"]
            assert call["summary"]
            assert "500" in statuses
            assert statuses & {"200", "201", "202", "204"}, (method, path)
            assert {"401", "403", "429"} <= statuses or path in WITHOUT_TOKEN
            for status, response in call["responses"].items():
                assert response["description"] != "Successful Response"
                assert ("application/problem+json" in response.get("content", {})) == (
                    status >= "400" and (path, status) != ("/readyz", "503")
                )


def test_every_code_is_promised_by_some_call_and_shown_with_an_example(app: FastAPI) -> None:
    promised = set().union(*CODES.values())

    assert set(Code) - promised == {Code.INTERNAL_ERROR, Code.METHOD_NOT_ALLOWED, Code.HEADERS_TOO_LARGE}
    assert set(document(app)["components"]["examples"]) == set(Code)


def test_every_example_is_of_the_shape_it_stands_beside(app: FastAPI) -> None:
    found = document(app)
    schemas = {"$id": "urn:document", "components": found["components"]}
    checked = 0

    for schema, example in examples(found):
        whole = {"$ref": schema["$ref"], **schemas} if "$ref" in schema else schema
        jsonschema.Draft202012Validator(whole).validate(example)
        checked += 1
    for problem in found["components"]["examples"].values():
        whole = {"$ref": "#/components/schemas/Problem", **schemas}
        jsonschema.Draft202012Validator(whole).validate(problem["value"])

    shown = {name for name in found["components"]["schemas"] if name in OF_SCHEMA}
    assert shown == set(OF_SCHEMA)
    assert checked > len(OF_SCHEMA)


def examples(value: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every example with the schema beside it."""
    if isinstance(value, dict):
        if "example" in value and "schema" in value:
            yield value["schema"], value["example"]
        for each in value.values():
            yield from examples(each)
    elif isinstance(value, list):
        for each in value:
            yield from examples(each)


@pytest.mark.parametrize(("method", "path"), sorted(OF_THE_CONTRACT))
async def test_every_described_call_is_there_and_wants_a_token_as_described(
    app: FastAPI, method: str, path: str
) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://sluice") as stranger:
        answer = await stranger.request(method, path.replace("{", "").replace("}", ""))

    assert answer.status_code == (200 if path in WITHOUT_TOKEN else 401)
    described = document(app)["paths"][path][method].get("security", document(app)["security"])
    assert described == ([] if path in WITHOUT_TOKEN else [{"token": []}])


async def test_what_nobody_expected_is_a_plain_500(app: FastAPI) -> None:
    async def broken() -> None:
        raise RuntimeError("the inside of it")

    app.add_api_route("/broken", broken)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sluice") as stranger:
        answer = await stranger.get("/broken")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "inside" not in answer.text


def test_the_pages_show_every_call_and_fetch_nothing(app: FastAPI) -> None:
    page, entrance = reference(document(app)), home(version="<1>", address="http://here")

    assert all(path in page for _, path in OF_THE_CONTRACT)
    for text in (page, entrance):
        assert not any(fetching in text for fetching in ("<script", "<link", "src=", "@import", "url("))
    assert "&lt;1&gt;" in entrance
