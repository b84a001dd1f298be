"""The api as the command line uses it: one method a call, over one httpx client.

A write that gets no clear answer (connection lost, 429, 503) is sent again with the same Idempotency-Key, or as the
same PUT, for `retry_for_s` at most: Sluice answers a repetition as it answered the first, so nothing is done twice.
Problems come out as `Refused` with the contract's code. How a set of files is sent: `sending.py`.
"""

import asyncio
import base64
import contextlib
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from services.cli.connection import Connection
from services.cli.errors import Refused, Unreachable

CHUNK_BYTES = 256 * 1024
PAGE_ITEMS = 200
TRY_AGAIN = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE})
PAUSE_S, PAUSE_MAX_S = 0.2, 5.0
TIMEOUT = httpx.Timeout(30.0, connect=5.0)  # a write may take the api 10 s until it answers outcome_unknown

BuildRequest = Callable[[], httpx.Request]


@dataclass(frozen=True, slots=True)
class FileToSend:
    """A local file, and the name it is sent under. `sha256` of what it held when it was looked at."""

    path: Path
    name: str
    size_bytes: int
    sha256: bytes

    @classmethod
    def of(cls, path: Path, name: str) -> Self:
        """Read the file once, in pieces. Raises OSError."""
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
            return cls(path=path, name=name, size_bytes=content.tell(), sha256=digest.digest())


