"""`sluice up` and what one does with it: files are sent and watched, parts die, the whole is stopped and goes on."""

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.cli.board import Board
from services.cli.client import Api
from services.cli.connection import Connection, make_token
from services.cli.watching import Watch
from services.demo import PICTURES
from tests.e2e.conftest import ANY_PORTS, COMMAND_TIMEOUT_S, Sluice, Up, require_gone
from tests.e2e.slow import slow_pictures

pytestmark = pytest.mark.timeout(300)  # many commands, each a process that takes its time on a busy machine


async def test_pictures_are_sent_watched_and_asked_for_until_sigterm_drains_it_all(
    sluice: Sluice, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture at all\n")
    async with sluice.up() as up:
        # A person sends pictures, one of them broken, and something that is no picture.
        files = (PICTURES / "cat.png", PICTURES / "broken-download.jpg", text)
        sent = await sluice.run("upload", "--watch", "--name", "mixed", *files)
        assert sent.code == 1
        assert "completed" in sent.out
        assert "failed: corrupt_media" in sent.out
        assert "rejected: unsupported_media_type" in sent.out

        # A script sends good ones and reads JSON.
        scripted = await sluice.run("upload", "--watch", "--json", PICTURES / "fig.webp", PICTURES / "stream.jpg")
        assert scripted.code == 0, scripted.err
        assert scripted.json["batch"]["status"] == "completed"
        assert {upload["status"] for upload in scripted.json["accepted"]} == {"completed"}

        # Both ask how things are.
        batch_id = scripted.json["batch"]["id"]
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            while (status := (await sluice.run("status", "--json")).json)["status"]["mode"] != "full":
                pass  # for a moment, where this machine stood still
        assert [batch["name"] for batch in status["batches"]] == [None, "mixed"]
        upload = scripted.json["accepted"][0]
        assert (await sluice.run("status", "--json", batch_id)).json["successful_uploads"] == 2
        assert (await sluice.run("status", "--json", upload["id"])).json["result"] == upload["result"]
        assert upload["filename"] in (await sluice.run("status", batch_id)).out
        assert (await sluice.run("watch", batch_id)).code == 0

        # The token that the command line makes is good for any client, and only it.
        token = (await sluice.run("token", "--user", "me")).out.strip()
        async with httpx.AsyncClient(base_url=up.endpoints["api"], timeout=COMMAND_TIMEOUT_S) as http:
            url = f"/v1/uploads/{upload['id']}/thumbnail"
            thumbnail = await http.get(url, headers={"Authorization": f"Bearer {token}"})
            assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/jpeg")
            assert (await http.get(url, headers={"Authorization": "Bearer x"})).status_code == 401

        # Somebody forgets that it runs already.
        second = await sluice.run("up", *ANY_PORTS)
        assert second.code == 1
        assert "is in use by process" in second.err

        ended = await up.stopped(signal.SIGTERM)

    assert ended.code == 0, ended.err
    stops = [line.split(" ")[0] for line in ended.err.splitlines() if "│ stopped after" in line]
    assert stops[:3] == ["api", "processor", "notifier"]
    assert set(stops[3:]) == {"kafka", "postgres"}
    assert not (sluice.data_dir / "endpoints.json").exists()


async def test_without_restarts_a_part_that_dies_ends_all_and_is_named_and_the_next_start_finishes_the_batch(
    sluice: Sluice, tmp_path: Path
) -> None:
    # Given a batch whose work takes some seconds.
    count = 14
    files = slow_pictures(tmp_path, count)
    async with sluice.up("--no-restart") as up:
        sent = await sluice.run("upload", "--json", *files)
        batch_id = sent.json["batch"]["id"]
        before = await until_some_are_done(up, sluice, batch_id)

        # When the processor is killed in the middle of it.
        up.service("processor").kill()
        ended = await up.ended()

    # Then all ends, says why, and a later start finishes the batch, each file once.
    assert before.done < count
    assert ended.code == 1
    assert "processor ended by SIGKILL" in ended.err
    async with sluice.up() as up:
        watched = await sluice.run("watch", batch_id)
        assert watched.code == 0, watched.err
        async with api_of(up, sluice) as api:
            batch = await api.batch(batch_id)
            uploads = await api.uploads(batch_id)
    assert counts(batch) == ("completed", count, count, count, 0, 0)
    assert {upload["status"] for upload in uploads} == {"completed"}
    assert sum(upload["attempts"] for upload in uploads) <= count + 1


async def test_killing_the_command_leaves_nothing_behind_and_without_restarts_losing_a_server_ends_all(
    sluice: Sluice,
) -> None:
    async with sluice.up() as up:
        up.process.kill()
        await up.process.wait()
        await asyncio.to_thread(require_gone, up.family)

    async with sluice.up("--no-restart") as again:
        assert (await sluice.run("upload", "--watch", PICTURES / "fig.webp")).code == 0
        kafka = next(one for one in again.servers() if "kafka.Kafka" in one.cmdline())
        kafka.kill()
        ended = await again.ended()
    assert ended.code == 1
    assert "kafka ended by SIGKILL" in ended.err


async def test_a_part_that_cannot_start_at_all_ends_the_first_start_with_its_reason(sluice: Sluice) -> None:
    sluice.data_dir.mkdir()
    (sluice.data_dir / "blobs").write_text("a file where the folder of files should be")

    ended = await sluice.run("up", *ANY_PORTS)

    assert ended.code == 1
    assert "ended with code 1, so all is stopped" in ended.err
    assert str(sluice.data_dir / "blobs") in ended.err
    assert "restart" not in ended.err


async def test_a_taken_port_is_named_with_the_option_that_chooses_another(sluice: Sluice) -> None:
    async with await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0) as taken:
        port = str(taken.sockets[0].getsockname()[1])

        refused = await sluice.run("up", "--api-port", port)

    assert refused.code == 2
    assert f"Port {port} of 127.0.0.1, where the api should listen, is taken" in refused.err
    assert "--api-port" in refused.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("status",), "`sluice up`"),
        (("upload", "no-such-file.jpg"), "no-such-file.jpg cannot be read: No such file or directory"),
        (("watch", "nonsense"), "'nonsense' is not the id of a batch"),
        (("token", "--user", "me"), "There is no secret"),
        (("token", "--user", "me", "--ttl", "inf"), "--ttl"),
        (("upload", "--name", "\udcff", str(PICTURES / "cat.png")), "--name '\\udcff' holds half a surrogate pair"),
        (("upload",), "Missing argument"),
    ],
)
async def test_wrong_use_ends_with_two_and_says_what_to_do(
    sluice: Sluice, arguments: tuple[str, ...], expected: str
) -> None:
    ended = await sluice.run(*arguments)

    assert ended.code == 2
    assert expected in ended.err
    assert "Traceback" not in ended.err


def api_of(up: Up, sluice: Sluice) -> Any:
    return Api.open(Connection(up.endpoints["api"], make_token(user="me", data_dir=sluice.data_dir)))


async def until_some_are_done(up: Up, sluice: Sluice, batch_id: str) -> Board:
    """What a watcher saw until three files were done."""
    board = Board(batch_id)
    watch = Watch(up.endpoints["notifier"], make_token(user="me", data_dir=sluice.data_dir), batch_id)
    async with asyncio.timeout(COMMAND_TIMEOUT_S), contextlib.aclosing(watch.messages()) as messages:
        async for message in messages:
            board.apply(message)
            if board.done >= 3:
                break
    return board


def counts(batch: dict[str, Any]) -> tuple[Any, ...]:
    names = ("total_uploads", "processed_uploads", "successful_uploads", "failed_uploads", "cancelled_uploads")
    return (batch["status"], *(batch[name] for name in names))
