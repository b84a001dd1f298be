"""The notifier as its clients meet it, one batch at a time: real WebSockets, on real Kafka and Postgres."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from websockets.exceptions import ConnectionClosed

from schemas.position import Position
from services.database import Database, DatabaseUnavailable
from services.embedded.folders import free_ports
from services.notifier import messages, replays, sessions, subscriptions
from services.notifier.main import notifying
from services.settings import Settings
from services.tail import Tail
from tests.examples import (
    BATCH,
    OTHER_USER,
    RESULT,
    UPLOAD,
    USER,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    an_id,
    an_upload_attempt_failed,
    an_upload_progressed,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
)
from tests.notifiers import (
    SECRET,
    SOON_S,
    Scene,
    Watcher,
    a_token,
    end_tokens_of_an_hour,
    following_projection,
    offset_of,
    types_of,
    until,
)

# Who may listen


async def test_the_first_message_says_who_is_there_and_the_answer_where_the_log_is(scene: Scene) -> None:
    async with scene.connected(user=None) as watcher:
        ready = await watcher.ask({"type": "auth", "token": a_token()})
        response = watcher.socket.response

    assert response is not None
    assert "Sec-WebSocket-Extensions" not in response.headers, "compression costs more than it saves"
    assert ready == {"type": "ready", "user_id": USER, "heartbeat_s": 20.0, "position": f"{scene.log_id[:8]}.0-1"}


async def test_an_authorization_header_at_the_handshake_counts_too(scene: Scene) -> None:
    headers = {"Authorization": f"Bearer {a_token()}"}

    async with scene.connected(user=None, additional_headers=headers) as watcher:
        ready = await watcher.hear()

    assert (ready["type"], ready["user_id"]) == ("ready", USER)


async def test_anything_else_first_closes_with_4001(scene: Scene) -> None:
    firsts: list[Any] = [
        {"type": "auth", "token": "no token"},
        {"type": "auth", "token": a_token(secret="another secret, thirty-two bytes or more")},
        {"type": "auth", "token": a_token(ttl_s=-3600)},
        {"type": "auth"},
        {"type": "subscribe", "batch_id": BATCH},
        {"type": "ping"},
        "not even an object",
        {"type": "é" * 200},
    ]
    for first in firsts:
        async with scene.connected(user=None) as watcher:
            await watcher.say(first)

            code, reason = await watcher.closed()

            assert code == 4001
            assert reason


async def test_a_wrong_authorization_header_closes_with_4001(scene: Scene) -> None:
    for header in (
        "Bearer no-token",
        "Basic YTpi",
        f"Bearer {a_token(secret='another secret of 32 bytes or so, yes')}",
    ):
        async with scene.connected(user=None, additional_headers={"Authorization": header}) as watcher:
            code, _ = await watcher.closed()

            assert code == 4001


async def test_a_binary_first_message_closes_with_4001(scene: Scene) -> None:
    async with scene.connected(user=None) as watcher:
        await watcher.socket.send(b"\x00\x01")

        code, _ = await watcher.closed()

    assert code == 4001


async def test_no_token_in_time_closes_with_4001(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "AUTH_TIMEOUT_S", 0.1)

    async with scene.connected(user=None) as watcher:
        code, reason = await watcher.closed()

    assert (code, reason) == (4001, "no token within 0.1 s")


async def test_a_connection_ends_with_its_token_and_lives_on_with_a_newer_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_tokens_of_an_hour(monkeypatch)
    old, newer = ({"type": "auth", "token": a_token(ttl_s=ttl_s)} for ttl_s in (3600, 7200))
    async with scene.connected(user=None) as watcher, scene.connected(user=None) as renewing:
        await renewing.say(old, newer)
        first, again = await renewing.hear(), await renewing.hear()
        await watcher.ask(old)

        code, reason = await watcher.closed()
        await renewing.silence()

    assert (first["type"], again["type"]) == ("ready", "ready")
    assert code == 4001
    assert "expired" in reason


async def test_a_connection_stays_its_users_own(scene: Scene) -> None:
    async with scene.connected() as watcher:
        answer = await watcher.ask({"type": "auth", "token": a_token(OTHER_USER)})

        assert (answer["type"], answer["code"]) == ("error", "unauthorized")
        await watcher.silence()


async def test_more_connections_than_a_user_may_have_are_closed_with_4009(scene: Scene) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(scene.connected())

        surplus = await stack.enter_async_context(scene.connected(user=None))
        await surplus.say({"type": "auth", "token": a_token()})
        code, reason = await surplus.closed()
        someone_else = await stack.enter_async_context(scene.connected(OTHER_USER))
        await someone_else.silence()

    assert code == 4009
    assert "20" in reason


# What is not understood


async def test_what_is_not_understood_is_answered_with_an_error_and_the_connection_stays(scene: Scene) -> None:
    async with scene.connected() as watcher:
        for text in ("{", "[]", '{"type":"dance"}', '{"type":"subscribe"}', '{"type":"subscribe","user":false}'):
            await watcher.socket.send(text)

            answer = await watcher.hear()

            assert (answer["type"], answer["code"]) == ("error", "invalid_request")
            assert answer["detail"]
        await watcher.socket.send(b"{}")
        assert (await watcher.hear())["code"] == "invalid_request"
        await watcher.silence()


async def test_several_messages_in_one_frame_are_answered_in_order(scene: Scene) -> None:
    async with scene.connected(user=None) as watcher:
        await watcher.say({"type": "auth", "token": a_token()}, {"type": "ping"}, {"type": "dance"}, {"type": "ping"})

        heard = [await watcher.hear() for _ in range(4)]

    assert [message["type"] for message in heard] == ["ready", "pong", "error", "pong"]


async def test_a_message_that_is_too_large_ends_the_connection(scene: Scene) -> None:
    async with scene.connected() as watcher:
        await watcher.say({"type": "ping", "padding": "x" * 20_000})

        code, _ = await watcher.closed()

    assert code == 1009


async def test_batches_nobody_knows_and_batches_of_others_are_equally_not_found(scene: Scene) -> None:
    await scene.append(a_batch_created())

    async with scene.connected(OTHER_USER) as watcher:
        answers = [await watcher.subscribe(batch_id) for batch_id in (an_id("nobody"), BATCH, "no-id")]

    for batch_id, answer in zip((an_id("nobody"), BATCH, "no-id"), answers, strict=True):
        expected = {"type": "error", "code": "not_found", "detail": f"There is no batch {batch_id}"}
        assert answer == {**expected, "batch_id": batch_id}


# What a subscriber is told


async def test_a_batch_appended_just_now_is_found_at_once(scene: Scene) -> None:
    async with scene.connected() as watcher:
        for number in range(20):
            batch_id = an_id("just now", number)
            await scene.append(a_batch_created(batch_id))

            answer = await watcher.subscribe(batch_id)

            assert answer["type"] == "subscribed"


async def test_a_subscriber_is_given_the_batch_and_then_every_effective_fact(scene: Scene) -> None:
    before = await scene.append(a_batch_created(name="holiday", metadata={"trip": "Ísland"}), an_upload_queued())
    async with scene.connected() as watcher:
        snapshot = await watcher.subscribe()

        await scene.append(a_batch_sealed(), a_batch_sealed(), a_lane_claimed(after=99))
        last = await scene.append(an_upload_started(), an_upload_succeeded(), a_batch_completed())
        heard = await watcher.hear_to(last)

    assert {key: snapshot[key] for key in ("type", "batch_id", "recovered", "position")} == {
        "type": "subscribed",
        "batch_id": BATCH,
        "recovered": False,
        "position": str(before),
    }
    assert snapshot["batch"]["metadata"] == {"trip": "Ísland"}
    assert (snapshot["batch"]["status"], snapshot["batch"]["total_uploads"]) == ("pending", 1)
    assert types_of(heard) == ["BatchSealed", "UploadStarted", "UploadSucceeded", "BatchCompleted"]
    assert [message["batch"]["status"] for message in heard] == ["pending", "processing", "processing", "completed"]
    assert heard[2]["event"]["data"]["result"] == RESULT
    assert heard[3]["batch"] == {
        "id": BATCH,
        "status": "completed",
        "sealed": True,
        "total_uploads": 1,
        "processed_uploads": 1,
        "successful_uploads": 1,
        "failed_uploads": 0,
        "cancelled_uploads": 0,
        "progress": 1.0,
    }


async def test_events_show_neither_where_bytes_lie_nor_fingerprints(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        await watcher.subscribe()

        last = await scene.append(an_upload_queued())
        (queued,) = await watcher.hear_to(last)

    assert queued["event"].keys() == {"id", "type", "time", "data"}
    assert "blob" not in queued["event"]["data"]
    assert "request" not in queued["event"]["data"]
    assert queued["event"]["data"]["upload_id"] == UPLOAD


async def test_a_subscription_of_two_clients_encodes_each_fact_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode_event = messages.event

    def counting(*args: Any, **options: Any) -> str:
        encoded.append(encode_event(*args, **options))
        return encoded[-1]

    monkeypatch.setattr(messages, "event", counting)
    await scene.append(a_batch_created())
    async with scene.connected() as first, scene.connected() as second:
        await first.subscribe()
        await second.subscribe()
        await first.subscribe()

        last = await scene.append(*(an_upload_queued(an_id(number)) for number in range(10)), a_batch_sealed())
        heard = [await each.hear_to(last) for each in (first, second)]

    assert len(encoded) == 11
    assert heard[0] == heard[1]
    assert [json.loads(text) for text in encoded] == heard[0]


async def test_facts_that_come_together_go_out_together(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        await watcher.subscribe()
        watcher.frames.clear()

        last = await scene.append(*(an_upload_queued(an_id(number)) for number in range(500)))
        heard = await watcher.hear_to(last)

    assert len(heard) == 500
    assert len(watcher.frames) < 50


@pytest.mark.parametrize("projected", [False, True], ids=["nothing projected", "projected, little memory"])
async def test_snapshot_and_facts_leave_no_gap_and_repeat_nothing_while_facts_come_in(
    quiet: Scene,
    *,
    projected: bool,
) -> None:
    batches = [an_id("batch", number) for number in range(4)]
    settings = quiet.settings.model_copy(update={"tail_batches_max": 1}) if projected else quiet.settings
    async with contextlib.AsyncExitStack() as stack:
        notifier = await stack.enter_async_context(notifying(settings))
        quiet.port = notifier.port
        notifier.watches.linger_s = 0.0
        if projected:
            await stack.enter_async_context(following_projection(quiet))
        await quiet.append(*(a_batch_created(batch_id) for batch_id in batches))

        offsets: dict[str, list[int]] = {batch_id: [] for batch_id in batches}
        snapshots: list[dict[str, Any]] = []
        async with asyncio.TaskGroup() as together:
            together.create_task(append_work(quiet, offsets, uploads=100, enough=lambda: len(snapshots) == 16))
            watching = [
                together.create_task(watch_some(quiet, batches[number % 4], offsets, snapshots, number=number))
                for number in range(16)
            ]
        watched = [task.result() for task in watching]

    assert len({snapshot["position"] for snapshot, _ in watched}) > 4
    for snapshot, heard in watched:
        expected = [offset for offset in offsets[snapshot["batch_id"]] if offset > offset_of(snapshot)]
        assert [offset_of(message) for message in heard] == expected[: len(heard)]
        assert types_of(heard[-1:]) == ["BatchSealed"]
        assert_counts_follow(snapshot["batch"], heard)


async def append_work(scene: Scene, offsets: dict[str, list[int]], *, uploads: int, enough: Callable[[], bool]) -> None:
    """Work on so many uploads of all the batches in turn, and on more until it is enough; each fact is said twice, and
    `offsets` are given those of the effective ones, per batch."""
    for number in itertools.count():
        if number >= uploads and enough():
            break
        for batch_id in offsets:
            upload_id = an_id("worked", batch_id, number)
            facts = [of(upload_id, batch_id) for of in (an_upload_queued, an_upload_started, an_upload_succeeded)]
            last = (await scene.append(*(fact for fact in facts for _ in range(2)))).offset(0)
            assert last is not None
            offsets[batch_id] += [last - 5, last - 3, last - 1]
    for batch_id, effective in offsets.items():
        effective.append((await scene.append(a_batch_sealed(batch_id))).offset(0) or 0)


async def watch_some(
    scene: Scene, batch_id: str, offsets: dict[str, list[int]], snapshots: list[dict[str, Any]], *, number: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The snapshot a client is given when it comes in mid stream, and what it is told until the batch is sealed. It
    leaves and comes back once, so that the batch is let go of and looked up again."""
    # Each begins somewhere else in the stream, however slow the others are: no more than three come in at a time.
    await until(lambda: len(offsets[batch_id]) >= 15 * number and len(snapshots) >= number - 2)
    async with scene.connected() as watcher:
        await watcher.subscribe(batch_id)
        await watcher.hear()
    async with scene.connected() as watcher:
        snapshots.append(await watcher.subscribe(batch_id))
        snapshot = snapshots[-1]
        return snapshot, await watcher.hear_until(lambda message: types_of([message]) == ["BatchSealed"])


