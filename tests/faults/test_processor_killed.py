"""The processor is killed in mid batch and started again: the batch finishes with right counts, seen by who watches."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.auth import make_token
from services.cli.board import Board
from services.cli.client import Api
from services.cli.connection import Connection
from services.cli.parts import Service
from services.cli.sending import send
from services.cli.watching import follow
from services.embedded.folders import FolderLock, free_ports, lock_folder
from tests.e2e.slow import slow_pictures

SECRET = "a secret for tests that is long enough"
FILES = 14
DONE_BEFORE_KILL = 3


class Cluster:
    """The three services on servers of the tests', each a process that can be killed and started again."""

    def __init__(self, *, folder: Path, lock: FolderLock, settings: dict[str, str]) -> None:
        self._folder = folder
        self._lock = lock
        self._ports = dict(zip(("api", "notifier", "processor"), free_ports(3), strict=True))
        ports = {f"SLUICE_{name.upper()}_PORT": str(port) for name, port in self._ports.items()}
        self._environment = {**settings, **ports, "SLUICE_JWT_SECRET": SECRET, "SLUICE_BLOB_URL": folder.as_uri()}
        self.here = Connection(self._url("api"), make_token("ada", SECRET, ttl_s=600))

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    @contextlib.asynccontextmanager
    async def running(self, *names: str) -> AsyncIterator[list[Service]]:
        """These services, ready, in this order."""
        async with contextlib.AsyncExitStack() as stack, httpx.AsyncClient(trust_env=False) as http:
            started = []
            for name in names:
                service = await Service.start(
                    name,
                    url=self._url(name),
                    log_file=self._folder / f"{name}.log",
                    lock=self._lock,
                    environment=self._environment,
                    grace_s=15,
                )
                stack.push_async_callback(service.process.stop)
                started.append(service)
            async with asyncio.TaskGroup() as waiting:
                for service in started:
                    waiting.create_task(service.ready(http))
            yield started


@pytest.fixture
async def cluster(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    lock = await lock_folder(tmp_path)
    settings = {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "SLUICE_DATABASE_URL": database_url,
        "SLUICE_LOG_TOPIC": f"{unique}.events",
        "SLUICE_PROGRESS_TOPIC": f"{unique}.progress",
    }
    yield Cluster(folder=tmp_path, lock=lock, settings=settings)
    lock.release()


class Watcher:
    """Shows nothing and remembers: which messages came, how many files are done, and when they are enough."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.done = 0
        self.enough_done = asyncio.Event()

    def update(self, board: Board, message: dict[str, Any]) -> None:
        self.types.append(message["type"])
        self.done = board.done
        if board.done >= DONE_BEFORE_KILL:
            self.enough_done.set()

    def note(self, text: str) -> None: ...


async def test_a_killed_processor_that_comes_back_finishes_the_batch_with_right_counts(
    cluster: Cluster, tmp_path: Path
) -> None:
    files = slow_pictures(tmp_path, FILES)
    async with cluster.running("api", "notifier"), Api.open(cluster.here) as api, asyncio.timeout(100):
        # Given a batch that is watched and of which some files are done.
        batch = await api.create_batch(name="interrupted")
        watcher = Watcher()
        watching = asyncio.create_task(
            follow(api, token=cluster.here.token, batch_id=batch["id"], shown=watcher)  # type: ignore[arg-type]
        )
        async with cluster.running("processor") as (processor,):
            await send(api, batch, files)
            await watcher.enough_done.wait()

            # When the processor is killed in the middle of a file, and another one started.
            processor.process._kill()
            await processor.wait()
            done_before = watcher.done
        async with cluster.running("processor"):
            board = await watching
            after = await api.batch(batch["id"], min_position=board.position)
            uploads = await api.uploads(batch["id"], min_position=board.position)

    # Then every file succeeded once, and whoever watched saw it without a gap.
    assert DONE_BEFORE_KILL <= done_before < FILES
    assert after["status"] == "completed"
    assert (after["total_uploads"], after["processed_uploads"], after["successful_uploads"]) == (FILES, FILES, FILES)
    assert [upload["status"] for upload in uploads] == ["completed"] * FILES
    assert sorted(upload["attempts"] for upload in uploads) == [1] * (FILES - 1) + [2]
    assert (board.done, board.counts["successful_uploads"]) == (FILES, FILES)
    assert "lost" not in watcher.types
