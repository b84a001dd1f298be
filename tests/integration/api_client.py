"""A real api for tests: in this process, on a free port, over real Kafka, Postgres and a blob folder, no processor.

`Ada` is a person with a token who talks to it over HTTP; `pictures` makes bytes that pass for files.
"""

import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.api.main import serving_api
from services.auth import make_token
from services.settings import Settings

SECRET = "a secret for tests that is long enough"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"

_numbers = itertools.count(1)


def a_picture(size_bytes: int = 2_000) -> bytes:
    """Bytes that pass for a JPEG, unlike any others."""
    return (JPEG + f"{next(_numbers):08}".encode()).ljust(size_bytes, b"\x5a")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def api_settings(*, kafka: str, database_url: str, unique: str, blobs: Path, **changes: Any) -> Settings:
    return Settings(
        **{
            "kafka_bootstrap_servers": kafka,
            "database_url": database_url,
            "log_topic": f"{unique}.events",
            "progress_topic": f"{unique}.progress",
            "blob_url": blobs.as_uri(),
            "jwt_secret": SECRET,
            "api_port": 0,
            "stop_timeout_s": 5,
            **changes,
        }
    )


@dataclass(frozen=True)
class Person:
    """Somebody with a token, at one api."""

    name: str
    http: httpx.AsyncClient

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self.http.get(path, params=params)

    async def post(self, path: str, *, key: str | None = None, **body: Any) -> httpx.Response:
        return await self.http.post(path, headers={"Idempotency-Key": key} if key else {}, **body)

    async def send(
        self, path: str, files: Mapping[str, bytes], *, key: str | None = None, **fields: str
    ) -> httpx.Response:
        """POST a form of files."""
        parts = [("files", (name, content)) for name, content in files.items()]
        return await self.post(path, key=key, files=parts, data=fields)

    async def put(self, batch_id: str, filename: str, content: bytes, **headers: str) -> httpx.Response:
        path = f"/v1/batches/{batch_id}/uploads/{filename}"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.put(path, content=content, headers=named)

    async def opens_batch(self, **wish: Any) -> str:
        """The id of a new open batch."""
        answer = await self.post("/v1/batches", json=wish)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])


@dataclass(frozen=True)
class RunningApi:
    """An api and the people at it."""

    url: str
    settings: Settings
    stack: contextlib.AsyncExitStack

    @property
    def blobs(self) -> list[Path]:
        """Every file in the blob store."""
        return sorted(path for path in self.settings.blob_folder.rglob("*") if path.is_file())

    async def person(self, name: str) -> Person:
        token = make_token(name, SECRET, ttl_s=3600)
        http = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False
        )
        return Person(name, await self.stack.enter_async_context(http))


@contextlib.asynccontextmanager
async def running_api(settings: Settings) -> AsyncIterator[RunningApi]:
    async with serving_api(settings) as api, contextlib.AsyncExitStack() as stack:
        yield RunningApi(f"http://127.0.0.1:{api.port}", settings, stack)


def code_of(answer: httpx.Response) -> str:
    """The code of a problem; fails for anything else."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert body["status"] == answer.status_code
    return str(body["code"])
