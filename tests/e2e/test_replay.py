"""Rebuilding the read models of a Sluice that serves: replay, verify and quarantine, as an operator runs them."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from schemas.position import Position
from services.database import Database
from services.demo import PICTURES
from services.eventlog import EventLog, LogSettings
from tests.e2e.conftest import COMMAND_TIMEOUT_S, Sluice, Up
from tests.e2e.slow import slow_pictures
from tests.examples import a_batch_created, an_id
from tests.notifiers import Watcher
from tests.rebuilds import POISON, Ground

pytestmark = pytest.mark.timeout(300)  # many commands, each a process that takes its time on a busy machine

MANY = 3_000
"""So many facts that a replay, one at a time, takes longer than it may take to hit it in its middle."""


@contextlib.asynccontextmanager
async def ground_of(up: Up) -> AsyncIterator[Ground]:
    """The log and the database of what is up."""
    database = await Database.open(up.endpoints["postgres"])
    async with EventLog.open(LogSettings(bootstrap_servers=up.endpoints["kafka"])) as log:
        log_id = await log.identify()
        assert log_id is not None
        yield Ground(log, log_id, 1, database)
    await database.close()


async def told_until_closed(up: Up, token: str, begun: asyncio.Event) -> list[dict[str, Any]]:
    """What a client that follows all of its user's batches is told, once it has `begun`; ended by cancelling."""
    told: list[dict[str, Any]] = []
    async with connect(f"{up.endpoints['notifier'].replace('http', 'ws', 1)}/v1/ws") as socket:
        watcher = Watcher(socket)
        await watcher.ask({"type": "auth", "token": token})
        await watcher.subscribe_user()
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                told += [message for message in [await watcher.hear(within_s=None)] if message["type"] == "event"]
    return told


async def test_the_read_models_are_rebuilt_and_verified_while_everything_serves(sluice: Sluice, tmp_path: Path) -> None:
    async with sluice.up() as up, ground_of(up) as ground:
        batch = await replay_in_the_middle_of_work(sluice, up, ground, tmp_path)
        await kill_a_replay_in_its_middle(sluice, ground)
        await find_and_mend_a_row_that_was_tampered_with(sluice, ground, batch)
        await quarantine_a_record(sluice, ground)
        assert (await sluice.run("upload", "--quiet", "--watch", PICTURES / "fig.webp")).code == 0
        assert (await up.stopped()).code == 0


async def replay_in_the_middle_of_work(sluice: Sluice, up: Up, ground: Ground, folder: Path) -> str:
    """Nobody notices, no attempt is lost, no fact is missed or told twice; returns the batch that was worked on."""
    token = (await sluice.run("token", "--user", "me")).out.strip()
    begun = asyncio.Event()
    telling = asyncio.create_task(told_until_closed(up, token, begun))
    await begun.wait()
    uploading = asyncio.create_task(sluice.run("upload", "--watch", "--json", *slow_pictures(folder, 6)))
    await come_true(ground, "SELECT EXISTS (SELECT FROM public.uploads WHERE status = 'processing')")

    replayed = await sluice.run("replay", "--json")
    again = await sluice.run("replay")
    sent = await uploading

    assert (replayed.code, replayed.json["generation"]) == (0, "gen_2"), replayed.err
    assert json.loads(replayed.err.splitlines()[0])["step"] == "folding the log"
    assert (again.code, "are live" in again.out) == (0, True), again.err
    assert sent.code == 0, sent.err
    assert {upload["attempts"] for upload in sent.json["accepted"]} == {1}
    verified = await sluice.run("verify", "--json")
    assert (verified.code, verified.json["equal"], verified.json["generation"]) == (0, True, "gen_3"), verified.err
    batch_id: str = sent.json["batch"]["id"]
    history = [json.loads(line) for line in (await sluice.run("history", "--json", batch_id)).out.splitlines()]
    telling.cancel()
    told = [message["event"]["id"] for message in await telling]
    assert told == [fact["id"] for fact in history if not fact["ignored"]]
    return batch_id


async def kill_a_replay_in_its_middle(sluice: Sluice, ground: Ground) -> None:
    """A second one was refused beside it; the live rows are what they were."""
    await ground.append(*(a_batch_created(an_id("many", number), user_id="jo") for number in range(MANY)))
    slow = await sluice.start("replay", "--records-max", "1", stderr=asyncio.subprocess.PIPE)
    await come_true(ground, "SELECT to_regclass('gen_4.positions') IS NOT NULL")
    await come_true(ground, "SELECT max(next_offset) > 3 FROM gen_4.positions")

    slow.send_signal(signal.SIGSTOP)
    refused = await sluice.run("replay")
    slow.send_signal(signal.SIGKILL)
    await slow.communicate()

    assert (refused.code, "another replay or verify works on this database" in refused.err) == (1, True)
    assert (await ground.live(), await ground.schemas()) == ("gen_3", ["gen_3", "gen_4"])


async def find_and_mend_a_row_that_was_tampered_with(sluice: Sluice, ground: Ground, batch_id: str) -> None:
    """The replay that mends it also takes away what a killed one left behind."""
    await ground.execute(f"UPDATE gen_3.uploads SET attempts = 7 WHERE batch_id = '{batch_id}' AND filename ~ '-0'")

    differing = await sluice.run("verify")
    mended = await sluice.run("replay")

    assert differing.code == 1, differing.err
    lines = [[word for word in line.split() if len(word) != len(batch_id)] for line in differing.out.splitlines()]
    assert ["uploads", "attempts", "7", "≠", "1"] in lines
    assert "1 of uploads" in differing.out
    assert mended.code == 0, mended.err
    assert (await ground.live(), await ground.schemas()) == ("gen_4", ["gen_4"])
    assert (await sluice.run("verify")).code == 0


async def quarantine_a_record(sluice: Sluice, ground: Ground) -> None:
    """It is shown, and stays as long as nobody can decode it."""
    position = str(Position.of(ground.log_id, {0: await ground.append(POISON)}))
    await come_true(ground, "SELECT EXISTS (SELECT FROM sluice_ops.quarantine)")

    (item,) = (await sluice.run("quarantine list", "--json")).json["items"]
    shown = await sluice.run("quarantine show", position)
    in_full = (await sluice.run("quarantine show", "--json", position)).json
    stays = await sluice.run("quarantine retry", "--all")
    another = await sluice.run("quarantine retry", f"{position.partition('.')[0]}.0-1")

    assert (item["position"], item["type"], item["decodable"]) == (position, "sluice.BatchCreated.v1", False)
    assert r"\x00not json\xff" in shown.out
    assert (in_full["value"], in_full["value_base64"], in_full["size_bytes"]) == (None, "AG5vdCBqc29u/w==", 10)
    assert (stays.code, f"{position} stays: " in stays.out) == (1, True), stays.err
    assert (another.code, "is not in quarantine" in another.err) == (2, True)
    assert await ground.live() == "gen_4"
    assert (await sluice.run("verify")).code == 0


async def come_true(ground: Ground, question: str) -> None:
    """Ask Postgres until it says so."""
    async with asyncio.timeout(COMMAND_TIMEOUT_S), ground.database.connection() as connection:
        while not await connection.fetchval(question):  # noqa: ASYNC110  # nobody announces it
            await asyncio.sleep(0.01)
