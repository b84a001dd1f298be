"""Server-sent events, and which web pages may connect: real HTTP, on real Kafka and Postgres."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from websockets.exceptions import InvalidStatus

from schemas.position import Position
from services.notifier import streams
from services.notifier.main import notifying
from tests.examples import (
    BATCH,
    OTHER_USER,
    RESULT,
    a_batch_created,
    an_id,
    an_upload_progressed,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
)
from tests.notifiers import SOON_S, Scene, a_token, end_tokens_of_an_hour, types_of, until


class Listener:
    """A client of a stream: its events, as dictionaries of their fields; comments have the field ""."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def hear(self) -> dict[str, str]:
        """The next event or comment."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(SOON_S):
            async for line in self._lines:
                if not line:
                    return fields
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
        raise EOFError

    async def hear_message(self) -> tuple[str | None, dict[str, Any]]:
        """The next message, and its id."""
        while "data" not in (fields := await self.hear()):
            pass
        return fields.get("id"), json.loads(fields["data"])

    async def ended(self) -> dict[str, Any]:
        """How the stream ends: the data of its last event."""
        while (fields := await self.hear()).get("event") != "close":
            pass
        with pytest.raises(EOFError):
            await self.hear()
        return json.loads(fields["data"])


@contextlib.asynccontextmanager
async def listening(scene: Scene, path: str = f"/batches/{BATCH}", **headers: str) -> AsyncIterator[Listener]:
    given = {"Authorization": f"Bearer {a_token()}", **{name.replace("_", "-"): text for name, text in headers.items()}}
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port}", timeout=SOON_S) as client,
        client.stream("GET", f"/v1/stream{path}", headers={name: text for name, text in given.items() if text}) as got,
    ):
        yield Listener(got)


async def test_a_stream_gives_the_batch_and_then_every_fact_under_its_position(scene: Scene) -> None:
    before = await scene.append(a_batch_created())
    async with listening(scene) as listener:
        first = await listener.hear()
        snapshot_id, snapshot = await listener.hear_message()
        await scene.append(an_upload_queued(), an_upload_started())
        heard = [await listener.hear_message() for _ in range(2)]
        progress = await hear_progress(scene, listener, percent=40)

    assert listener.response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert listener.response.headers["cache-control"] == "no-store"
    assert first == {"retry": "1000"}
    assert (snapshot_id, snapshot["type"], snapshot["batch"]["id"]) == (str(before), "subscribed", BATCH)
    assert types_of([message for _, message in heard]) == ["UploadQueued", "UploadStarted"]
    assert [event_id for event_id, _ in heard] == [message["position"] for _, message in heard]
    assert (progress[0], progress[1]["percent"]) == (None, 40)


async def hear_progress(scene: Scene, listener: Listener, *, percent: int) -> tuple[str | None, dict[str, Any]]:
    """Percentages of the upload in work, and the message with this one."""
    heard: list[tuple[str | None, dict[str, Any]]] = []

    async def hear() -> None:
        heard.append(await listener.hear_message())

    await scene.progress_arrives(an_upload_progressed(percent=percent), hear)
    return heard[-1]


async def test_a_stream_of_all_batches_tells_those_that_come_too(scene: Scene) -> None:
    async with listening(scene, "") as listener:
        _, snapshot = await listener.hear_message()
        await scene.append(a_batch_created(an_id("foreign"), user_id=OTHER_USER), a_batch_created())
        _, created = await listener.hear_message()

    assert (snapshot["user"], snapshot["batches"]) == (True, [])
    assert created["batch"]["id"] == BATCH


async def test_a_stream_cut_after_every_message_goes_on_at_its_last_event_id_without_gap_or_repetition(
    scene: Scene,
) -> None:
    await scene.append(a_batch_created())
    async with listening(scene) as listener:
        last_id, _ = await listener.hear_message()
    await scene.append(*(an_upload_queued(an_id(number)) for number in range(5)))

    offsets = []
    for path in [f"/batches/{BATCH}", ""] * 2 + [""]:
        async with listening(scene, path, last_event_id=str(last_id)) as listener:
            _, answer = await listener.hear_message()
            last_id, _ = await listener.hear_message()
        assert answer["recovered"] is True
        offsets.append(Position.parse(str(last_id)).offset(0))

    assert offsets == [3, 4, 5, 6, 7]


async def test_what_cannot_be_streamed_is_answered_with_a_problem(scene: Scene) -> None:
    await scene.append(a_batch_created())
    asked = {
        "no token": {"Authorization": ""},
        "a wrong one": {"Authorization": "Bearer no-token"},
        "another user's batch": {"Authorization": f"Bearer {a_token(OTHER_USER)}"},
        "a position that is none": {"last_event_id": "yesterday"},
    }
    answers = {}
    for name, headers in asked.items():
        async with listening(scene, **headers) as listener:
            body = json.loads(await listener.response.aread())
            assert listener.response.headers["content-type"] == "application/problem+json"
            answers[name] = (listener.response.status_code, body["code"])
    async with listening(scene, f"/batches/{BATCH}?access_token={a_token()}", Authorization="") as listener:
        in_the_url = listener.response.status_code

    assert answers == {
        "no token": (401, "unauthorized"),
        "a wrong one": (401, "unauthorized"),
        "another user's batch": (404, "not_found"),
        "a position that is none": (400, "invalid_position"),
    }
    assert in_the_url == 401
    await until(lambda: REGISTRY.get_sample_value("sluice_clients") == 0)


async def test_more_streams_than_a_user_may_have_are_refused_with_429(quiet: Scene) -> None:
    settings = quiet.settings.model_copy(update={"clients_per_user_max": 1})
    async with notifying(settings) as notifier:
        quiet.port = notifier.port
        async with listening(quiet, "") as first, listening(quiet, "") as second:
            await first.hear_message()
            refused = json.loads(await second.response.aread())

    assert (second.response.status_code, refused["code"]) == (429, "rate_limited")
    assert "Retry-After" in second.response.headers


async def test_comments_keep_a_silent_stream_alive(quiet: Scene) -> None:
    async with notifying(quiet.settings.model_copy(update={"heartbeat_s": 0.1})) as notifier:
        quiet.port = notifier.port
        async with listening(quiet, "") as listener:
            await listener.hear_message()
            comments = [await listener.hear() for _ in range(3)]

    assert comments == [{"": ""}] * 3


async def test_a_stream_ends_with_its_token_and_says_so(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    end_tokens_of_an_hour(monkeypatch)
    async with listening(scene, "", Authorization=f"Bearer {a_token(ttl_s=3600)}") as listener:
        ended = await listener.ended()

    assert ended["code"] == 4001
    assert "expired" in ended["reason"]


async def test_a_client_that_goes_is_forgotten(scene: Scene) -> None:
    async with listening(scene, "") as listener:
        await listener.hear_message()
        assert REGISTRY.get_sample_value("sluice_clients") == 1

    await until(lambda: REGISTRY.get_sample_value("sluice_clients") == 0)


async def test_a_restart_ends_streams_with_1012(quiet: Scene) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with notifying(quiet.settings) as notifier:
            quiet.port = notifier.port
            listener = await stack.enter_async_context(listening(quiet, ""))
            await listener.hear_message()
            ending = asyncio.create_task(listener.ended())
        ended = await ending

    assert ended["code"] == 1012


LARGE_UPLOADS = 400
"""So many results of 30 kB are more than the buffers of both ends and what may wait for a client together."""


@pytest.mark.parametrize("reads_in_the_end", [True, False])
async def test_a_client_that_does_not_read_its_stream_is_ended_and_the_others_go_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, *, reads_in_the_end: bool
) -> None:
    monkeypatch.setattr(streams, "CLOSE_TIMEOUT_S", 60.0 if reads_in_the_end else 0.1)
    await scene.append(a_batch_created())
    large = {**RESULT, "exif": {"Comment": "x" * 30_000}}
    request = f"GET /v1/stream/batches/{BATCH} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {a_token()}\r\n\r\n"
    async with scene.connected() as quick:
        await quick.subscribe()
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.port, limit=4_096)
        try:
            writer.write(request.encode())
            await reader.readuntil(b"subscribed")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            heard: list[dict[str, Any]] = []
            for number in range(LARGE_UPLOADS):
                upload_id = an_id("large", number)
                queued, started = an_upload_queued(upload_id), an_upload_started(upload_id)
                last = await scene.append(queued, started, an_upload_succeeded(upload_id, result=large))
                if number % 10 == 9:  # more at once might be more than may wait for the quick one, too
                    heard += await quick.hear_to(last)
            if reads_in_the_end:
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                async with asyncio.timeout(SOON_S):
                    rest = b""
                    while chunk := await reader.read(65_536):
                        rest = (rest + chunk)[-1_000:]
                assert b"event: close" in rest
                assert b'"code": 4008' in rest
                assert b"since=" in rest
            await until(lambda: REGISTRY.get_sample_value("sluice_clients") == 1)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    assert len(heard) == 3 * LARGE_UPLOADS


# Which pages may connect


async def preflight(scene: Scene, origin: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port}", timeout=SOON_S) as client:
        wish = {
            "Origin": origin,
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "authorization",
        }
        return await client.options("/v1/stream", headers=wish)


async def test_pages_of_the_same_host_may_stream_and_others_are_refused_in_the_preflight(scene: Scene) -> None:
    own = await preflight(scene, "http://localhost:8080")
    foreign = await preflight(scene, "https://evil.example")
    async with (
        listening(scene, "", Origin="http://127.0.0.1:8080") as from_own,
        listening(scene, "", Origin="https://evil.example") as from_foreign,
    ):
        granted = [each.response.headers.get("access-control-allow-origin") for each in (from_own, from_foreign)]

    assert own.status_code == 200
    assert own.headers["access-control-allow-origin"] == "http://localhost:8080"
    assert {"authorization", "last-event-id"} <= set(
        own.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    )
    assert (foreign.status_code, "access-control-allow-origin" in foreign.headers) == (403, False)
    assert granted == ["http://127.0.0.1:8080", None]
    assert from_own.response.headers["vary"] == "Origin"


async def test_a_problem_can_be_read_by_pages_that_may_connect(scene: Scene) -> None:
    async with listening(scene, "", Authorization="", Origin="http://localhost:3000") as listener:
        pass

    assert listener.response.status_code == 401
    assert listener.response.headers["access-control-allow-origin"] == "http://localhost:3000"


async def test_websockets_of_other_pages_are_refused_at_the_handshake(scene: Scene) -> None:
    async with scene.connected(origin="http://127.0.0.1:8080") as watcher:
        await watcher.silence()
    with pytest.raises(InvalidStatus) as refused:
        async with scene.connected(user=None, origin="https://evil.example"):
            pass

    assert refused.value.response.status_code == 403


async def test_origins_that_are_named_may_connect(quiet: Scene) -> None:
    settings = quiet.settings.model_copy(update={"allowed_origins": "https://ours.example"})
    async with notifying(settings) as notifier:
        quiet.port = notifier.port
        async with quiet.connected(origin="https://ours.example") as watcher:
            await watcher.silence()
        assert (await preflight(quiet, "https://ours.example")).status_code == 200
        assert (await preflight(quiet, "https://ours.example.evil.example")).status_code == 403
