"""Whose tokens the notifier takes: those that may read, signed with the secret or by an identity provider."""

import asyncio
import contextlib
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed

from services.auth import make_token
from services.notifier.main import notifying
from services.serving import serving
from services.settings import Settings
from tests.notifiers import SECRET, SOON_S, Scene, a_quiet_scene, settings_for
from tests.unit.test_keys import Signer


async def greeted(scene: Scene, token: str) -> Any:
    """What a client with this token is told: ready, or how it is sent away."""
    async with scene.connected(None) as client:
        await client.say({"type": "auth", "token": token})
        try:
            return (await client.hear())["type"]
        except ConnectionClosed:
            return await client.closed()


async def test_a_token_that_may_not_read_is_told_nothing(kafka: str, database_url: str, unique: str) -> None:
    settings = settings_for(kafka=kafka, database_url=database_url, unique=unique)
    async with a_quiet_scene(settings) as scene, notifying(settings) as notifier:
        scene.port = notifier.port
        writing = make_token("ada", SECRET, ttl_s=60, scopes=["write"])

        refused = await greeted(scene, writing)
        reading = await greeted(scene, make_token("ada", SECRET, ttl_s=60, scopes=["read"]))
        url = f"http://127.0.0.1:{scene.port}"
        async with httpx.AsyncClient(base_url=url, timeout=SOON_S, trust_env=False) as http:
            stream = await http.get("/v1/stream", headers={"Authorization": f"Bearer {writing}"})

        assert refused[0] == 4001
        assert "`read`" in refused[1]
        assert reading == "ready"
        assert (stream.status_code, stream.json()["code"]) == (403, "forbidden_scope")


async def test_a_notifier_takes_tokens_of_an_identity_provider(kafka: str, database_url: str, unique: str) -> None:
    signer = Signer("k1")

    async def keys(_request: Request) -> Response:
        return JSONResponse({"keys": [signer.jwk()]})

    provider = serving(Starlette(routes=[Route("/keys", keys)]), host="127.0.0.1", port=0, stop_timeout_s=1)
    async with contextlib.AsyncExitStack() as its_time, contextlib.AsyncExitStack() as stack:
        port = await its_time.enter_async_context(provider)
        given = settings_for(kafka=kafka, database_url=database_url, unique=unique)
        changes = {"jwks_url": f"http://127.0.0.1:{port}/keys", "jwks_max_age_s": 5}
        settings: Settings = given.model_copy(update=changes)
        scene = await stack.enter_async_context(a_quiet_scene(settings))
        scene.port = (await stack.enter_async_context(notifying(settings))).port

        known = await greeted(scene, signer.token("ada"))
        refused = await greeted(scene, make_token("ada", SECRET, ttl_s=60))
        await its_time.aclose()
        async with asyncio.timeout(SOON_S):
            while (later := await greeted(scene, signer.token("ada"))) == "ready":  # noqa: ASYNC110  # its keys count
                await asyncio.sleep(0.1)

    assert known == "ready"
    assert refused[0] == 4001
    assert later == (1012, "the keys that check tokens cannot be fetched")
