"""Files in a bucket of a real S3 API: the whole pipeline, the bucket away and back, and what only a bucket can do."""

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from services.blobs import BlobMissing, Intake, Room, S3Blobs, StorageUnavailable
from services.blobs.intake import FLUSH_BYTES
from services.cli.ailments_here import blob_folder
from services.cli.checkup import Ailing, Patient
from services.database import Database
from services.embedded.folders import free_ports
from services.eventlog import EventLog, LogSettings
from services.lifecycle import StartError
from services.opening import open_blobs
from services.settings import Settings
from services.sweeping import Report, Sweeper
from tests.buckets import BUCKET, S3, a_bucket
from tests.examples import UPLOAD
from tests.integration.api_client import api_settings, code_of, ended, processor_beside, running_api
from tests.lanes import PICTURES
from tests.unit.test_blobs import JPEG

AWAY_TIMEOUT_S = 60
FETCH_TIMEOUT_S = 25
"""Less than a request that is never answered takes."""
LARGE_BYTES = 100_000_000
GROWTH_BYTES_MAX = 50_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with a_bucket() as found:
        yield found


@pytest.fixture
async def s3(server: S3, unique: str) -> S3:
    return S3(server.port, f"{unique}/blobs", server.server)


@pytest.fixture
async def store(s3: S3) -> AsyncIterator[S3Blobs]:
    async with S3Blobs.open(BUCKET, prefix=s3.prefix) as opened:
        yield opened


def settings_on(s3: S3, *, kafka: str, database_url: str, unique: str) -> Settings:
    return api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=Path("/unused"), blob_url=s3.url)


async def swept(settings: Settings, **changes: float) -> Report:
    options = {"age_s": -1.0, "trash_s": 3_600.0} | changes
    log_settings = LogSettings(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        topic=settings.log_topic,
        progress_topic=settings.progress_topic,
    )
    async with EventLog.open(log_settings) as log, open_blobs(settings) as blobs:
        database = await Database.open(settings.database_url.get_secret_value(), pool_max=2)
        sweeper = Sweeper(
            log=log, database=database, store=blobs, dry_run=False, contents=True, on_step=lambda _: None, **options
        )
        try:
            return await sweeper.run()
        finally:
            await database.close()


