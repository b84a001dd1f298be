"""The api as its own process: how it starts, stops, and how much memory a large file takes; and what all services have
in common, told to stop while they start.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest

from services.auth import make_token
from services.embedded.folders import free_ports
from tests.integration.api_client import JPEG, PATIENCE, SECRET, a_picture

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
STOP_SOON_S = 20
FILE_BYTES = 200_000_000
GROWTH_BYTES_MAX = 30_000_000


@contextlib.asynccontextmanager
async def api_process(
    environment: dict[str, str], *, module: str = "services.api"
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def environment(kafka: str, database_url: str, unique: str, tmp_path: Path) -> dict[str, str]:
    return {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "SLUICE_DATABASE_URL": database_url,
        "SLUICE_LOG_TOPIC": f"{unique}.events",
        "SLUICE_PROGRESS_TOPIC": f"{unique}.progress",
        "SLUICE_BLOB_URL": (tmp_path / "blobs").as_uri(),
        "SLUICE_JWT_SECRET": SECRET,
        "SLUICE_API_PORT": str(free_ports(1)[0]),
        "SLUICE_FILE_BYTES_MAX": str(FILE_BYTES),
        "SLUICE_STOP_TIMEOUT_S": str(STOP_TIMEOUT_S),
        **{f"SLUICE_{name.upper()}": str(value) for name, value in PATIENCE.items()},
    }


async def until_ready(process: asyncio.subprocess.Process) -> list[str]:
    """The log lines up to the one that says it is ready."""
    return await until_said(process, "api_ready")


async def until_said(process: asyncio.subprocess.Process, words: str) -> list[str]:
    """The log lines up to the one that says this."""
    lines = []
    async with asyncio.timeout(START_TIMEOUT_S):
        assert process.stderr is not None
        while line := (await process.stderr.readline()).decode():
            lines.append(line)
            if words in line:
                return lines
    raise AssertionError(f"it ended before it said {words}:\n" + "".join(lines))


def client(environment: dict[str, str]) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{environment['SLUICE_API_PORT']}",
        headers={"Authorization": f"Bearer {make_token('ada', SECRET, ttl_s=600)}"},
        trust_env=False,
        timeout=60,
    )


def scratch_folders(folder: Path) -> list[Path]:
    return list(folder.glob("sluice-work-*"))


async def until_nobody_listens(environment: dict[str, str]) -> None:
    async with asyncio.timeout(STOP_TIMEOUT_S / 2):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(environment["SLUICE_API_PORT"]))
                writer.close()
                await writer.wait_closed()
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # it stopped listening while we were in its queue
                continue


async def test_a_large_file_takes_no_more_memory_than_a_small_one(environment: dict[str, str]) -> None:
    async def large_file() -> AsyncIterator[bytes]:
        yield JPEG
        block = bytes(1_000_000)
        sent = len(JPEG)
        while sent < FILE_BYTES:
            sent += len(block)
            yield block[: FILE_BYTES - sent + len(block)]

    async with api_process(environment) as process, client(environment) as http:
        await until_ready(process)
        batch_id = (await http.post("/v1/batches", json={})).json()["id"]
        path = f"/v1/batches/{batch_id}/uploads"
        await http.put(f"{path}/small.jpg", content=a_picture(2_000_000))
        memory = psutil.Process(process.pid)
        before, peak, done = memory.memory_info().rss, 0, asyncio.Event()

        async def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, memory.memory_info().rss)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), 0.01)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            answer = await http.put(f"{path}/large.jpg", content=large_file())
            upload_id = answer.json()["id"]
            async with http.stream("GET", f"/v1/uploads/{upload_id}/content") as download:
                received = 0
                async for chunk in download.aiter_raw():
                    received += len(chunk)
            done.set()

        assert answer.status_code == 202, answer.text
        assert answer.json()["size_bytes"] == received == FILE_BYTES
        assert peak - before < GROWTH_BYTES_MAX


async def test_sigterm_lets_the_request_under_way_end(environment: dict[str, str]) -> None:
    told, go_on = asyncio.Event(), asyncio.Event()

    async def slow_file() -> AsyncIterator[bytes]:
        yield a_picture(2_000_000)
        told.set()
        await go_on.wait()
        yield bytes(1_000)

    async with api_process(environment) as process, client(environment) as http:
        await until_ready(process)
        batch_id = (await http.post("/v1/batches", json={})).json()["id"]

        under_way = asyncio.create_task(http.put(f"/v1/batches/{batch_id}/uploads/a.jpg", content=slow_file()))
        await told.wait()
        process.send_signal(signal.SIGTERM)
        await until_nobody_listens(environment)
        go_on.set()
        answer = await under_way
        code = await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)

        assert (answer.status_code, code) == (202, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("service", ["api", "processor", "notifier"])
async def test_a_stop_is_heard_while_a_part_is_waited_for(service: str, number: signal.Signals, tmp_path: Path) -> None:
    nobody, *own = free_ports(4)
    environment = {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{nobody}",
        "SLUICE_DATABASE_URL": f"postgresql://sluice@127.0.0.1:{nobody}/sluice",
        "SLUICE_BLOB_URL": (tmp_path / "blobs").as_uri(),
        "SLUICE_JWT_SECRET": SECRET,
        **{f"SLUICE_{name}_PORT": str(port) for name, port in zip(("API", "PROCESSOR", "NOTIFIER"), own, strict=True)},
        "TMPDIR": str(tmp_path),
    }

    async with api_process(environment, module=f"services.{service}") as process:
        await until_said(process, "waiting_for_part")
        process.send_signal(number)
        _, errors = await asyncio.wait_for(process.communicate(), STOP_SOON_S)

    assert process.returncode == 0
    assert "stopped_while_starting" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert scratch_folders(tmp_path) == []


async def test_what_is_missing_stops_the_start_with_a_line_each(environment: dict[str, str]) -> None:
    del environment["SLUICE_JWT_SECRET"], environment["SLUICE_BLOB_URL"]

    async with api_process(environment) as process:
        _, errors = await process.communicate()

    assert process.returncode == 2
    assert [line.partition(" ")[0] for line in errors.decode().splitlines()] == [
        "SLUICE_JWT_SECRET",
        "SLUICE_BLOB_URL",
    ]


async def test_a_blob_folder_that_cannot_be_made_stops_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    environment["SLUICE_BLOB_URL"] = (tmp_path / "file" / "blobs").as_uri()

    async with api_process(environment) as process:
        _, errors = await process.communicate()

    assert process.returncode == 1
    assert "SLUICE_BLOB_URL" in errors.decode()
    assert "Traceback" not in errors.decode()
