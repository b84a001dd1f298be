"""The commit before this one beside this one, on one log and one database, as in the middle of a deployment."""

import asyncio
import contextlib
import io
import os
import shutil
import sys
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest

from services.auth import make_token
from services.cli.client import Api
from services.cli.connection import Connection
from services.cli.display import Silence
from services.cli.watching import send_and_follow
from services.database import Database
from services.embedded.folders import free_ports
from services.eventlog import EventLog, LogSettings
from services.processor.verifying import Verification
from services.settings import Settings
from tests.integration.api_client import SECRET, api_settings, environment_of
from tests.lanes import PICTURES

THIS = Path(__file__).parents[3]
NAMES = ("notifier", "processor", "api")
READY_S = 60
pytestmark = pytest.mark.timeout(300)  # many processes start and end, which takes its time on a busy machine
FILES = [PICTURES / name for name in ("cat.png", "coffee.webp", "broken-download.jpg")]


@pytest.fixture
async def before(tmp_path: Path) -> Path:
    """The tree of the commit before this one."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git here to get the commit before this one from")
    asking = await asyncio.create_subprocess_exec(
        *(git, "-C", THIS, "archive", "HEAD~1"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    archive, said = await asking.communicate()
    if asking.returncode:
        pytest.skip(f"the commit before this one is not here: {said.decode().strip()}")
    folder = tmp_path / "before"
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


@contextlib.asynccontextmanager
async def running(settings: Settings, trees: Mapping[str, Path]) -> AsyncIterator[None]:
    """The three services, ready, each from its tree."""
    environment = {**os.environ, **environment_of(settings)}
    async with contextlib.AsyncExitStack() as stack:
        for name in NAMES:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"services.{name}"),
                cwd=trees[name],
                env={**environment, "PYTHONPATH": str(trees[name])},
            )
            stack.push_async_callback(_ended, process)
        async with asyncio.timeout(READY_S), httpx.AsyncClient(trust_env=False) as http:
            for name in NAMES:
                await _ready(http, f"http://127.0.0.1:{getattr(settings, f'{name}_port')}/readyz")
        yield


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    assert await asyncio.wait_for(process.wait(), READY_S) == 0


async def _ready(http: httpx.AsyncClient, url: str) -> None:
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await http.get(url)).is_success:
                return
        await asyncio.sleep(0.1)


async def test_services_of_this_commit_and_of_the_one_before_work_together(
    kafka: str, database_url: str, unique: str, tmp_path: Path, before: Path
) -> None:
    api_port, notifier_port, processor_port = free_ports(3)
    settings = api_settings(
        kafka=kafka,
        database_url=database_url,
        unique=unique,
        blobs=tmp_path / "blobs",
        api_port=api_port,
        notifier_port=notifier_port,
        processor_port=processor_port,
    )
    here = Connection(f"http://127.0.0.1:{api_port}", make_token("ada", SECRET, ttl_s=600))

    for old in ({"processor", "notifier"}, {"api"}, {"notifier", "api"}, set(NAMES), set[str]()):
        async with running(settings, {name: before if name in old else THIS for name in NAMES}), Api.open(here) as api:
            batch = await api.create_batch(name="side by side")
            sent, board = await send_and_follow(api, batch, token=here.token, files=FILES, shown=Silence())
            found = await api.batch(batch["id"], min_position=board.position)

        assert len(sent.accepted) == len(FILES)
        assert (found["successful_uploads"], found["failed_uploads"], found["status"]) == (2, 1, "completed")

    log_settings = LogSettings(
        bootstrap_servers=kafka, topic=settings.log_topic, progress_topic=settings.progress_topic
    )
    async with EventLog.open(log_settings) as log:
        identity = await log.ensure_created(partitions=1, source="test")
        database = await Database.open(database_url)
        verification = Verification(log=log, log_id=identity.log_id, database=database, on_step=lambda _step: None)
        verified = await verification.run()
        await database.close()
    assert verified.shown == []
    assert verified.rows["uploads"] == 5 * len(FILES)
