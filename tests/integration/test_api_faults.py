"""The api while a part of it is away: it says so at once, does what it can, and is whole again by itself."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest

from services.embedded import EmbeddedKafka, EmbeddedPostgres
from tests.integration.api_client import (
    Person,
    RunningApi,
    a_picture,
    answered,
    answered_with,
    api_settings,
    code_of,
    ended,
    processor_beside,
    running_api,
)
from tests.notifiers import until
from tests.pausing import paused
from tests.rebuilds import a_ground

MIB = 1024 * 1024
DATABASE_AWAY = re.compile("Postgres has not answered|the database cannot be reached")
LOG_LIMITS = {"tail_lag_max_s": 2, "read_back_timeout_s": 10}
"""The defaults: a log that is away is noticed after so long. What is sent before it goes away is sent until it is
taken, since a machine that stands still looks the same."""


def assert_nothing_of_our_insides(*answers: httpx.Response, of: str) -> None:
    """No address, no repr of an exception: what a stranger has no use for and we might not want to tell."""
    for answer in answers:
        assert of not in answer.text
        assert not re.search(r"Error|AddressFamily|\w\(|127\.0\.0\.1|/tmp", answer.text), answer.text


async def health(api: RunningApi) -> httpx.Response:
    async with httpx.AsyncClient(base_url=api.url, trust_env=False, timeout=30) as anyone:
        return await anyone.get("/readyz")


def among(reasons: list[str], *either: str) -> bool:
    """Whether one of these is said; a machine that stands still may have other things said beside it."""
    return any(each in reason for reason in reasons for each in either)


@pytest.fixture
async def own_kafka(tmp_path: Path) -> AsyncIterator[EmbeddedKafka]:
    async with EmbeddedKafka(data_dir=tmp_path / "kafka") as server:
        yield server


async def test_while_kafka_hangs_writes_are_refused_or_unknown_and_reads_go_on(
    own_kafka: EmbeddedKafka, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=own_kafka.bootstrap_servers,
        database_url=database_url,
        unique=unique,
        blobs=tmp_path / "blobs",
        read_back_timeout_s=1.5,
        tail_lag_max_s=5,
    )
    async with running_api(settings) as api:
        ada = await api.person("ada")
        first, files = {"a.jpg": a_picture()}, {"b.jpg": a_picture()}
        known = (await answered(lambda: ada.send("/v1/batches", first, key="first"), 202)).json()
        blobs_before = api.blobs
        await api.tail.caught_up()

        with paused(own_kafka.pid):
            in_flight = await ada.send("/v1/batches", files, key="k")
            blobs_in_flight = api.blobs
            refused = await answered(lambda: ada.post("/v1/batches", json={}), "log_unavailable")
            read = await ada.get(f"/v1/batches/{known['batch']['id']}")
            unready = await answered(lambda: health(api), 503)
            status = (await ada.get("/v1/status")).json()
        back = await answered(lambda: ada.send("/v1/batches", files, key="k"), 202)
        ready = await answered(lambda: health(api), 200)

        assert (in_flight.status_code, code_of(in_flight)) == (503, "outcome_unknown")
        assert len(blobs_in_flight) == len(blobs_before) + 1
        assert refused.status_code == 503
        assert read.json() == known["batch"]
        assert unready.json()["problems"]
        assert_nothing_of_our_insides(unready, refused, of=own_kafka.bootstrap_servers)
        assert (status["mode"], len(status["degraded"]) > 0) == ("degraded", True)
        assert back.json()["batch"]["total_uploads"] == 1
        assert ready.json()["problems"] == []


async def test_a_kafka_that_was_stopped_is_found_again(
    database_url: str, unique: str, tmp_path: Path, data_dir: Path
) -> None:
    kafka = EmbeddedKafka(data_dir=data_dir)
    await kafka.start()
    settings = api_settings(
        kafka=kafka.bootstrap_servers, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", **LOG_LIMITS
    )
    try:
        async with running_api(settings) as api, processor_beside(settings):
            ada = await api.person("ada")
            files = {"a.jpg": a_picture()}
            known = (await answered(lambda: ada.send("/v1/batches", files, key="k"), 202)).json()["batch"]["id"]
            done = await ended(ada, known)
            await answered(lambda: ada.get("/v1/batches", min_position=done["position"]), 200)
            port = kafka.port

            await kafka.stop()
            refused = await answered(lambda: ada.post("/v1/batches", json={}), "log_unavailable")
            status = await answered_with(
                lambda: ada.get("/v1/status"), lambda body: among(body["degraded"], "the log cannot be", "the log was")
            )
            read = [await ada.get(path) for path in ("/v1/batches", f"/v1/batches/{known}")]
            uploads = await ada.get(f"/v1/batches/{known}/uploads")
            past = await ada.get(f"/v1/batches/{known}/events")
            unready = await answered(lambda: health(api), lambda body: among(body["problems"], "Kafka"))
            kafka = EmbeddedKafka(data_dir=data_dir, port=port)
            await kafka.start()
            made = await answered(lambda: ada.post("/v1/batches", json={}), 201)
            full = await answered_with(lambda: ada.get("/v1/status"), lambda body: body["mode"] == "full")

            assert int(refused.headers["Retry-After"]) > 0
            assert status["mode"] == "degraded"
            assert [answer.status_code for answer in read] == [200, 200]
            assert (read[0].json()["items"], read[1].json()) == ([done], done)
            assert uploads.json()["items"][0]["status"] == "failed"
            assert (past.status_code, code_of(past)) == (503, "log_unavailable")
            assert unready.status_code == 503
            assert_nothing_of_our_insides(unready, refused, past, of=kafka.bootstrap_servers)
            assert made.json()["id"] != known
            assert full["degraded"] == []
    finally:
        await kafka.stop()


async def test_while_postgres_hangs_what_the_tail_knows_goes_on(
    kafka: str, unique: str, tmp_path: Path, data_dir: Path
) -> None:
    async with EmbeddedPostgres(data_dir=data_dir) as postgres:
        settings = api_settings(kafka=kafka, database_url=postgres.url, unique=unique, blobs=tmp_path / "blobs")
        async with running_api(settings) as api:
            ada = await api.person("ada")
            open_batch = await ada.opens_batch()

            with contextlib.ExitStack() as hanging:
                hanging.enter_context(paused(postgres.pid))  # first, so that it starts no others
                for process in psutil.Process(postgres.pid).children(recursive=True):
                    with contextlib.suppress(ProcessLookupError):
                        hanging.enter_context(paused(process.pid))
                made = await ada.send("/v1/batches", {"a.jpg": a_picture()})
                added = await ada.put(open_batch, "a.jpg", a_picture())
                read = await ada.get(f"/v1/batches/{open_batch}")
                status = await answered_with(
                    lambda: ada.get("/v1/status"), lambda body: bool(DATABASE_AWAY.search(" ".join(body["degraded"])))
                )
                listed = await answered(lambda: ada.get("/v1/batches"), "database_unavailable")
            back = await answered_with(
                lambda: ada.get("/v1/status"), lambda body: not DATABASE_AWAY.search(" ".join(body["degraded"]))
            )
            found = await ada.get(f"/v1/batches/{made.json()['batch']['id']}")

            assert (made.status_code, added.status_code, read.json()["total_uploads"]) == (202, 202, 1)
            assert status["mode"] == "degraded"
            assert listed.status_code == 503
            assert back["oldest_unfinished_s"] > 0  # nothing is projected here
            assert found.json() == made.json()["batch"]


async def test_that_no_processor_works_is_said_while_everything_else_goes_on(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs")
    async with running_api(settings) as api:
        ada = await api.person("ada")
        made = await ada.send("/v1/batches", {"a.jpg": a_picture()})

        said = await answered_with(
            lambda: ada.get("/v1/status"), lambda body: among(body["degraded"], "no processor works")
        )
        ready = await answered(lambda: health(api), 200)
        async with processor_beside(settings):
            full = await answered_with(lambda: ada.get("/v1/status"), lambda body: body["mode"] == "full")
            await ended(ada, made.json()["batch"]["id"])

        assert (said["mode"], said["lag"] > 0) == ("degraded", True)
        assert ready.status_code == 200
        assert full["degraded"] == []


async def test_while_postgres_is_away_what_the_tail_knows_goes_on(
    kafka: str, unique: str, tmp_path: Path, data_dir: Path
) -> None:
    postgres = EmbeddedPostgres(data_dir=data_dir)
    await postgres.start()
    settings = api_settings(kafka=kafka, database_url=postgres.url, unique=unique, blobs=tmp_path / "blobs")
    async with running_api(settings) as api:
        ada = await api.person("ada")
        open_batch = await ada.opens_batch()
        port = postgres.port

        await postgres.stop()
        without_key = await ada.send("/v1/batches", {"a.jpg": a_picture()})
        with_key = await ada.send("/v1/batches", {"a.jpg": a_picture()}, key="k")
        more = await ada.put(open_batch, "a.jpg", a_picture())
        read = await ada.get(f"/v1/batches/{open_batch}")
        listed = await ada.get("/v1/batches")
        unready = await answered(lambda: health(api), lambda body: among(body["problems"], "database"))

        postgres = EmbeddedPostgres(data_dir=data_dir, port=port)
        await postgres.start()
        await answered(lambda: ada.get("/v1/batches"), 200)
        await answered(lambda: health(api), 200)
        now_with_key = await ada.send("/v1/batches", {"a.jpg": a_picture()}, key="k")

        assert without_key.status_code == 202
        assert (with_key.status_code, code_of(with_key)) == (503, "database_unavailable")
        assert more.status_code == 202
        assert read.json()["total_uploads"] == 1
        assert (listed.status_code, code_of(listed)) == (503, "database_unavailable")
        assert unready.status_code == 503
        assert now_with_key.status_code == 202
        assert len(api.blobs) == 3
    await postgres.stop()


async def test_a_blob_store_that_cannot_be_written_is_said(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs")
    async with running_api(settings) as api:
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()
        # With whatever the api writes there at this moment, to see whether it can.
        settings.blob_folder.rename(tmp_path / "moved away")

        settings.blob_folder.write_text("in the way")
        refused = await ada.put(batch_id, "a.jpg", a_picture())
        unready = await answered(lambda: health(api), 503)
        settings.blob_folder.unlink()
        settings.blob_folder.mkdir()
        taken = await ada.put(batch_id, "a.jpg", a_picture())

        assert (refused.status_code, code_of(refused)) == (503, "storage_unavailable")
        assert unready.json()["problems"]
        assert taken.status_code == 202


async def test_a_log_that_is_not_read_refuses_before_the_bytes(
    own_kafka: EmbeddedKafka, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=own_kafka.bootstrap_servers,
        database_url=database_url,
        unique=unique,
        blobs=tmp_path / "blobs",
        read_back_timeout_s=1,
        tail_lag_max_s=2,
    )
    async with running_api(settings) as api:
        ada = await api.person("ada")
        batch_id = (await answered(lambda: ada.post("/v1/batches", json={}), 201)).json()["id"]
        with paused(own_kafka.pid):
            await answered(lambda: ada.post(f"/v1/batches/{batch_id}/cancel"), "log_unavailable")

            sent = await _bytes_sent_before_the_answer(ada, f"/v1/batches/{batch_id}/uploads/a.jpg")

        assert sent == (503, 0)


async def _bytes_sent_before_the_answer(person: Person, path: str) -> tuple[int, int]:
    """Ask with `Expect: 100-continue`, as curl does for large files; the status, and the body's bytes asked for."""
    url = person.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"PUT {path} HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: {person.http.headers['authorization']}\r\n"
        "Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
    )
    writer.write(head.encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status, 0 if status != 100 else 1_000_000


@pytest.mark.parametrize("how", ["put", "form"])
async def test_what_comes_while_the_read_models_are_rebuilt_is_kept(
    kafka: str, database_url: str, unique: str, tmp_path: Path, how: str
) -> None:
    settings = api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs")
    picture = a_picture(4 * MIB)
    half_sent, rebuilt = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        if how == "form":
            yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        yield picture[: 2 * MIB]
        half_sent.set()
        await rebuilt.wait()
        yield picture[2 * MIB :]
        if how == "form":
            yield b"\r\n--x--\r\n"

    async with (
        running_api(settings) as api,
        a_ground(kafka=kafka, database_url=database_url, topic=settings.log_topic) as ground,
    ):
        # Given a file of which half has come
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()
        await ground.project()
        url = f"/v1/batches/{batch_id}/uploads"
        if how == "put":
            sending = asyncio.create_task(ada.http.put(f"{url}/a.jpg", content=body()))
        else:
            kind = {"Content-Type": "multipart/form-data; boundary=x"}
            sending = asyncio.create_task(ada.http.post(url, content=body(), headers=kind))
        await half_sent.wait()
        await until(lambda: len(api.blobs) == 1)

        # When other read models take the place of those its batch was loaded from
        await ground.replay()
        live = await ground.live()
        await until(lambda: api.tail._generation == live)
        rebuilt.set()
        answer = await sending

        # Then it is accepted, and its bytes are there
        assert answer.status_code == 202, answer.text
        upload = answer.json() if how == "put" else answer.json()["accepted"][0]
        assert (await ada.get(f"/v1/uploads/{upload['id']}/content")).content == picture
