"""The api as the command line uses it: repetitions keep their key, files their bytes, refusals their reason."""

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.cli.client import Api, FileToSend
from services.cli.errors import Refused, Unreachable, WrongUse
from services.cli.sending import check_files, send

Answer = Callable[[httpx.Request], httpx.Response]
BATCH = {"id": "0198c0de-0000-7000-8000-000000000000"}


class Server:
    """Answers in turn with what it was given, the last answer for ever; keeps what it was asked, body included."""

    def __init__(self, *answers: Answer) -> None:
        self.asked: list[httpx.Request] = []
        self._answers = list(answers)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return answer(request)

    @contextlib.asynccontextmanager
    async def api(self, *, retry_for_s: float = 10) -> AsyncIterator[Api]:
        async with httpx.AsyncClient(base_url="http://sluice.test", transport=httpx.MockTransport(self)) as http:
            yield Api(http, retry_for_s=retry_for_s)


def ok(body: dict[str, Any]) -> Answer:
    return lambda _request: httpx.Response(202, json=body)


def refused(status: int, code: str, **headers: str) -> Answer:
    body = {"title": code, "status": status, "detail": f"because of {code}", "code": code}
    return lambda _request: httpx.Response(status, json=body, headers=headers)


def broken(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("connection reset", request=request)


async def test_a_write_without_a_clear_answer_is_repeated_with_the_same_key() -> None:
    server = Server(ok(BATCH), refused(503, "outcome_unknown"), broken, ok(BATCH))

    async with server.api() as api:
        await api.create_batch(name="warm-up: the server has answered once")
        answer = await api.create_batch(name="summer")

    assert answer == BATCH
    keys = [request.headers["Idempotency-Key"] for request in server.asked]
    assert len(keys) == 4
    assert len(set(keys[1:])) == 1
    assert keys[0] != keys[1]


async def test_the_server_says_how_long_to_wait() -> None:
    server = Server(refused(429, "rate_limited", **{"Retry-After": "1"}), ok(BATCH))
    began = asyncio.get_running_loop().time()

    async with server.api() as api:
        await api.seal(BATCH["id"])

    assert asyncio.get_running_loop().time() - began >= 1


async def test_a_server_that_stays_unavailable_is_given_up_with_its_reason() -> None:
    server = Server(refused(503, "log_unavailable"))

    async with server.api(retry_for_s=0) as api:
        with pytest.raises(Refused, match="because of log_unavailable"):
            await api.status()


async def test_where_nobody_ever_answered_there_is_no_waiting() -> None:
    server = Server(broken)

    async with server.api() as api:
        with pytest.raises(Unreachable, match=r"sluice up"):
            await api.status()

    assert len(server.asked) == 1


async def test_an_answer_that_is_not_sluices_is_told_as_such() -> None:
    server = Server(lambda _request: httpx.Response(200, text="<html>"))

    async with server.api() as api:
        with pytest.raises(Refused, match=r"Is http://sluice\.test/v1/status an address of Sluice"):
            await api.status()


async def test_a_file_is_put_under_its_name_with_its_digest(tmp_path: Path) -> None:
    picture = tmp_path / "a file?.jpg"
    picture.write_bytes(b"bytes" * 100_000)
    server = Server(ok({"id": "u"}))

    async with server.api() as api:
        await api.put(BATCH["id"], FileToSend.of(picture, picture.name))

    (request,) = server.asked
    digest = base64.b64encode(hashlib.sha256(picture.read_bytes()).digest()).decode()
    assert request.url.raw_path.endswith(b"/uploads/a%20file%3F.jpg")
    assert f"sha-256=:{digest}:" == request.headers["Repr-Digest"]
    assert ("500000", picture.read_bytes()) == (request.headers["Content-Length"], request.content)


async def test_a_put_that_is_repeated_sends_all_bytes_again(tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"bytes")
    server = Server(refused(503, "log_unavailable"), ok({"id": "u"}))

    async with server.api() as api:
        await api.put(BATCH["id"], FileToSend.of(picture, picture.name))

    assert [request.content for request in server.asked] == [b"bytes", b"bytes"]


async def test_files_that_are_refused_are_kept_as_rejected_and_the_batch_is_sealed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.txt"
    good.write_bytes(b"good")
    bad.write_bytes(b"bad")

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("bad.txt"):
            return refused(415, "unsupported_media_type")(request)
        return ok({**BATCH, "path": request.url.path})(request)

    server = Server(answer)
    async with server.api() as api:
        sent = await send(api, BATCH, [good, bad])

    assert server.asked[-1].url.path.endswith("/seal")
    assert len(sent.accepted) == 1
    expected = {"filename": "bad.txt", "code": "unsupported_media_type", "detail": "because of unsupported_media_type"}
    assert [expected] == sent.rejected


async def test_where_no_file_is_taken_no_batch_is_left(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"bad")
    server = Server(
        lambda request: (
            httpx.Response(204) if request.method == "DELETE" else refused(415, "unsupported_media_type")(request)
        )
    )

    async with server.api() as api:
        sent = await send(api, BATCH, [tmp_path / "bad.txt"])

    assert (server.asked[-1].method, server.asked[-1].url.path) == ("DELETE", f"/v1/batches/{BATCH['id']}")
    assert (sent.batch, sent.accepted, len(sent.rejected)) == (None, [], 1)


async def test_a_name_that_occurs_twice_goes_by_post_the_second_time(tmp_path: Path) -> None:
    files = [tmp_path / folder / "same.jpg" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(file.parent.name.encode())
    server = Server(
        lambda request: httpx.Response(202, json={**BATCH, "accepted": [{"by": request.method}], "rejected": []})
    )

    async with server.api() as api:
        sent = await send(api, BATCH, files)

    assert {"PUT", "POST"} == {request.method for request in server.asked[:2]}
    (posted,) = (request for request in server.asked[:2] if request.method == "POST")
    assert b'filename="same.jpg"' in posted.content
    assert b"\r\ntwo\r\n" in posted.content
    assert len(sent.accepted) == 2


async def test_a_batch_that_takes_nothing_more_ends_the_sending(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"a")

    async with Server(refused(409, "batch_sealed")).api() as api:
        with pytest.raises(Refused, match="batch_sealed"):
            await send(api, BATCH, [file])


async def test_a_file_that_vanished_is_rejected_and_the_others_go_on(tmp_path: Path) -> None:
    here, gone = tmp_path / "here.jpg", tmp_path / "gone.jpg"
    here.write_bytes(b"here")

    async with Server(ok(BATCH)).api() as api:
        sent = await send(api, BATCH, [here, gone])

    assert (len(sent.accepted), [one["code"] for one in sent.rejected]) == (1, ["unreadable"])


def test_everything_that_is_no_file_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"a")

    with pytest.raises(WrongUse) as caught:
        check_files([file, tmp_path, tmp_path / "missing.jpg"])

    assert f"{tmp_path} is a folder" in str(caught.value)
    assert "missing.jpg cannot be read: No such file or directory" in str(caught.value)
    assert "a.jpg" not in str(caught.value)
