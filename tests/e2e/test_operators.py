"""Changing and looking after it from the command line: cancel, retry, history, log tail, sweep, doctor."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from services.demo import PICTURES
from tests.e2e.conftest import COMMAND_TIMEOUT_S, Sluice, environment
from tests.e2e.slow import slow_pictures

pytestmark = pytest.mark.timeout(300)  # many commands, each a process that takes its time on a busy machine

UNKNOWN = "01a2034f-b51e-7cb6-8786-b26c69cd4600"


async def test_batches_are_cancelled_retried_and_looked_back_at(sluice: Sluice, tmp_path: Path) -> None:
    async with sluice.up():
        # A batch whose work takes a while is cancelled; what is left of it becomes cancelled, once.
        pictures = slow_pictures(tmp_path, 40)
        slow = (await sluice.run("upload", "--quiet", *pictures)).out.strip()
        cancelled = await sluice.run("cancel", "--json", slow)
        assert (cancelled.code, cancelled.json["status"]) == (0, "cancelled")
        assert cancelled.json["cancelled_uploads"] > 0
        again = await sluice.run("cancel", slow)
        assert (again.code, f"batch {slow} is cancelled" in again.out) == (0, True)
        refused = await sluice.run("retry", slow)
        assert (refused.code, "(batch_ended)" in refused.err) == (1, True)

        # Nothing is left of an upload of which no file was taken; one that is stopped says what became of it.
        (tmp_path / "notes.txt").write_text("no picture")
        untaken = await sluice.run("upload", tmp_path / "notes.txt")
        assert (untaken.code, "no file was taken, so there is no batch" in untaken.out) == (1, True)
        assert [batch["id"] for batch in (await sluice.run("status", "--json")).json["batches"]] == [slow]
        sending = await sluice.start("upload", "--watch", *pictures, stderr=asyncio.subprocess.PIPE)
        while len(batches := (await sluice.run("status", "--json")).json["batches"]) < 2:
            assert sending.returncode is None
        sending.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(sending.communicate(), COMMAND_TIMEOUT_S)
        assert (sending.returncode, f"Batch {batches[0]['id']} keeps what was sent so far" in err.decode()) == (
            130,
            True,
        )
        assert (await sluice.run("cancel", batches[0]["id"])).code == 0

        # A batch with a failed file is retried, as a whole and by its file.
        sent = await sluice.run("upload", "--watch", "--json", PICTURES / "cat.png", PICTURES / "broken-download.jpg")
        assert sent.code == 1
        batch, taken = sent.json["batch"]["id"], {upload["filename"]: upload for upload in sent.json["accepted"]}
        cat, broken = taken["cat.png"], taken["broken-download.jpg"]
        retried = await sluice.run("retry", "--json", batch)
        assert (retried.code, retried.json["id"], retried.json["status"]) == (0, batch, "processing")
        assert (await sluice.run("watch", batch)).code == 1
        one = await sluice.run("retry", "--json", broken["id"])
        assert one.code == 0, one.err
        assert (one.json["id"], one.json["attempts"]) in ((broken["id"], 2), (broken["id"], 3))  # it may have begun
        assert (await sluice.run("watch", batch)).code == 1
        assert (await sluice.run("retry", cat["id"])).err.count("(not_failed)") == 1
        nobody = await sluice.run("retry", UNKNOWN)
        assert (nobody.code, "neither a batch nor an upload" in nobody.err) == (1, True)

        # Its history tells all of it, and shows it as it was.
        history = [json.loads(line) for line in (await sluice.run("history", "--json", batch)).out.splitlines()]
        names = [event["type"].split(".")[1] for event in history]
        assert names[0] == "BatchCreated"
        assert names.count("UploadRetried") == 2
        assert names.count("BatchCompleted") == 3
        first = next(event for event in history if event["type"] == "sluice.BatchCompleted.v1")
        then = await sluice.run("status", "--json", "--at", first["position"], batch)
        now = await sluice.run("status", "--json", batch)
        assert then.json["position"] == first["position"]
        assert then.json["updated_at"] == first["time"]
        assert now.json["updated_at"] > then.json["updated_at"]
        lines = [line.split() for line in (await sluice.run("history", batch)).out.splitlines()]
        assert [line[:2] for line in lines] == [[event["time"], event["position"]] for event in history]


async def test_an_operator_follows_the_log_sweeps_and_asks_the_doctor(sluice: Sluice) -> None:
    async with sluice.up():
        batch = (await sluice.run("upload", "--quiet", "--watch", PICTURES / "cat.png")).out.strip()

        # The whole log, filtered and cut.
        facts = await tail(sluice, "--from", "start")
        names = [fact["type"].split(".")[1] for fact in facts]
        started = names[: names.index("BatchCreated")]
        assert (started[0], started[-1], set(started)) == ("LogCreated", "LaneClaimed", {"LogCreated", "LaneClaimed"})
        assert names[-1] == "BatchCompleted"
        mine = await tail(sluice, "--from", "start", "--user", "me", "--type", "UploadSucceeded")
        assert [fact["data"]["batch_id"] for fact in mine] == [batch]
        position = mine[0]["position"]
        assert await tail(sluice, "--from", position, "--to", position) == mine
        assert await tail(sluice, "--newest", "1") == facts[-1:]
        beyond = await sluice.run("log tail", "--from", position.rpartition("-")[0] + "-999999")
        assert (beyond.code, "the log has no 0-999999" in beyond.err) == (2, True)
        another = await sluice.run("log tail", "--from", "00000000.0-1")
        assert (another.code, "position of the log 00000000" in another.err) == (2, True)

        # As it grows, until Ctrl-C.
        following = await sluice.start(
            *("log tail", "--newest", "0", "--type", "BatchCompleted"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert following.stdout is not None
        line = asyncio.create_task(following.stdout.readline())
        while not line.done():  # it begins at the end as of its start, which nobody tells us
            assert (await sluice.run("upload", "--quiet", PICTURES / "fig.webp")).code == 0
            await asyncio.wait({line}, timeout=0.5)
        assert "BatchCompleted" in line.result().decode()
        following.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(following.communicate(), COMMAND_TIMEOUT_S)
        assert (following.returncode, err) == (0, b"")

        # Blobs: all is well, then one is damaged and one left over.
        well = await sluice.run("sweep")
        assert (well.code, "0 missing or damaged" in well.out) == (0, True)
        upload = (await sluice.run("status", "--json", batch)).json["uploads"][0]
        folder = sluice.data_dir / "blobs" / upload["id"]
        (original,) = (file for file in folder.iterdir() if not file.name.startswith("thumb-"))
        original.write_bytes(bytes(upload["size_bytes"]))
        left = folder / "left-over"
        left.write_bytes(b"x")
        os.utime(left, (0, 0))
        ill = await sluice.run("sweep", "--json")
        assert ill.code == 1
        assert [(fault["upload_id"], fault["problem"]) for fault in ill.json["faults"]] == [(upload["id"], "damaged")]
        assert ill.json["discarded"] == [f"{upload['id']}/left-over"]
        shown = await sluice.run("sweep")
        assert (shown.code, "cat.png" in shown.out, "restore them from a backup" in shown.out) == (1, True, True)

        # The doctor finds nothing wrong with Sluice, whatever else this machine suffers from.
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            while await states(sluice, "kafka", "topic", "postgres", "same log", "services") != ["ok"] * 5:
                pass  # for a moment, where this machine stood still

    # When all has ended, there is nothing to look at, and each says so.
    for command in ("log tail", "sweep", "status"):
        alone = await sluice.run(command)
        assert alone.code == 2, alone.err
        assert "`sluice up`" in alone.err
    assert (await sluice.run("doctor", "--json")).json["healthy"] is True


async def test_the_doctor_says_how_to_mend_what_cannot_be_reached(sluice: Sluice) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "doctor", "--data-dir", sluice.data_dir),
        env=environment()
        | {
            "SLUICE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
            "SLUICE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        },
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)

    assert process.returncode == 1
    said = out.decode()
    assert "correct SLUICE_KAFKA_BOOTSTRAP_SERVERS" in said
    assert "correct SLUICE_DATABASE_URL" in said
    assert "names a server to use" in said  # so the embedded ones are not asked for
    assert "nobody@" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cancel", "nonsense"), "'nonsense' is not the id of a batch"),
        (("retry", "nonsense"), "'nonsense' is not the id of a batch"),
        (("history",), "Missing argument"),
        (("cancel", UNKNOWN), "`sluice up`"),
        (("status", "--at", "2026-01-31T12:00:00Z"), "--at needs the batch"),
        (("log tail",), "SLUICE_KAFKA_BOOTSTRAP_SERVERS is not set"),
        (("sweep", "--older-than-h", "-1"), "--older-than-h"),
    ],
)
async def test_wrong_use_ends_with_two_and_says_what_to_do(
    sluice: Sluice, arguments: tuple[str, ...], expected: str
) -> None:
    ended = await sluice.run(*arguments)

    assert ended.code == 2
    assert expected in ended.err
    assert "Traceback" not in ended.err


async def test_completion_knows_the_commands(sluice: Sluice) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; sys.argv[0] = 'sluice'; from services.cli import main; main()"),
        env=environment() | {"_SLUICE_COMPLETE": "complete_bash", "COMP_WORDS": "sluice re", "COMP_CWORD": "1"},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)

    assert sorted(out.decode().split()) == ["replay", "retry"]


async def states(sluice: Sluice, *names: str) -> list[str]:
    """What the doctor finds of these."""
    checks = {each["check"]: each for each in (await sluice.run("doctor", "--json")).json["checks"]}
    return [checks[name]["state"] for name in names]


async def tail(sluice: Sluice, *arguments: str) -> list[dict[str, Any]]:
    """The facts that `log tail` shows, to the log's end."""
    ended = await sluice.run("log tail", "--json", "--no-follow", *arguments)
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]