async def test_a_file_goes_through_the_whole_pipeline(s3: S3, kafka: str, database_url: str, unique: str) -> None:
    settings = settings_on(s3, kafka=kafka, database_url=database_url, unique=unique)
    cat, broken = (PICTURES / "cat.png").read_bytes(), (PICTURES / "broken-download.jpg").read_bytes()
    async with running_api(settings) as api, processor_beside(settings):
        ada = await api.person("ada")
        answer = await ada.send("/v1/batches", {"cat.png": cat, "broken.jpg": broken, "notes.txt": b"no picture"})
        batch = await ended(ada, answer.json()["batch"]["id"])
        upload = next(each for each in answer.json()["accepted"] if each["filename"] == "cat.png")
        path = f"/v1/uploads/{upload['id']}"
        content, part, thumbnail, again = [
            await ada.http.get(f"{path}/{what}", headers=headers)
            for what, headers in [
                ("content", {}),
                ("content", {"Range": "bytes=100-199"}),
                ("thumbnail", {}),
                ("content", {"If-None-Match": f'"{hashlib.sha256(cat).hexdigest()}"'}),
            ]
        ]
        left_over = f"{UPLOAD}/abandoned"
        s3.put(left_over, b"left over")
        wanted = s3.names() - {left_over}
        report = await swept(settings)
        after = s3.names()
        lost = next(name for name in wanted if name.startswith(upload["id"]))
        s3.client.delete_object(Bucket=BUCKET, Key=f"{s3.prefix}/{lost}")
        second = await swept(settings, trash_s=-5.0)
        gone = await ada.http.delete(f"/v1/batches/{batch['id']}")
        async with asyncio.timeout(AWAY_TIMEOUT_S):
            while s3.names():  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.1)

    assert [each["code"] for each in answer.json()["rejected"]] == ["unsupported_media_type"]
    assert (batch["status"], batch["successful_uploads"], batch["failed_uploads"]) == ("completed", 1, 1)
    assert (content.content, content.headers["etag"]) == (cat, f'"{upload["sha256"]}"')
    assert content.headers["x-content-type-options"] == "nosniff"
    assert (part.status_code, part.content) == (206, cat[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(cat)}"
    assert (thumbnail.content[:3], again.status_code) == (b"\xff\xd8\xff", 304)
    assert (report.discarded, report.faults, report.uploads) == ([left_over], [], 2)
    assert {name for name in after if not name.startswith("trash/")} == wanted
    assert [fault.problem for fault in second.faults] == ["missing"]
    assert second.emptied == 1
    assert gone.status_code == 204


async def test_a_bucket_that_is_away_is_told_and_all_goes_on_when_it_is_back(
    server: S3, s3: S3, kafka: str, database_url: str, unique: str
) -> None:
    settings = settings_on(s3, kafka=kafka, database_url=database_url, unique=unique)
    cat = (PICTURES / "cat.png").read_bytes()
    async with running_api(settings) as api, processor_beside(settings):
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()
        before = await ada.put(batch_id, "before.png", cat)
        await until_upload(ada.http, before.json()["id"], "completed")
        await until_status(ada.http, "full")
        server.end()
        try:
            refused = await ada.put(batch_id, "meanwhile.png", cat)
            unread = await ada.http.get(f"/v1/uploads/{before.json()['id']}/content")
            await until_status(ada.http, "degraded", because="blob store")
            unready = await ada.http.get("/readyz")
        finally:
            server.begin()
        whole = await until_status(ada.http, "full")
        taken = await ada.put(batch_id, "meanwhile.png", cat)
        await ada.post(f"/v1/batches/{batch_id}/seal")
        batch = await ended(ada, batch_id)

    assert (refused.status_code, code_of(refused)) == (503, "storage_unavailable")
    assert (unread.status_code, code_of(unread)) == (503, "storage_unavailable")
    assert unready.status_code == 503
    assert (whole["degraded"], taken.status_code) == ([], 202)
    assert (batch["status"], batch["successful_uploads"]) == ("completed", 2)


async def until_upload(http: httpx.AsyncClient, upload_id: str, status: str) -> None:
    """Return once the upload is in this status; fails after a while."""
    async with asyncio.timeout(AWAY_TIMEOUT_S):
        while (await http.get(f"/v1/uploads/{upload_id}")).json()["status"] != status:  # noqa: ASYNC110  # asked over HTTP
            await asyncio.sleep(0.05)


async def until_status(http: httpx.AsyncClient, mode: str, *, because: str = "") -> dict[str, list[str]]:
    """What /v1/status says once it is in this mode, for a reason with these words; fails after a while."""
    async with asyncio.timeout(AWAY_TIMEOUT_S):
        while True:
            status: dict[str, list[str]] = (await http.get("/v1/status")).json()
            if status["mode"] == mode and (not because or any(because in each for each in status["degraded"])):
                return status
            await asyncio.sleep(0.1)


async def test_a_file_whose_bucket_goes_away_in_mid_upload_is_refused_and_leaves_nothing(
    server: S3, s3: S3, store: S3Blobs
) -> None:
    with pytest.raises(StorageUnavailable, match="cannot be reached"):  # noqa: PT012  # it must come out of the block
        async with Intake(store, Room(10**9, 1, 10**9)) as intake:
            incoming = intake.begin(UPLOAD)
            await intake.write(incoming, JPEG)
            for number in range(40):
                await intake.write(incoming, bytes(1_000_000))
                if number == 12:
                    server.end()
    server.begin()

    assert s3.names() == set()
    with pytest.raises(BlobMissing):
        async with store.reading(incoming.blob):
            pass
    await store.check()


async def test_what_has_to_be_moved_in_pieces_is_moved_whole(
    s3: S3, store: S3Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.blobs.s3_shelf.COPY_BYTES_MAX", 1_000)
    content = bytes(range(256)) * 20_000
    s3.put(f"{UPLOAD}/large", content)

    await store.shelf().discard(f"{UPLOAD}/large", sweep_s=1)

    assert s3.names() == {f"trash/1/{UPLOAD}/large"}
    assert s3.content(f"trash/1/{UPLOAD}/large") == content


async def test_a_store_that_just_answered_is_not_asked_again(
    server: S3, store: S3Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.blobs.s3.CHECK_INTERVAL_S", 3_600.0)
    server.end()
    try:
        await store.check()
        monkeypatch.setattr("services.blobs.s3.CHECK_INTERVAL_S", 0.0)
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            await store.check()
    finally:
        server.begin()
    monkeypatch.undo()
    await store.check()


async def test_a_bucket_that_is_missing_or_unreachable_stops_the_start_with_a_sentence(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Settings(blob_url="s3://no-such-bucket/x")
    with pytest.raises(StartError, match=r"SLUICE_BLOB_URL: s3://no-such-bucket/x at .*NoSuchBucket.*make the bucket"):
        async with open_blobs(missing):
            pass
    with pytest.raises(Ailing, match="NoSuchBucket") as ailing:
        await blob_folder(Patient(Path(), missing, {}, frozenset()))
    assert ailing.value.mend == "make the bucket, or name another in SLUICE_BLOB_URL"
    assert "deleting work there" in await blob_folder(Patient(Path(), Settings(blob_url=s3.url), {}, frozenset()))

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StartError, match=r"cannot be reached .*check AWS_ENDPOINT_URL"):
        async with open_blobs(Settings(blob_url=s3.url)):
            pass


async def test_a_bucket_that_forbids_stops_the_start_and_no_key_is_repeated(s3: S3) -> None:
    reset = f"{s3.environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    async with httpx.AsyncClient(timeout=AWAY_TIMEOUT_S, trust_env=False) as http:
        await http.post(reset, content=b"0")  # from now on it wants credentials that it knows
        try:
            with pytest.raises(StartError, match=r"403 Forbidden InvalidAccessKeyId.*AWS_ACCESS_KEY_ID") as refused:
                async with open_blobs(Settings(blob_url=s3.url)):
                    pass
        finally:
            await http.post(reset, content=b"inf")

    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in str(refused.value)


GROWING = """
import asyncio, sys
import psutil
from services.blobs import Intake, Room, S3Blobs

async def main(bucket, prefix, size):
    peak = 0
    def look():
        nonlocal peak
        peak = max(peak, psutil.Process().memory_info().rss)
    async with S3Blobs.open(bucket, prefix=prefix) as store:
        async def send(size):
            async with Intake(store, Room(10**9, 1, 10**9)) as intake:
                incoming = intake.begin("{upload}")
                await intake.write(incoming, {head!r})
                for _ in range(size // 1_000_000):
                    await intake.write(incoming, bytes(1_000_000))
                    look()
                await intake.end(incoming)
                await intake.flush()
                intake.keep()
                return incoming.blob
        await send(1_000_000)
        before = peak
        name = await send(size)
        async with store.reading(name) as blob:
            read = 0
            async for chunk in blob.chunks(0, blob.size_bytes):
                read += len(chunk)
                look()
        print(read, peak - before)

asyncio.run(main(*sys.argv[1:3], int(sys.argv[3])))
"""


async def test_memory_stays_flat_whatever_the_size(s3: S3) -> None:
    script = GROWING.format(upload=UPLOAD, head=JPEG)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, BUCKET, s3.prefix, str(LARGE_BYTES)),
        env={**os.environ, **s3.environment},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    read, growth_bytes = map(int, out.split())
    assert read == LARGE_BYTES + len(JPEG)
    assert growth_bytes < GROWTH_BYTES_MAX


class Gate:
    """Holds requests that contain one of some words, until it is opened."""

    def __init__(self, *words: bytes) -> None:
        self.words = set(words)
        self.held = 0
        self._opened = asyncio.Event()

    async def pass_by(self, chunk: bytes) -> None:
        if any(word in chunk for word in self.words):
            self.held += 1
            await self._opened.wait()

    def open(self) -> None:
        self._opened.set()


@contextlib.asynccontextmanager
async def forwarder(port: int, gate: Gate) -> AsyncIterator[int]:
    """A way to the server, through the gate; its port."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: Gate) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                await gate.pass_by(chunk)
                writer.write(chunk)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, back, gate), pass_on(there, writer, Gate()))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1]
        gate.open()


async def test_a_file_that_is_cancelled_while_it_is_fetched_holds_up_nobody(
    s3: S3, kafka: str, database_url: str, unique: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_on(s3, kafka=kafka, database_url=database_url, unique=unique)
    cat = (PICTURES / "cat.png").read_bytes()
    gate = Gate()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with running_api(settings) as api, forwarder(s3.port, gate) as port:
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()
        upload = (await ada.put(batch_id, "held.png", cat)).json()
        gate.words.add(upload["id"].encode())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        async with processor_beside(settings):
            await until_upload(ada.http, upload["id"], "processing")

            await ada.post(f"/v1/batches/{batch_id}/cancel")
            next_one = await ada.send("/v1/batches", {"next.png": cat})
            batch = await asyncio.wait_for(ended(ada, next_one.json()["batch"]["id"]), FETCH_TIMEOUT_S)
            left_behind = [path.name for path in tmp_path.glob("sluice-work-*/*")]  # noqa: ASYNC240  # a few names

    assert (batch["status"], left_behind) == ("completed", [])


class Sending:
    """A file on its way into a store, a piece at a time; `pieces` that were taken so far."""

    def __init__(self, store: S3Blobs) -> None:
        self.store = store
        self.pieces = 0

    async def run(self, pieces: int, *, go_on: asyncio.Event | None = None) -> tuple[str, int]:
        """Send so many pieces, the last one not before it may; the blob's name and its size."""
        async with Intake(self.store, Room(10**9, 1, 10**9)) as intake:
            incoming = intake.begin(UPLOAD)
            await intake.write(incoming, JPEG)
            for number in range(pieces):
                if go_on is not None and number == pieces - 1:
                    await go_on.wait()
                await intake.write(incoming, bytes(FLUSH_BYTES))
                self.pieces += 1
            await intake.end(incoming)
            await intake.flush()
            intake.keep()
        return incoming.blob, incoming.size_bytes


async def test_so_many_parts_of_large_files_are_sent_at_a_time_and_small_files_do_not_wait_for_them(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(b"partNumber=")
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(forwarder(s3.port, gate))
        with monkeypatch.context() as changed:
            changed.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            changed.setattr("services.blobs.s3.PARTS_AT_ONCE", 2)
            store = await stack.enter_async_context(S3Blobs.open(BUCKET, prefix=s3.prefix))
        sendings = [Sending(store) for _ in range(5)]
        large = [asyncio.create_task(sending.run(12)) for sending in sendings]
        async with asyncio.timeout(AWAY_TIMEOUT_S):
            while gate.held < 2 or any(sending.pieces < 4 for sending in sendings):  # noqa: ASYNC110  # they tell nobody
                await asyncio.sleep(0.01)

        small = await asyncio.gather(*(Sending(store).run(1) for _ in range(5)))

        assert (gate.held, [sending.pieces for sending in sendings]) == (2, [4] * 5)
        gate.open()
        sent = [*small, *await asyncio.gather(*large)]

    assert {name: len(s3.content(name)) for name, _ in sent} == dict(sent)


async def test_who_sends_slowly_holds_up_nobody(store: S3Blobs, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_part_places", asyncio.Semaphore(1))
    slow, go_on = Sending(store), asyncio.Event()
    sending = asyncio.create_task(slow.run(9, go_on=go_on))
    async with asyncio.timeout(AWAY_TIMEOUT_S):
        while slow.pieces < 8:  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.01)

        name, size_bytes = await Sending(store).run(12)

    assert not sending.done()
    go_on.set()
    assert (len(s3.content(name)), len(s3.content((await sending)[0]))) == (size_bytes, 9 * FLUSH_BYTES + len(JPEG))