def assert_counts_follow(batch: dict[str, Any], heard: list[dict[str, Any]]) -> None:
    """Each event's counts are those before it, moved by the event."""
    total, successful = batch["total_uploads"], batch["successful_uploads"]
    for message in heard:
        total += types_of([message]) == ["UploadQueued"]
        successful += types_of([message]) == ["UploadSucceeded"]
        assert (message["batch"]["total_uploads"], message["batch"]["successful_uploads"]) == (total, successful)


async def test_after_unsubscribing_nothing_more_is_told(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with scene.connected() as watcher, scene.connected() as witness:
        await watcher.subscribe()
        await witness.subscribe()

        answer = await watcher.ask({"type": "unsubscribe", "batch_id": BATCH})
        last = await scene.append(a_batch_sealed())
        await witness.hear_to(last)

        assert answer == {"type": "unsubscribed", "batch_id": BATCH}
        await watcher.silence()


async def test_several_batches_are_watched_on_one_connection(scene: Scene) -> None:
    first, second = an_id("first"), an_id("second")
    await scene.append(a_batch_created(first), a_batch_created(second), a_batch_created(an_id("third")))
    async with scene.connected() as watcher:
        await watcher.subscribe(first)
        await watcher.subscribe(second)

        await scene.append(a_batch_sealed(second), a_batch_sealed(an_id("third")))
        last = await scene.append(a_batch_sealed(first))
        heard = await watcher.hear_to(last)

    assert [message["batch"]["id"] for message in heard] == [second, first]


async def test_a_cancelled_batch_is_told_with_its_counts(scene: Scene) -> None:
    await scene.append(a_batch_created(), an_upload_queued(), an_upload_queued(an_id("two")), an_upload_started())
    async with scene.connected() as watcher:
        await watcher.subscribe()

        last = await scene.append(a_batch_cancelled())
        (cancelled,) = await watcher.hear_to(last)

    assert cancelled["batch"]["status"] == "cancelled"
    assert (cancelled["batch"]["cancelled_uploads"], cancelled["batch"]["progress"]) == (2, 1.0)


async def test_a_deleted_batch_is_told_once_without_counts_and_is_then_not_found(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        await watcher.subscribe()

        last = await scene.append(a_batch_deleted(), a_batch_sealed())
        deleted = await watcher.hear()
        again = await watcher.subscribe(since=str(last))
        gone = await watcher.ask({"type": "unsubscribe", "batch_id": BATCH})

    assert types_of([deleted]) == ["BatchDeleted"]
    assert deleted["batch"] is None
    assert (again["type"], again["code"]) == ("error", "not_found")
    assert gone == {"type": "unsubscribed", "batch_id": BATCH}


# Coming back


async def test_who_comes_back_is_told_what_it_missed_while_it_was_away(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        since = (await watcher.subscribe())["position"]

    await scene.append(an_upload_queued())
    last = await scene.append(a_batch_sealed())
    async with scene.connected() as watcher:
        answer = await watcher.subscribe(since=since)
        heard = await watcher.hear_to(last)
        await watcher.silence()

    assert answer == {"type": "subscribed", "batch_id": BATCH, "position": since, "recovered": True}
    assert types_of(heard) == ["UploadQueued", "BatchSealed"]


async def test_who_missed_nothing_goes_on_without_a_snapshot_even_at_another_notifier(quiet: Scene) -> None:
    last = await quiet.append(a_batch_created(), an_upload_queued())
    other = await quiet.append(a_batch_created(an_id("another")))
    async with notifying(quiet.settings) as notifier:
        quiet.port = notifier.port
        async with quiet.connected() as watcher:
            answer = await watcher.subscribe(since=str(last))

    assert answer == {"type": "subscribed", "batch_id": BATCH, "position": str(other), "recovered": True}


async def test_what_the_notifier_was_not_there_for_is_told_from_the_history(scene: Scene) -> None:
    since = await scene.append(a_batch_created())
    last = await scene.append(an_upload_queued(), a_batch_sealed(), a_batch_sealed())
    async with scene.connected() as watcher:
        answer = await watcher.subscribe(since=str(since))
        heard = await watcher.hear_to(last.at(0, (last.offset(0) or 0) - 1))
        await watcher.silence()

    assert answer == {"type": "subscribed", "batch_id": BATCH, "position": str(since), "recovered": True}
    assert types_of(heard) == ["UploadQueued", "BatchSealed"]
    assert [message["batch"]["sealed"] for message in heard] == [False, True]


async def test_who_missed_more_than_is_worth_reading_again_is_given_a_snapshot(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "FACTS_MAX", 1)
    since = await scene.append(a_batch_created())
    last = await scene.append(an_upload_queued())
    async with scene.connected() as watcher:
        await watcher.until_read(last)
        answer = await watcher.subscribe(since=str(since))

    assert (answer["position"], answer["recovered"]) == (str(last), False)
    assert answer["batch"]["total_uploads"] == 1


async def test_a_watch_ends_a_while_after_its_last_client_left(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with notifying(scene.settings) as notifier:
        notifier.watches.linger_s = 0.0
        scene.port = notifier.port
        async with scene.connected() as watcher:
            since = (await watcher.subscribe())["position"]
        await until(lambda: not notifier.watches.batches)
        async with scene.connected() as watcher:
            last = await scene.append(an_upload_queued())
            answer = await watcher.subscribe(since=since)
            heard = await watcher.hear_to(last)

    assert answer["recovered"] is True
    assert types_of(heard) == ["UploadQueued"]


async def test_a_position_of_another_log_or_of_other_partitions_gets_a_snapshot(scene: Scene) -> None:
    last = await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        other_log = await watcher.subscribe(since="00000000.0-5")
        other_partition = await watcher.subscribe(since=f"{last.log}.1-5")

    assert (other_log["recovered"], other_partition["recovered"]) == (False, False)


async def test_a_position_the_log_has_not_reached_gets_a_snapshot_after_a_while(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "SINCE_TIMEOUT_S", 0.1)
    last = await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        answer = await watcher.subscribe(since=str(last.at(0, 1_000_000)))

    assert (answer["recovered"], answer["position"]) == (False, str(last))


async def test_what_is_no_position_is_an_error_and_no_subscription(scene: Scene) -> None:
    await scene.append(a_batch_created())
    async with scene.connected() as watcher, scene.connected() as witness:
        await witness.subscribe()

        answer = await watcher.subscribe(since="yesterday")
        await witness.hear_to(await scene.append(a_batch_sealed()))

        assert (answer["type"], answer["code"], answer["batch_id"]) == ("error", "invalid_position", BATCH)
        await watcher.silence()


# Progress


async def test_progress_is_told_of_the_attempt_in_work_and_of_no_other(scene: Scene) -> None:
    two = an_id("two")
    await scene.append(a_batch_created(), an_upload_queued(), an_upload_queued(two))
    last = await scene.append(an_upload_started(), an_upload_attempt_failed(), an_upload_started(attempt=2))
    async with scene.connected() as watcher:
        await watcher.until_read(last)
        assert (await watcher.subscribe())["position"] == str(last)
        await scene.progress_arrives(an_upload_progressed(percent=5, attempt=2), watcher.hear)

        scene.progress(an_upload_progressed(percent=11, attempt=1))
        scene.progress(an_upload_progressed(two, percent=12))
        scene.progress(an_upload_progressed(an_id("unknown"), percent=13))
        scene.progress(an_upload_progressed(batch_id=an_id("not watched"), percent=14))
        scene.progress(an_upload_progressed(percent=40, attempt=2))
        told = await watcher.hear_until(lambda message: message.get("percent") == 40)

    expected = {"type": "progress", "batch_id": BATCH, "upload_id": UPLOAD, "attempt": 2, "stage": "decode"}
    assert [message for message in told if message != {**expected, "percent": 5}] == [{**expected, "percent": 40}]


async def test_progress_comes_at_most_ten_times_a_second_the_latest_last_and_never_after_the_outcome(
    scene: Scene,
) -> None:
    await scene.append(a_batch_created(), an_upload_queued(), an_upload_started())
    async with scene.connected() as watcher:
        await watcher.subscribe()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        heard: list[dict[str, Any]] = []

        async def hear_one() -> None:
            heard.append(await watcher.hear())

        await scene.progress_arrives(an_upload_progressed(percent=0), hear_one)
        for percent in range(1, 101):
            scene.progress(an_upload_progressed(percent=percent))
            await asyncio.sleep(0.005)
        heard += await watcher.hear_until(lambda message: message["percent"] == 100)
        took_s = loop.time() - began_s
        scene.progress(an_upload_progressed(percent=1))
        scene.progress(an_upload_progressed(percent=2))
        last = await scene.append(an_upload_succeeded())
        ending = await watcher.hear_to(last)
        await asyncio.sleep(0.25)
        await watcher.silence()

    percents = [message["percent"] for message in heard]
    assert percents == sorted(percents)
    assert 2 <= len(percents) <= took_s * 10 + 1
    assert ending[-1]["type"] == "event"


# When something is wrong


async def test_a_batch_that_must_be_looked_up_while_postgres_is_away_is_an_error_and_known_ones_go_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_database: Database, _batch_id: str) -> None:
        raise DatabaseUnavailable("the database cannot be reached: it is away")

    await scene.append(a_batch_created())
    async with scene.connected() as watcher:
        await watcher.subscribe()
        monkeypatch.setattr(Database, "snapshot", away)

        unknown = await watcher.subscribe(an_id("not in memory"))
        known = await watcher.subscribe()
        monkeypatch.undo()
        later = await watcher.subscribe(an_id("not in memory"))

    assert (unknown["type"], unknown["code"]) == ("error", "database_unavailable")
    assert known["type"] == "subscribed"
    assert later["code"] == "not_found"


async def test_a_batch_is_not_called_unknown_while_the_log_cannot_be_read_to_its_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_now(_tail: Tail, _timeout_s: float) -> bool:
        return False

    monkeypatch.setattr(Tail, "reached_end", not_now)
    async with scene.connected() as watcher:
        answer = await watcher.subscribe(an_id("perhaps somewhere"))
        monkeypatch.undo()
        later = await watcher.subscribe(an_id("perhaps somewhere"))

    assert [(each["type"], each["code"]) for each in (answer, later)] == [
        ("error", "log_unavailable"),
        ("error", "not_found"),
    ]


async def test_a_client_that_does_not_read_is_closed_with_4008_and_the_others_go_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "CLOSE_TIMEOUT_S", 60.0)  # it reads on in the end, however long all this takes
    await scene.append(a_batch_created())
    async with scene.connected() as quick, slowly_connected(scene) as slow:
        await quick.subscribe()
        await slow.subscribe()
        slow.socket.transport.pause_reading()

        facts, _ = await append_large_facts(scene, heard_by=quick)
        slow.socket.transport.resume_reading()
        code, reason = await slow.closed()

    told = [json.loads(line)["position"] for frame in slow.frames for line in frame.split("\n")]
    assert len(facts) == 3 * LARGE_UPLOADS
    assert code == 4008
    assert reason == f"too slow, go on with since={told[-1]}"


async def test_a_client_that_never_reads_again_is_cut_off(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CLOSE_TIMEOUT_S", 0.1)
    await scene.append(a_batch_created())
    async with scene.connected() as quick, slowly_connected(scene) as slow:
        await quick.subscribe()
        await slow.subscribe()
        slow.socket.transport.pause_reading()

        await append_large_facts(scene, heard_by=quick)
        await until(lambda: REGISTRY.get_sample_value("sluice_clients") == 1)
        slow.socket.transport.resume_reading()
        code, _ = await slow.closed()

    assert code == 1006, "cut off without a close frame"


async def test_a_client_that_does_not_answer_a_ping_is_taken_as_gone(quiet: Scene) -> None:
    settings = quiet.settings.model_copy(update={"heartbeat_s": 0.2})
    async with notifying(settings) as notifier, asyncio.timeout(SOON_S):
        quiet.port = notifier.port
        code: int | None = None
        while code is None:  # who answers is cut off as well where this machine stands still for a heartbeat
            with contextlib.suppress(ConnectionClosed):
                code = await cut_off_beside_one_who_answers(quiet)

    assert code == 1006


async def cut_off_beside_one_who_answers(scene: Scene) -> int:
    """How a client that answers no ping is closed; raises ConnectionClosed where one who does was closed, too."""
    async with scene.connected() as alive, scene.connected() as dead:
        dead.socket.transport.pause_reading()
        try:
            await until(lambda: (REGISTRY.get_sample_value("sluice_clients") or 0) < 2)
            await alive.silence()
        finally:
            dead.socket.transport.resume_reading()
        code, _ = await dead.closed()
        return code


LARGE_UPLOADS = 250
"""So many results of 30 kB are more than the buffers of both ends and what may wait for a client together."""


@contextlib.asynccontextmanager
async def slowly_connected(scene: Scene) -> AsyncIterator[Watcher]:
    """A client whose end of the connection takes little before the other end has to wait."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
        own.setblocking(False)  # noqa: FBT003  # the standard library's own signature
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", scene.port))
        async with scene.connected(sock=own) as watcher:
            yield watcher


async def append_large_facts(scene: Scene, *, heard_by: Watcher) -> tuple[list[dict[str, Any]], Position]:
    """Many facts with large results; what the client was told of them, and the position of the last. No more come
    before it heard some, so that it is none that does not keep up."""
    large = {**RESULT, "exif": {"Comment": "x" * 30_000}}
    heard: list[dict[str, Any]] = []
    for number in range(LARGE_UPLOADS):
        upload_id = an_id("large", number)
        queued, started = an_upload_queued(upload_id), an_upload_started(upload_id)
        last = await scene.append(queued, started, an_upload_succeeded(upload_id, result=large))
        if number % 10 == 9:
            heard += await heard_by.hear_to(last)
    return heard, last


# Start and stop


async def test_health_is_told_over_http(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port}", timeout=SOON_S) as client:
        async with asyncio.timeout(SOON_S):
            # It is not for a moment where the machine stood still, and tells nobody when it is again.
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110  # see above
                await asyncio.sleep(0.05)
        statuses = {path: (await client.get(path)).status_code for path in ("/livez", "/metrics", "/v1/ws")}
        lost, other = await client.get("/nowhere"), await client.post("/v1/stream")

    assert statuses == {"/livez": 200, "/metrics": 200, "/v1/ws": 404}
    assert [(each.status_code, each.json()["code"]) for each in (lost, other)] == [
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]
    assert {each.headers["Content-Type"] for each in (lost, other)} == {"application/problem+json"}


async def test_sigterm_sends_the_clients_away_with_1012_and_ends_cleanly(quiet: Scene) -> None:
    await quiet.append(a_batch_created())
    (quiet.port,) = free_ports(1)
    async with started(quiet.settings, port=quiet.port) as process:
        await answers(quiet.port, process)
        async with quiet.connected() as first, quiet.connected() as second:
            await first.subscribe()

            process.send_signal(signal.SIGTERM)
            closed = [await first.closed(), await second.closed()]
            code, said = await ended(process)

    assert [close_code for close_code, _ in closed] == [1012, 1012]
    assert code == 0, said
    assert "Traceback" not in said


async def test_sigterm_ends_a_start_that_waits_for_kafka(quiet: Scene) -> None:
    (nobodys,) = free_ports(1)
    away = quiet.settings.model_copy(update={"kafka_bootstrap_servers": f"127.0.0.1:{nobodys}"})
    async with started(away, port=0) as process:
        assert process.stderr is not None
        async with asyncio.timeout(SOON_S):
            while b"waiting_for_part" not in await process.stderr.readline():
                assert process.returncode is None

        process.send_signal(signal.SIGTERM)
        code, said = await ended(process)

    assert code == 0, said
    assert "Traceback" not in said


async def test_a_taken_port_ends_the_start_with_a_sentence(quiet: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with started(quiet.settings, port=port) as process:
            code, said = await ended(process)

    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "Traceback" not in said


@contextlib.asynccontextmanager
async def started(settings: Settings, *, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A notifier of its own process, killed if it does not end by itself."""
    environment = {
        **os.environ,
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "SLUICE_DATABASE_URL": settings.database_url.get_secret_value(),
        "SLUICE_LOG_TOPIC": settings.log_topic,
        "SLUICE_PROGRESS_TOPIC": settings.progress_topic,
        "SLUICE_JWT_SECRET": SECRET,
        "SLUICE_NOTIFIER_PORT": str(port),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.notifier", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """The exit code, and what it said on the way."""
    async with asyncio.timeout(SOON_S):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def answers(port: int, process: asyncio.subprocess.Process) -> None:
    """Wait until the notifier is ready."""
    async with asyncio.timeout(SOON_S), httpx.AsyncClient() as client:
        while process.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
    raise AssertionError("the notifier ended while it started")