class Api:
    def __init__(self, http: httpx.AsyncClient, *, retry_for_s: float = 60.0) -> None:
        self._http = http
        self._retry_for_s = retry_for_s
        self._answered = False

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, connection: Connection) -> AsyncIterator[Self]:
        async with httpx.AsyncClient(
            base_url=connection.api,
            headers={"Authorization": f"Bearer {connection.token}"},
            timeout=TIMEOUT,
            trust_env=not connection.is_local,  # a proxy cannot reach this machine's loopback
        ) as http:
            yield cls(http)

    async def config(self) -> dict[str, Any]:
        return await self._get("/v1/config")

    async def status(self) -> dict[str, Any]:
        return await self._get("/v1/status")

    async def batches(self, *, limit: int) -> list[dict[str, Any]]:
        """The newest batches of this user."""
        items: list[dict[str, Any]] = (await self._get("/v1/batches", limit=limit))["items"]
        return items

    async def batch(self, batch_id: str, *, min_position: str | None = None, at: str | None = None) -> dict[str, Any]:
        """The batch, or with `at` as it was at a position or a time."""
        return await self._get(f"/v1/batches/{quote(batch_id, safe='')}", min_position=min_position, at=at)

    async def events(self, batch_id: str) -> AsyncIterator[dict[str, Any]]:
        """All that happened to a batch, oldest first."""
        cursor: str | None = None
        while True:
            page = await self._get(f"/v1/batches/{quote(batch_id, safe='')}/events", limit=PAGE_ITEMS, cursor=cursor)
            for event in page["items"]:
                yield event
            if (cursor := page["next_cursor"]) is None:
                return

    async def upload(self, upload_id: str) -> dict[str, Any]:
        return await self._get(f"/v1/uploads/{quote(upload_id, safe='')}")

    async def uploads(self, batch_id: str, *, min_position: str | None = None) -> list[dict[str, Any]]:
        """All uploads of a batch in queue order, as of `min_position` or later."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            path = f"/v1/batches/{quote(batch_id, safe='')}/uploads"
            page = await self._get(path, limit=PAGE_ITEMS, cursor=cursor, min_position=min_position)
            found += page["items"]
            if (cursor := page["next_cursor"]) is None:
                return found

    async def create_batch(self, *, name: str | None) -> dict[str, Any]:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return await self._write(
            lambda: self._http.build_request("POST", "/v1/batches", json={"name": name}, headers=headers)
        )

    async def put(self, batch_id: str, file: FileToSend) -> dict[str, Any]:
        """Send a file under its name, which must not have been used in the batch for other bytes."""
        url = f"/v1/batches/{quote(batch_id, safe='')}/uploads/{quote(file.name, safe='')}"
        headers = {
            "Content-Length": str(file.size_bytes),
            "Content-Type": "application/octet-stream",  # Sluice tells the type by the content
            "Repr-Digest": f"sha-256=:{base64.b64encode(file.sha256).decode()}:",
        }
        return await self._write(
            lambda: self._http.build_request("PUT", url, content=_chunks(file.path), headers=headers)
        )

    async def post(self, batch_id: str, file: FileToSend) -> dict[str, Any]:
        """Send a file whose name another file of the batch already has. Answers accepted and rejected."""
        url = f"/v1/batches/{quote(batch_id, safe='')}/uploads"
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        with file.path.open("rb") as content:

            def build() -> httpx.Request:
                content.seek(0)
                return self._http.build_request("POST", url, files={"files": (file.name, content)}, headers=headers)

            return await self._write(build)

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        url = f"/v1/batches/{quote(batch_id, safe='')}/cancel"
        return await self._write(lambda: self._http.build_request("POST", url))

    async def delete(self, batch_id: str) -> None:
        """Remove the batch; one that is gone already stays so."""
        url = f"/v1/batches/{quote(batch_id, safe='')}"
        try:
            await self._write(lambda: self._http.build_request("DELETE", url))
        except Refused as refusal:
            if refusal.status != HTTPStatus.NOT_FOUND:
                raise

    async def retry_batch(self, batch_id: str) -> dict[str, Any]:
        """Queue every failed upload of the batch again; the batch."""
        return await self._retry(f"/v1/batches/{quote(batch_id, safe='')}/retry")

    async def retry_upload(self, upload_id: str) -> dict[str, Any]:
        """Queue a failed upload again; the upload."""
        return await self._retry(f"/v1/uploads/{quote(upload_id, safe='')}/retry")

    async def _retry(self, url: str) -> dict[str, Any]:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return await self._write(lambda: self._http.build_request("POST", url, headers=headers))

    async def seal(self, batch_id: str) -> dict[str, Any]:
        url = f"/v1/batches/{quote(batch_id, safe='')}/seal"
        return await self._write(lambda: self._http.build_request("POST", url))

    async def _get(self, path: str, **query: str | int | None) -> dict[str, Any]:
        asked = {name: value for name, value in query.items() if value is not None}
        return await self._write(lambda: self._http.build_request("GET", path, params=asked))

    async def _write(self, build: BuildRequest) -> dict[str, Any]:
        """Send a request that may be repeated until it has an answer, or for `retry_for_s`."""
        deadline = time.monotonic() + self._retry_for_s
        pause_s = PAUSE_S
        while True:
            try:
                response = await self._http.send(build())
            except httpx.LocalProtocolError:
                raise  # what we send is wrong: a file that changed its size meanwhile
            except httpx.TransportError as error:
                if not self._answered or time.monotonic() + pause_s > deadline:
                    raise self._unreachable(error) from error
            else:
                self._answered = True
                pause_s = max(pause_s, _retry_after_s(response))
                if response.status_code not in TRY_AGAIN or time.monotonic() + pause_s > deadline:
                    return _body(response)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        reason = str(error) or type(error).__name__
        waited = f" for {self._retry_for_s:.0f} s" if self._answered else ""
        return Unreachable(
            f"No answer from {self._http.base_url}{waited} ({reason}). Does Sluice run there? "
            f"`sluice up` starts it here; SLUICE_API_URL names another."
        )


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    """The file's bytes, a piece at a time, so that memory stays flat whatever its size."""
    content = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(content.read, CHUNK_BYTES):
            yield chunk
    finally:
        content.close()


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("Retry-After", "")
    return float(min(int(given), PAUSE_MAX_S)) if given.isascii() and given.isdigit() else 0.0


def _body(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object; raises Refused where it is a problem or nothing Sluice would say."""
    if response.status_code == HTTPStatus.NO_CONTENT:
        return {}
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    problem = body if isinstance(body, dict) else {}
    status = response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        hint = ". Make a token with `sluice token --user NAME` and set SLUICE_TOKEN to it."
    elif not problem:
        hint = f". Is {response.request.url} an address of Sluice?"
    else:
        hint = ""
    detail = problem.get("detail") or f"The answer was {status} {response.reason_phrase} and not one of Sluice's"
    raise Refused(
        status=status, code=problem.get("code") or f"http_{status}", detail=f"{detail.removesuffix('.')}{hint}"
    )
