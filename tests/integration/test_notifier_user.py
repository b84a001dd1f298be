"""Following all batches of a user: real WebSockets, on real Kafka and Postgres with two partitions."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from schemas.batch import Changed
from schemas.events import Fact, LogEvent, decode
from schemas.position import Position
from services.database import Database, DatabaseUnavailable, Snapshot
from services.eventlog import LogUnavailable
from services.lifecycle import cancelled
from services.notifier import followings
from services.notifier import main as notifier_main
from services.notifier.main import notifying
from services.settings import Settings
from tests.examples import (
    OTHER_USER,
    USER,
    State,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    an_id,
    an_upload_failed,
    an_upload_progressed,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
)
from tests.notifiers import SOON_S, Scene, Watcher, following_projection, settings_for, types_of, until

PARTITIONS = 2


@pytest.fixture
def settings(kafka: str, database_url: str, unique: str) -> Settings:
    settings = settings_for(kafka=kafka, database_url=database_url, unique=unique)
    return settings.model_copy(update={"partitions": PARTITIONS})


@contextlib.asynccontextmanager
async def projected(scene: Scene) -> AsyncIterator[None]:
    """The read models follow the log in all partitions."""
    async with contextlib.AsyncExitStack() as stack:
        for partition in range(PARTITIONS):
            await stack.enter_async_context(following_projection(scene, partition=partition))
        yield


async def until_projected(scene: Scene, position: Position) -> None:
    database = await Database.open(scene.settings.database_url.get_secret_value())
    try:
        async with asyncio.timeout(SOON_S):
            while True:
                with contextlib.suppress(DatabaseUnavailable):
                    lanes = await database.positions()
                    if all(p in lanes and lanes[p].next_offset > offset for p, offset in position.offsets):
                        return
                await asyncio.sleep(0.02)
    finally:
        await database.close()


def a_story(name: str, *, partition: int = 0) -> tuple[str, list[LogEvent]]:
    """A batch whose upload fails, is retried and succeeds; its id and its facts, the last two of which end it anew."""
    batch_id = an_id("batch", name, partition=partition)
    upload_id = an_id("upload", name, partition=partition)
    failed = {"status": "failed", "total_uploads": 1, "successful_uploads": 0, "failed_uploads": 1}
    return batch_id, [
        a_batch_created(batch_id),
        an_upload_queued(upload_id, batch_id),
        a_batch_sealed(batch_id),
        an_upload_started(upload_id, batch_id),
        an_upload_failed(upload_id, batch_id),
        a_batch_completed(batch_id, **failed),
        an_upload_retried(upload_id, batch_id),
        an_upload_started(upload_id, batch_id, attempt=2),
        an_upload_succeeded(upload_id, batch_id, attempt=2),
        a_batch_completed(batch_id),
    ]


ENDED, RETRIED = 6, 7
"""How many facts of a story end its batch, and how many take it up again."""


def batches_of(heard: list[dict[str, Any]]) -> list[str]:
    return [message["event"]["data"]["batch_id"] for message in heard if message["type"] == "event"]


async def hear_all(watcher: Watcher) -> list[dict[str, Any]]:
    """What waits for the client by now."""
    await watcher.say({"type": "ping"})
    return (await watcher.hear_until(lambda message: message["type"] == "pong"))[:-1]


@pytest.mark.parametrize("with_read_models", [False, True], ids=["nothing projected", "projected"])
async def test_a_subscriber_is_given_its_unfinished_and_newest_batches_and_then_every_fact_of_all(
    quiet: Scene, monkeypatch: pytest.MonkeyPatch, *, with_read_models: bool
) -> None:
    monkeypatch.setattr(followings, "NEWEST_MAX", 2)
    oldest, unfinished = an_id("oldest"), an_id("unfinished", partition=1)
    ended = [a_story(f"ended {number}") for number in range(3)]
    gone = an_id("gone")
    await quiet.append(a_batch_created(unfinished), partition=1)
    await quiet.append(a_batch_created(oldest), a_batch_cancelled(oldest), a_batch_created(gone))
    await quiet.append(a_batch_created(an_id("foreign"), user_id=OTHER_USER), a_batch_deleted(gone))
    for _, story in ended:
        last = await quiet.append(*story[:ENDED])
    async with contextlib.AsyncExitStack() as stack:
        if with_read_models:
            await stack.enter_async_context(projected(quiet))
            await until_projected(quiet, last)
        notifier = await stack.enter_async_context(notifying(quiet.settings))
        quiet.port = notifier.port
        async with quiet.connected() as watcher:
            snapshot = await watcher.subscribe_user()
            fresh = an_id("fresh", partition=1)
            await quiet.append(a_batch_sealed(unfinished), a_batch_created(fresh), partition=1)
            last = await quiet.append(a_batch_created(an_id("foreign 2"), user_id=OTHER_USER), ended[0][1][ENDED])
            heard = []
            while len(heard) < 3:
                heard.append(await watcher.hear())
            await watcher.silence()

    assert [snapshot[key] for key in ("type", "user", "truncated", "recovered")] == ["subscribed", True, True, False]
    assert {batch["id"] for batch in snapshot["batches"]} == {unfinished, ended[1][0], ended[2][0]}
    assert sorted(zip(batches_of(heard), types_of(heard), strict=True)) == sorted(
        [(unfinished, "BatchSealed"), (fresh, "BatchCreated"), (ended[0][0], "UploadRetried")]
    )
    retried = next(message for message in heard if types_of([message]) == ["UploadRetried"])
    assert (retried["batch"]["status"], retried["batch"]["failed_uploads"]) == ("processing", 0)


async def test_a_user_without_batches_is_told_of_the_first_one(scene: Scene) -> None:
    async with scene.connected() as watcher:
        snapshot = await watcher.subscribe_user()
        last = await scene.append(a_batch_created(an_id("first")))
        heard = await watcher.hear()

    assert (snapshot["batches"], snapshot["truncated"]) == ([], False)
    assert Position.parse(heard["position"]).offset(0) == last.offset(0)


async def test_a_fact_is_told_once_however_many_subscriptions_match(scene: Scene) -> None:
    batch_id, story = a_story("once")
    since = await scene.append(*story[:1])
    async with scene.connected() as watcher:
        await watcher.subscribe(batch_id)
        await watcher.subscribe_user()
        await watcher.subscribe_user()
        await watcher.subscribe(batch_id)
        await scene.append(*story[1:3])
        both = [await watcher.hear() for _ in range(2)]
        resumed = [
            await watcher.subscribe(batch_id, since=str(since.at(1, 0))),
            await watcher.subscribe_user(since=str(since.at(1, 0))),
        ]
        await watcher.ask({"type": "unsubscribe", "batch_id": batch_id})
        await scene.append(story[3])
        by_user = await watcher.hear()
        left = await watcher.ask({"type": "unsubscribe", "user": True})
        await scene.append(story[4])
        await watcher.silence()

    assert types_of([*both, by_user]) == ["UploadQueued", "BatchSealed", "UploadStarted"]
    assert [answer["recovered"] for answer in resumed] == [True, True]
    assert left == {"type": "unsubscribed", "user": True}


async def test_progress_of_any_batch_of_the_user_is_told(scene: Scene) -> None:
    batch_id, story = a_story("progress")
    await scene.append(*story[:4])
    async with scene.connected() as watcher, scene.connected(OTHER_USER) as other:
        await watcher.subscribe_user()
        await other.subscribe_user()

        told: list[dict[str, Any]] = []

        async def hear() -> None:
            told.append(await watcher.hear())

        await scene.progress_arrives(an_upload_progressed(an_id("upload", "progress"), batch_id, percent=30), hear)
        await other.silence()

    assert [(each["type"], each["batch_id"], each["percent"]) for each in told] == [("progress", batch_id, 30)]


@pytest.mark.parametrize("memory", ["ring", "history", "two notifiers"])
async def test_a_client_that_is_cut_after_every_message_ends_with_what_the_log_says(
    quiet: Scene, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    if memory == "history":
        monkeypatch.setattr(notifier_main, "HISTORY_BYTES_MAX", 0)
    settings = quiet.settings.model_copy(update={"tail_batches_max": 1})
    async with contextlib.AsyncExitStack() as stack:
        notifiers = [
            await stack.enter_async_context(notifying(settings)) for _ in range(2 if memory == "two notifiers" else 1)
        ]
        await stack.enter_async_context(projected(quiet))
        turns = asyncio.Semaphore(0)
        telling = asyncio.create_task(tell_stories(quiet, turns))
        seen: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
        since: str | None = None
        first: Position | None = None
        rounds = 0
        while True:
            quiet.port = notifiers[rounds % len(notifiers)].port
            rounds += 1
            told_to = telling.result() if telling.done() else None
            for _ in range(APPENDS_A_ROUND):
                turns.release()
            async with quiet.connected() as watcher:
                await watcher.say(
                    {"type": "subscribe", "user": True, **({"since": since} if since else {})}, {"type": "ping"}
                )
                answer, message = await watcher.hear(), await watcher.hear()
            assert answer["recovered"] is (since is not None), answer
            first = first or Position.parse(answer["position"])
            if message["type"] == "event":
                partition = int(message["event"]["data"]["batch_id"][-2:], 16)
                after = Position.parse(message["position"])
                assert since is None or after.includes(Position.parse(since))
                seen[partition].append(after.offset(partition) or 0)
            since = message.get("position") or answer["position"]
            if told_to is not None and message["type"] == "pong" and Position.parse(since).includes(told_to):
                break

    state = State()
    expected: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
    for fact in await facts_of(quiet):
        effective = isinstance(state.apply(fact), Changed) and fact.batch_id is not None
        if effective and not fact_of_other(fact, state) and fact.offset > (first.offset(fact.partition) or 0):
            expected[fact.partition].append(fact.offset)
    assert seen == expected
    assert min(len(offsets) for offsets in seen.values()) > 15


async def test_who_follows_all_from_a_later_place_is_told_what_it_missed_of_one_batch(quiet: Scene) -> None:
    batch_id, story = a_story("told before")
    await quiet.append(*story[:1])
    since = await quiet.append(*story[1:2])
    async with notifying(quiet.settings) as notifier:
        quiet.port = notifier.port
        async with quiet.connected() as watcher:
            end = await quiet.append(*story[2:ENDED])
            await watcher.until_read(end)
            await watcher.subscribe_user()
            answer = await watcher.subscribe(batch_id, since=str(since.at(1, 1)))
            again = await watcher.hear_to(end.at(1, 1))
            await quiet.append(*story[ENDED:])
            live = await watcher.hear_until(lambda message: message["event"]["type"].endswith("BatchCompleted.v1"))
            answer_again = await watcher.subscribe(batch_id, since=str(since.at(1, 1)))
            await watcher.silence()

    assert (answer["recovered"], answer_again["recovered"]) == (True, True)
    assert types_of([*again, *live]) == [event.type.split(".")[1] for event in story[2:]]


def fact_of_other(fact: Fact, state: State) -> bool:
    return state.batches[fact.batch_id or ""].user_id != USER


APPENDS_A_ROUND = 2


async def tell_stories(scene: Scene, turns: asyncio.Semaphore) -> Position:
    """Several batches in each partition, each fact said twice, one of them deleted in the end; an append a turn. Where
    the log ends then."""
    ends: dict[int, int] = {}
    stories = [a_story(f"story {number}", partition=number % PARTITIONS) for number in range(5)]
    for step in range(len(stories[0][1])):
        for number, (_, story) in enumerate(stories):
            await turns.acquire()
            ends |= (await scene.append(story[step], story[step], partition=number % PARTITIONS)).offsets
    await scene.append(a_batch_created(an_id("foreign"), user_id=OTHER_USER))
    ends |= (await scene.append(a_batch_deleted(stories[0][0]), a_batch_deleted(stories[0][0]))).offsets
    return Position.of(scene.log_id, ends)


async def facts_of(scene: Scene) -> list[Fact]:
    reader = scene.log.reader(range(PARTITIONS))
    for partition in range(PARTITIONS):
        await reader.seek(partition, 0)
    end = sum((await reader.ends()).values())
    facts: list[Fact] = []
    while len(facts) < end:
        with contextlib.suppress(LogUnavailable):
            records = await reader.read(records_max=10_000, timeout_ms=1_000)
            facts += [fact for record in records if isinstance(fact := decode(record), Fact)]
    await reader.close()
    return sorted(facts, key=lambda fact: (fact.partition, fact.offset))


async def test_when_postgres_goes_who_follows_all_is_sent_away_with_its_position_and_the_others_go_on(
    quiet: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_database: Database, _batch_id: str) -> None:
        raise DatabaseUnavailable("the database cannot be reached: it is away")

    batch_id, story = a_story("known")
    await quiet.append(*story[:1])
    async with notifying(quiet.settings) as notifier:
        quiet.port = notifier.port
        async with quiet.connected() as following, quiet.connected() as watcher:
            since = (await following.subscribe_user())["position"]
            await watcher.subscribe(batch_id)
            monkeypatch.setattr(Database, "snapshot", away)

            await quiet.append(*story[1:2])
            both = [await following.hear(), await watcher.hear()]
            await quiet.append(a_batch_created(an_id("must be looked up")))
            await quiet.append(*story[2:3])
            code, reason = await following.closed()
            goes_on = await watcher.hear()
            refused = await watcher.subscribe_user()
            monkeypatch.undo()
            await until(lambda: not notifier.followings.users)
            async with quiet.connected() as again:
                answer = await again.subscribe_user(since=both[0]["position"])
                missed = await hear_all(again)

    assert (code, since in str(both[0])) == (1012, False)
    assert both[0]["position"] in reason
    assert types_of([goes_on]) == ["BatchSealed"]
    assert (refused["type"], refused["code"]) == ("error", "database_unavailable")
    assert answer["recovered"] is True
    assert types_of(missed) == ["BatchCreated", "BatchSealed"]


async def test_who_has_too_many_unfinished_batches_is_refused_in_words(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followings, "UNFINISHED_MAX", 1)
    async with projected(scene):
        last = await scene.append(*(a_batch_created(an_id("open", number)) for number in range(2)))
        await until_projected(scene, last)
        async with scene.connected() as watcher:
            answer = await watcher.subscribe_user()

    assert (answer["type"], answer["code"]) == ("error", "invalid_request")
    assert "one by one" in answer["detail"]


async def test_of_very_many_unfinished_batches_the_newest_are_listed_and_the_facts_of_all_are_told(
    quiet: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followings, "UNFINISHED_SHOWN_MAX", 4)
    monkeypatch.setattr(followings, "NEWEST_MAX", 2)
    settings = quiet.settings.model_copy(update={"tail_batches_max": 2})
    stories = [a_story(f"open {number}") for number in range(12)]
    ids = [batch_id for batch_id, _ in stories]
    for _, story in stories:
        await quiet.append(*story[:3])
    last = await quiet.append(a_batch_created(an_id("ended")), a_batch_cancelled(an_id("ended")))
    async with projected(quiet):
        await until_projected(quiet, last)
        async with notifying(settings) as notifier:
            quiet.port = notifier.port
            async with quiet.connected() as watcher:
                snapshot = await watcher.subscribe_user()
                held = {batch.id for batch in notifier.tail.held_of(USER)}

                # A worker's facts do not name the user; these are of batches that are neither listed nor in memory.
                for _, story in stories[:8]:
                    last = await quiet.append(*story[3:])
                heard = await watcher.hear_until(lambda message: f".0-{last.offset(0)}" in message["position"])
                await until_projected(quiet, last)
                await until(lambda: len(notifier.tail.held_of(USER)) <= len(held))
                last = await quiet.append(*stories[8][1][3:4])
                again = await watcher.hear()

    assert [batch["id"] for batch in snapshot["batches"]] == [an_id("ended"), *reversed(ids[-4:])]
    assert snapshot["truncated"] is True
    assert held.isdisjoint(ids[:8])
    expected = [batch_id for batch_id, story in stories[:8] for _ in story[3:]]
    assert batches_of(heard) == expected
    ended = [message["batch"]["status"] for message in heard if message["event"]["type"].startswith("sluice.BatchCom")]
    assert ended == ["failed", "completed"] * 8
    assert (batches_of([again]), again["batch"]["status"]) == ([ids[8]], "processing")


async def test_a_list_too_large_for_one_message_leaves_ended_batches_out_and_then_the_oldest(scene: Scene) -> None:
    large = {"about": "x" * 15_900}
    ended = [an_id("ended", number) for number in range(40)]
    for batch_id in ended:
        await scene.append(a_batch_created(batch_id, metadata=large), a_batch_cancelled(batch_id))
    last = await scene.append(a_batch_created(an_id("open")))

    async with scene.connected() as watcher:
        await watcher.until_read(last)
        some = await watcher.subscribe_user()
        for number in range(40):
            last = await scene.append(a_batch_created(an_id("open", number), metadata=large))
        await watcher.hear_until(lambda message: f".0-{last.offset(0)}" in message["position"])
        await watcher.ask({"type": "unsubscribe", "user": True})
        newest = await watcher.subscribe_user()

    assert ([batch["id"] for batch in some["batches"]], some["truncated"]) == ([an_id("open")], True)
    shown = [batch["id"] for batch in newest["batches"]]
    assert shown == [an_id("open", number) for number in reversed(range(40 - len(shown), 40))]
    assert (len(shown), newest["truncated"]) == (20, True)


async def test_a_following_ends_a_while_after_its_last_client_left_and_memory_is_given_back(quiet: Scene) -> None:
    settings = quiet.settings.model_copy(update={"tail_batches_max": 3})
    async with projected(quiet), notifying(settings) as notifier:
        quiet.port = notifier.port
        notifier.followings.linger_s = 0.0
        async with quiet.connected() as watcher:
            await watcher.subscribe_user()
            last = await quiet.append(*(a_batch_created(an_id("open", number)) for number in range(20)))
            await until_projected(quiet, last)
            heard = [await watcher.hear() for _ in range(20)]
            held = len(notifier.tail.held_of(USER))

        await until(lambda: not notifier.followings.users)
        await until(lambda: len(notifier.tail.held_of(USER)) <= 3)

    assert len(batches_of(heard)) == held == 20


async def test_more_batches_in_work_than_memory_allows_send_who_follows_them_away_with_its_position(
    quiet: Scene,
) -> None:
    settings = quiet.settings.model_copy(update={"tail_batches_max": 1})
    async with notifying(settings) as notifier:
        quiet.port = notifier.port
        async with quiet.connected() as watcher:
            since = (await watcher.subscribe_user())["position"]
            await quiet.append(*(a_batch_created(an_id("open", number)) for number in range(20)))
            code, reason = await watcher.closed()

    assert (code, since in reason) == (1012, True)


async def test_who_leaves_before_it_was_answered_leaves_nothing_behind(
    quiet: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = an_id("one"), an_id("other")
    last = await quiet.append(a_batch_created(one), a_batch_created(other))
    asked, answered = asyncio.Event(), asyncio.Event()
    snapshot = Database.snapshot

    async def slowly(self: Database, batch_id: str) -> Snapshot:
        asked.set()
        await answered.wait()
        return await snapshot(self, batch_id)

    async with notifying(quiet.settings) as notifier:
        assert await notifier.tail.reached(last, SOON_S)
        notifier.watches.linger_s = notifier.followings.linger_s = 0.0
        monkeypatch.setattr(Database, "snapshot", slowly)
        finds: list[AbstractAsyncContextManager[object]] = [notifier.watches.find(one), notifier.followings.find(USER)]
        for find in finds:
            asked.clear()
            answered.clear()
            finding = asyncio.create_task(find.__aenter__())
            await asked.wait()
            await cancelled(finding)
            assert notifier.watches.batches or notifier.followings.users
            answered.set()
            await until(lambda: not notifier.watches.batches and not notifier.followings.users)
