"""What the services write to their logs at debug level, through a whole run: no secret, no token, nothing of a file.

Everything that must not be there holds a mark that nothing else holds; the logs are searched for it, as it is and in
the forms it travels in.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from PIL import Image
from websockets.asyncio.client import connect

from services.auth import make_token
from services.embedded.folders import free_ports
from tests.integration.api_client import ANSWER_TIMEOUT_S, PATIENCE, Person, ended

SECRET = "the-secret-Xq7mark-of-this-test-which-is-long"
PASSWORD = "passXq7mark"
IN_FILE = "fileXq7mark"
USER_IN_TOKEN = "ada-Xq7mark"
MARK = "Xq7mark"
SERVICES = ("api", "notifier", "processor")
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60


def a_picture() -> bytes:
    """A real one, with the mark in its EXIF and behind its end."""
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    exif = image.getexif()
    exif[270] = IN_FILE  # ImageDescription
    exif[315] = IN_FILE  # Artist
    kept = io.BytesIO()
    image.save(kept, "JPEG", exif=exif, comment=IN_FILE.encode())
    return kept.getvalue() + IN_FILE.encode() * 10


@pytest.fixture
async def secret_database(postgres: str, unique: str) -> AsyncIterator[str]:
    """An empty database of a user whose password holds the mark."""
    connection = await asyncpg.connect(postgres)
    await connection.execute(f"CREATE ROLE {unique} LOGIN PASSWORD '{PASSWORD}'")
    await connection.execute(f"CREATE DATABASE {unique} OWNER {unique}")
    parts = urlsplit(postgres)
    try:
        netloc = f"{unique}:{PASSWORD}@{parts.hostname}:{parts.port}"
        yield parts._replace(netloc=netloc, path=f"/{unique}").geturl()
        await connection.execute(f"DROP DATABASE {unique} WITH (FORCE)")
        await connection.execute(f"DROP ROLE {unique}")
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def service(name: str, environment: dict[str, str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A service in its own process, all it says in a file."""
    with log.open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"services.{name}", env={**os.environ, **environment}, stdout=said, stderr=said
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)


async def until_said(log: Path, text: str) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while text not in log.read_text(encoding="utf-8", errors="replace"):  # noqa: ASYNC110, ASYNC240  # a file
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_no_secret_token_or_content_is_logged(
    kafka: str, secret_database: str, unique: str, tmp_path: Path, log_format: str
) -> None:
    api_port, notifier_port, processor_port = free_ports(3)
    environment = {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "SLUICE_DATABASE_URL": secret_database,
        "SLUICE_LOG_TOPIC": f"{unique}.events",
        "SLUICE_PROGRESS_TOPIC": f"{unique}.progress",
        "SLUICE_BLOB_URL": (tmp_path / "blobs").as_uri(),
        "SLUICE_JWT_SECRET": SECRET,
        "SLUICE_API_PORT": str(api_port),
        "SLUICE_NOTIFIER_PORT": str(notifier_port),
        "SLUICE_PROCESSOR_PORT": str(processor_port),
        "SLUICE_LOG_LEVEL": "debug",
        "SLUICE_LOG_FORMAT": log_format,
        **{f"SLUICE_{name.upper()}": str(value) for name, value in PATIENCE.items()},
    }
    token = make_token(USER_IN_TOKEN, SECRET, ttl_s=600)
    logs = {name: tmp_path / f"{name}.log" for name in SERVICES}

    async with contextlib.AsyncExitStack() as stack:
        for name in SERVICES:
            await stack.enter_async_context(service(name, environment, logs[name]))
        await until_said(logs["api"], "api_ready")
        await until_said(logs["notifier"], "notifier_ready")
        await _use(f"http://127.0.0.1:{api_port}", f"127.0.0.1:{notifier_port}", token)

    assert "request_ended" in logs["api"].read_text(encoding="utf-8"), "that is what it says at debug level"
    _, claims, signature = token.split(".")
    needles = [MARK, token, signature, claims, base64.b64encode(IN_FILE.encode()).decode().rstrip("=")]
    for name, log in logs.items():
        text = log.read_text(encoding="utf-8", errors="replace")
        assert "stop_step_done" in text, f"{name} was not heard to its end"
        assert [needle for needle in needles if needle in text] == [], f"in the log of {name}"


