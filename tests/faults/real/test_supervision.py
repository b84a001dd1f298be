"""`sluice up` keeps its parts running: each is killed while files are in work, then `up` itself; one hangs; a stop
comes in the middle of a restart. Nobody sends anything again, and what was accepted has one outcome each.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from services.cli import connection
from services.cli.board import Board
from services.cli.client import Api
from services.cli.connection import Connection, make_token
from services.cli.parts import Patience, Service
from services.cli.supervision import Supervisor
from services.cli.watching import Watch
from services.embedded.folders import free_ports, lock_folder
from tests.e2e.conftest import Sluice, Up, family_of, require_gone
from tests.e2e.slow import slow_pictures

PARTS = ("notifier", "processor", "kafka", "postgres", "api")
FILES = 20
BACK_WITHIN_S = 60
SECRET = "a secret for tests that is long enough"


@pytest.fixture
def sluice() -> Iterator[Sluice]:
    folder = Path(tempfile.mkdtemp(prefix="sluice-supervised-"))
    yield Sluice(folder / "data")
    shutil.rmtree(folder)


@pytest.mark.timeout(300)  # three quarters of a minute, on a machine that does nothing else
async def test_whatever_is_killed_comes_back_and_what_was_accepted_is_worked_once(
    sluice: Sluice, tmp_path: Path
) -> None:
    files = slow_pictures(tmp_path, FILES)
    async with sluice.up() as up, api_of(up, sluice) as api:
        # Given a batch in work, which is watched.
        batch_id = await accepted(sluice, *files)
        begun = asyncio.Event()
        watching = asyncio.create_task(watched(up, sluice, batch_id, begun))
        await begun.wait()

        # When one part after the other is killed, each while files are in work.
        done = 0
        for part in PARTS:
            done = await until_more_are_done(api, batch_id, done)
            assert done < FILES, f"too quick for the {part}"
            await killed_and_back(sluice, part)

        # Then every file has one outcome, who watched saw the end, and `up` told what it did.
        board = await watching
        assert board.all_well
        assert board.done == board.counts["successful_uploads"] == FILES
        await assert_worked_once(api, batch_id, attempts_max=FILES + 1)
        for part in PARTS:
            await until_told(up, part, "(restart 1)")  # it does its work before it is asked whether it is ready
            assert f"{part:<9} │ ended by SIGKILL, " in up.err_file.read_text()
            assert len(told(up, part, "(restart 1)")) == 1

        # When `up` is killed with another batch accepted, then none of the restarted processes outlives it.
        another_id = await accepted(sluice, *files[:3])
        family = family_of(up.process)
        assert set(pids(sluice).values()) <= {process.pid for process in family}
        up.process.kill()
        await up.process.wait()
        await asyncio.to_thread(require_gone, family)

    # And a new one in the same folder finishes what was accepted.
    async with sluice.up() as up:
        assert (await sluice.run("watch", another_id)).code == 0
        async with api_of(up, sluice) as api:
            await assert_worked_once(api, another_id, attempts_max=4)

        # When it is told to stop while Kafka is about to be started again, then it does so at once, in good order.
        os.kill(pids(sluice)["kafka"], signal.SIGKILL)
        await until_told(up, "kafka", "; restart 1 in ")
        began = time.monotonic()
        ended = await up.stopped(signal.SIGINT)
    assert ended.code == 0, ended.err
    assert time.monotonic() - began < 30
    assert not connection.endpoints_file(sluice.data_dir).exists()


async def test_a_service_that_hangs_is_killed_and_started_again(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    async with (
        a_notifier(kafka, database_url, unique, tmp_path) as notifier,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        supervisor = Supervisor(http=http, say=lambda _part, line: said.put_nowait(line), changed=lambda: None)
        await notifier.ready(http)
        keeping = asyncio.create_task(supervisor.keep([notifier]))
        paused = notifier.process.pid

        os.kill(paused, signal.SIGSTOP)

        async with asyncio.timeout(BACK_WITHIN_S):
            lines = [await said.get()]
            while not lines[-1].startswith("ready again"):
                lines.append(await said.get())
        assert "by SIGKILL (killed, since http" in lines[0]
        assert notifier.process.pid != paused
        assert not psutil.pid_exists(paused)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


@contextlib.asynccontextmanager
async def a_notifier(kafka: str, database_url: str, unique: str, folder: Path) -> AsyncIterator[Service]:
    """A service that has to answer within two seconds."""
    lock = await lock_folder(folder)
    (port,) = free_ports(1)
    service = await Service.start(
        "notifier",
        url=f"http://127.0.0.1:{port}",
        log_file=folder / "notifier.log",
        lock=lock,
        environment={
            "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
            "SLUICE_DATABASE_URL": database_url,
            "SLUICE_LOG_TOPIC": f"{unique}.events",
            "SLUICE_PROGRESS_TOPIC": f"{unique}.progress",
            "SLUICE_JWT_SECRET": SECRET,
            "SLUICE_NOTIFIER_PORT": str(port),
        },
        grace_s=5,
    )
    service.patience = Patience(round_s=0.5, rounds_max=4, first_rounds_max=120)
    try:
        yield service
    finally:
        await service.process.stop()
        lock.release()


async def accepted(sluice: Sluice, *files: Path) -> str:
    """The batch of these files, once they are."""
    sent = await sluice.run("upload", "--json", *files)
    assert sent.code == 0, sent.err
    return str(sent.json["batch"]["id"])


async def watched(up: Up, sluice: Sluice, batch_id: str, begun: asyncio.Event) -> Board:
    """What somebody who watched the batch knew at its end; `begun` is set with the first message."""
    board = Board(batch_id)
    watch = Watch(up.endpoints["notifier"], make_token(user="me", data_dir=sluice.data_dir), batch_id)
    async with contextlib.aclosing(watch.messages()) as messages:
        async for message in messages:
            board.apply(message)
            begun.set()
            if board.ended:
                break
    return board


async def killed_and_back(sluice: Sluice, part: str) -> None:
    """Kill a part; return when another process does its work."""
    killed = pids(sluice)[part]
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(BACK_WITHIN_S):
        while pids(sluice).get(part, killed) == killed:  # noqa: ASYNC110  # a file's content cannot be awaited
            await asyncio.sleep(0.05)


async def until_more_are_done(api: Api, batch_id: str, done: int) -> int:
    """How many files of the batch are done, once these are more than `done`; the api may be away meanwhile."""
    async with asyncio.timeout(BACK_WITHIN_S):
        while (now := (await api.batch(batch_id))["processed_uploads"]) <= done:  # noqa: ASYNC110  # asked for
            await asyncio.sleep(0.05)
    return int(now)


async def until_told(up: Up, part: str, words: str) -> None:
    async with asyncio.timeout(BACK_WITHIN_S):
        while not told(up, part, words):  # noqa: ASYNC110  # a file's growth cannot be awaited
            await asyncio.sleep(0.02)


def told(up: Up, part: str, words: str) -> list[str]:
    """The lines of `up` about a part with these words."""
    return [line for line in up.err_file.read_text().splitlines() if line.startswith(part) and words in line]


def pids(sluice: Sluice) -> dict[str, int]:
    """The processes of the parts as endpoints.json names them."""
    found: dict[str, int] = connection.read_endpoints(sluice.data_dir)["pids"]
    return found


def api_of(up: Up, sluice: Sluice) -> Any:
    return Api.open(Connection(up.endpoints["api"], make_token(user="me", data_dir=sluice.data_dir)))


async def assert_worked_once(api: Api, batch_id: str, *, attempts_max: int) -> None:
    """Every upload completed, by one effective outcome each; nothing was queued twice."""
    batch, uploads = await api.batch(batch_id), await api.uploads(batch_id)
    ids = {upload["id"] for upload in uploads}
    assert batch["status"] == "completed"
    assert batch["total_uploads"] == batch["successful_uploads"] == batch["processed_uploads"] == len(ids)
    assert sum(upload["attempts"] for upload in uploads) <= attempts_max
    effective = [event async for event in api.events(batch_id) if not event["ignored"]]
    facts = Counter((event["type"], event["data"].get("upload_id")) for event in effective)
    for kind in ("UploadQueued", "UploadSucceeded"):
        assert {facts[f"sluice.{kind}.v1", upload_id] for upload_id in ids} == {1}
    assert sum(count for (kind, _), count in facts.items() if kind == "sluice.BatchCompleted.v1") == 1
