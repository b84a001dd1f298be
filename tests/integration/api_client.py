"""A real api for tests: in this process, on a free port, over real Kafka, Postgres and a blob folder, no processor.

`Ada` is a person with a token who talks to it over HTTP; `pictures` makes bytes that pass for files.
"""

import asyncio
import contextlib
import hashlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from services.api.main import serving_api
from services.auth import make_token
from services.embedded.folders import free_ports
from services.settings import Settings
from services.tail import Tail

SECRET = "a secret for tests that is long enough"
DONE_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 90
PATIENCE = {"tail_lag_max_s": 60, "projection_timeout_s": 60, "read_back_timeout_s": 60}
"""A machine that stands still for some seconds is no reason to refuse a request, nor to leave open what became of it:
an api under test is told to wait, and its callers wait longer. A test of these limits sets its own."""
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
            **PATIENCE,
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
    tail: Tail

    @property
    def blobs(self) -> list[Path]:
        """Every file in the blob store, without what the api writes there each second to see whether it can."""
        return [path for path in files_below(self.settings.blob_folder) if not path.name.startswith(".check-")]

    async def person(self, name: str) -> Person:
        token = make_token(name, SECRET, ttl_s=3600)
        http = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=ANSWER_TIMEOUT_S, trust_env=False
        )
        return Person(name, await self.stack.enter_async_context(http))


@contextlib.asynccontextmanager
async def running_api(settings: Settings) -> AsyncIterator[RunningApi]:
    async with serving_api(settings) as api, contextlib.AsyncExitStack() as stack:
        yield RunningApi(f"http://127.0.0.1:{api.port}", settings, stack, api.tail)


@contextlib.asynccontextmanager
async def processor_beside(settings: Settings) -> AsyncIterator[None]:
    """The processor of an api's lane, in a process of its own."""
    environment = {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "SLUICE_DATABASE_URL": settings.database_url.get_secret_value(),
        "SLUICE_LOG_TOPIC": settings.log_topic,
        "SLUICE_PROGRESS_TOPIC": settings.progress_topic,
        "SLUICE_BLOB_URL": settings.blob_url,
        "SLUICE_PROCESSOR_PORT": str(settings.processor_port if "processor_port" in settings.model_fields_set else 0),
    }
    processor = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.processor", env={**os.environ, **environment}
    )
    try:
        yield
    finally:
        processor.kill()
        await processor.wait()


def environment_of(settings: Settings) -> dict[str, str]:
    """These settings as a process of its own reads them."""
    found = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        shown = value.get_secret_value() if isinstance(value, SecretStr) else value
        found[f"SLUICE_{name.upper()}"] = str(shown)
    return found


@contextlib.asynccontextmanager
async def api_beside(settings: Settings) -> AsyncIterator[str]:
    """Another api, in a process of its own; its address, once it is ready."""
    port = free_ports(1)[0]
    environment = {**os.environ, **environment_of(settings), "SLUICE_API_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.api", env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_ready(url, process)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), DONE_TIMEOUT_S)


async def _until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(DONE_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as http:
        while process.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/readyz")).status_code == httpx.codes.OK:
                    return
            await asyncio.sleep(0.05)
    raise AssertionError(f"the api ended with {process.returncode} before it was ready")


@contextlib.asynccontextmanager
async def person_at(url: str, name: str) -> AsyncIterator[Person]:
    """Somebody with a token, at the api of this address."""
    headers = {"Authorization": f"Bearer {make_token(name, SECRET, ttl_s=3600)}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=ANSWER_TIMEOUT_S, trust_env=False) as http:
        yield Person(name, http)


async def ended(person: Person, batch_id: str) -> dict[str, Any]:
    """The batch when it came to its end; fails the test after DONE_TIMEOUT_S."""
    # A problem has no such field: one that passes by (503) is asked again, any other is shown when the time is up.
    return await answered_with(
        lambda: person.get(f"/v1/batches/{batch_id}"), lambda batch: batch.get("completed_at") is not None
    )


async def answered(
    ask: Callable[[], Awaitable[httpx.Response]], expected: int | str | Callable[[dict[str, Any]], bool]
) -> httpx.Response:
    """Ask again until the answer has this status, or this code, or a body as expected; fails the test after
    DONE_TIMEOUT_S."""
    last = "none"
    try:
        async with asyncio.timeout(DONE_TIMEOUT_S):
            while not _is_as_expected(answer := await ask(), expected):
                last = f"{answer.status_code} {answer.text}"
                await asyncio.sleep(0.05)
            return answer
    except TimeoutError:
        raise AssertionError(f"the answer that was waited for did not come; the last one was {last}") from None


def _is_as_expected(answer: httpx.Response, expected: int | str | Callable[[dict[str, Any]], bool]) -> bool:
    if isinstance(expected, int):
        return answer.status_code == expected
    body = answer.json()
    return expected(body) if callable(expected) else bool(body.get("code") == expected)


async def answered_with(
    ask: Callable[[], Awaitable[httpx.Response]], expected: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The body of the answer, asked for until it is as expected."""
    body: dict[str, Any] = (await answered(ask, expected)).json()
    return body


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder, also while some are removed from it."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder) for name in names)


def code_of(answer: httpx.Response) -> str:
    """The code of a problem; fails for anything else."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert body["status"] == answer.status_code
    return str(body["code"])