async def _use(api: str, notifier: str, token: str) -> None:
    """Everything that carries a token or a file, rightly and wrongly."""
    options: dict[str, Any] = {"base_url": api, "trust_env": False, "timeout": ANSWER_TIMEOUT_S}
    async with httpx.AsyncClient(**options) as stranger:
        async with httpx.AsyncClient(**options, headers={"Authorization": f"Bearer {token}"}) as http:
            ada = Person("ada", http)
            made = (await ada.send("/v1/batches", {"a.jpg": a_picture(), "b.txt": IN_FILE.encode()})).json()
            open_batch = await ada.opens_batch()
            await ada.put(open_batch, "c.jpg", a_picture(), Repr_Digest="sha-256=:AAAA:")
            await ada.put(open_batch, "d.jpg", b"\xff\xd8\xff\xe0" + IN_FILE.encode() * 50)
            await ada.post(f"/v1/batches/{open_batch}/seal")
            await http.post("/v1/batches", content=IN_FILE.encode(), headers={"Content-Type": "application/json"})
            await http.post(
                "/v1/batches", content=IN_FILE.encode(), headers={"Content-Type": "multipart/form-data; boundary=x"}
            )
            await _watch(notifier, token, made["batch"]["id"])
            done = await ended(ada, made["batch"]["id"])
            await ended(ada, open_batch)
            upload = f"/v1/uploads/{made['accepted'][0]['id']}"
            for path in (upload, f"{upload}/content", f"{upload}/thumbnail", f"/v1/batches/{done['id']}/events"):
                assert (await ada.get(path)).status_code == 200
            assert IN_FILE in (await ada.get(upload)).text
            await ada.http.delete(f"/v1/batches/{done['id']}")
        for wrong in (token[:-4], f"{token}x", SECRET, make_token("ada", SECRET, ttl_s=-60)):
            refused = await stranger.get("/v1/batches", headers={"Authorization": f"Bearer {wrong}"})
            assert refused.status_code == 401
        await stranger.get("/v1/batches", params={"token": token})


async def _watch(notifier: str, token: str, batch_id: str) -> None:
    """Over WebSocket, with a good token and with bad ones."""
    for given in (token, f"{token}x", SECRET):
        async with connect(f"ws://{notifier}/v1/ws", proxy=None) as socket:
            await _say(socket, {"type": "auth", "token": given})
            if given is token:
                assert json.loads(await socket.recv())["type"] == "ready"
                await _say(socket, {"type": "subscribe", "batch_id": batch_id})
                assert json.loads((await socket.recv()).splitlines()[0])["type"] == "subscribed"
                await _say(socket, {"type": "auth", "token": f"{token}x"}, {"odd": SECRET})
                await socket.recv()
            else:
                await socket.wait_closed()
    async with connect(
        f"ws://{notifier}/v1/ws", additional_headers={"Authorization": f"Bearer {token}"}, proxy=None
    ) as socket:
        assert json.loads(await socket.recv())["type"] == "ready"


async def _say(socket: Any, *messages: dict[str, Any]) -> None:
    await socket.send("\n".join(json.dumps(message) for message in messages))


async def test_a_database_that_is_away_is_named_without_its_password(kafka: str, unique: str, tmp_path: Path) -> None:
    environment = {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "SLUICE_DATABASE_URL": f"postgresql://me:{PASSWORD}@127.0.0.1:1/none",
        "SLUICE_LOG_TOPIC": f"{unique}.events",
        "SLUICE_PROGRESS_TOPIC": f"{unique}.progress",
        "SLUICE_BLOB_URL": (tmp_path / "blobs").as_uri(),
        "SLUICE_JWT_SECRET": SECRET,
        "SLUICE_LOG_LEVEL": "debug",
    }
    log = tmp_path / "api.log"

    async with service("api", environment, log) as process:
        await until_said(log, "waiting_for_part")
        process.kill()
        await process.wait()

    assert MARK not in log.read_text(encoding="utf-8")
