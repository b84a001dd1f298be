"""Who may do what, how often, and from which pages: scopes, published keys, rate limits and CORS at a real api."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.api import asking
from services.auth import make_token
from services.serving import serving
from tests.integration.api_client import SECRET, RunningApi, a_picture, api_settings, code_of, running_api
from tests.unit.test_keys import Signer

PAGE = "https://dashboard.example"
OTHER_PAGE = "https://elsewhere.example"


@pytest.fixture
def given(kafka: str, database_url: str, unique: str, tmp_path: Path) -> dict[str, Any]:
    return {"kafka": kafka, "database_url": database_url, "unique": unique, "blobs": tmp_path / "blobs"}


@contextlib.asynccontextmanager
async def client(api: RunningApi, token: str | None) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=api.url, headers=headers, trust_env=False, timeout=30) as http:
        yield http


async def test_reading_needs_read_and_writing_needs_write(given: dict[str, Any]) -> None:
    async with running_api(api_settings(**given)) as api:
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()
        path = f"/v1/batches/{batch_id}"
        reading = [("GET", each) for each in ("/v1/batches", path, f"{path}/uploads", f"{path}/events", "/v1/status")]
        writing = [("POST", "/v1/batches"), ("PUT", f"{path}/uploads/a.jpg"), ("POST", f"{path}/uploads")]
        writing += [("POST", f"{path}/seal"), ("POST", f"{path}/retry"), ("DELETE", path)]
        answers: dict[str, list[str | int]] = {}
        for scope in ("read", "write", "openid"):
            async with client(api, make_token("ada", SECRET, ttl_s=60, scopes=[scope])) as http:
                found = [await http.request(method, where) for method, where in (*reading, *writing)]
                answers[scope] = ["forbidden" if each.status_code == 403 else "allowed" for each in found]
                assert {code_of(each) for each in found if each.status_code == 403} <= {"forbidden_scope"}

        reads, writes = len(reading), len(writing)
        assert answers == {
            "read": ["allowed"] * reads + ["forbidden"] * writes,
            "write": ["forbidden"] * reads + ["allowed"] * writes,
            "openid": ["forbidden"] * (reads + writes),
        }


async def test_an_api_takes_tokens_of_an_identity_provider(given: dict[str, Any]) -> None:
    signer = Signer("k1", kind="RSA")

    async def keys(_request: Request) -> Response:
        return JSONResponse({"keys": [signer.jwk()]})

    provider = serving(Starlette(routes=[Route("/keys", keys)]), host="127.0.0.1", port=0, stop_timeout_s=1)
    async with provider as port, running_api(api_settings(**given, jwks_url=f"http://127.0.0.1:{port}/keys")) as api:
        async with client(api, signer.token("ada")) as http:
            made = await http.post("/v1/batches", json={})
        async with client(api, make_token("ada", SECRET, ttl_s=60)) as http:
            refused = await http.get("/v1/batches")

        assert (made.status_code, made.json()["user_id"]) == (201, "ada")
        assert (refused.status_code, code_of(refused)) == (401, "unauthorized")


async def test_a_user_who_asks_too_much_waits_and_nobody_else_does(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: now_s)  # else a bucket fills while the machine stands still
    monkeypatch.setattr(asking, "time", clock)
    now_s = 1_000.0
    settings = api_settings(**given, rate_limit_per_s=2, rate_limit_burst=5)
    async with running_api(settings) as api:
        ada, grace = await api.person("ada"), await api.person("grace")

        answers = [await ada.get("/v1/status") for _ in range(7)]
        picture = await ada.put("0" * 36, "a.jpg", a_picture())
        others = await grace.get("/v1/status")
        anyone = await ada.http.get("/v1/config", headers={"Authorization": ""})
        refused = answers[-1]
        now_s += float(refused.headers["Retry-After"])
        granted = await ada.get("/v1/status")

        assert [answer.status_code for answer in answers[:5]] == [200] * 5
        assert (refused.status_code, code_of(refused), code_of(picture)) == (429, "rate_limited", "rate_limited")
        assert answers[0].headers["RateLimit-Policy"] == '"user";q=5;w=3'
        assert answers[0].headers["RateLimit"] == '"user";r=4;t=1'
        assert refused.headers["RateLimit"].startswith('"user";r=0;t=')
        assert int(refused.headers["Retry-After"]) == 1
        assert granted.status_code == 200
        assert others.status_code == anyone.status_code == 200
        assert "RateLimit" not in anyone.headers


async def test_without_a_limit_nothing_is_said_of_it(given: dict[str, Any]) -> None:
    async with running_api(api_settings(**given, rate_limit_per_s=0)) as api:
        ada = await api.person("ada")

        answers = await asyncio.gather(*(ada.get("/v1/config") for _ in range(50)), ada.get("/v1/status"))

        assert {answer.status_code for answer in answers} == {200}
        assert not any("RateLimit" in answer.headers for answer in answers)


async def test_pages_of_allowed_origins_may_call_and_read_what_they_need(given: dict[str, Any]) -> None:
    settings = api_settings(**given, allowed_origins=f"{PAGE}, http://127.0.0.1:3000")
    async with running_api(settings) as api:
        ada = await api.person("ada")

        asked = await preflight(ada.http, PAGE, method="PUT", headers="authorization, repr-digest")
        refused = await preflight(ada.http, OTHER_PAGE, method="PUT", headers="authorization")
        made = await ada.http.post("/v1/batches", json={}, headers={"Origin": PAGE})
        wrong = await ada.http.get("/v1/batches/nope", headers={"Origin": PAGE})
        stranger = await ada.http.get("/v1/batches", headers={"Origin": OTHER_PAGE})

        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
        assert (refused.status_code, "Access-Control-Allow-Origin" in refused.headers) == (400, False)
        assert made.headers["Access-Control-Allow-Origin"] == PAGE
        assert {"Sluice-Position", "Location"} <= set(made.headers["Access-Control-Expose-Headers"].split(", "))
        assert "Access-Control-Allow-Credentials" not in made.headers
        assert (code_of(wrong), wrong.headers["Access-Control-Allow-Origin"]) == ("not_found", PAGE)
        assert "Access-Control-Allow-Origin" not in stranger.headers


async def preflight(http: httpx.AsyncClient, origin: str, *, method: str, headers: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return await http.options("/v1/batches", headers=asked)
