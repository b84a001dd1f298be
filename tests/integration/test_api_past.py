"""History over HTTP: what happened to a batch, and the batch as it was at any position or time."""

import asyncio
from typing import Any

from schemas.position import Position
from services.demo import PICTURES
from tests.integration.api_client import (
    Person,
    RunningApi,
    a_picture,
    code_of,
    ended,
    processor_beside,
    running_api,
)
from tests.integration.judge import judge


async def events_of(person: Person, batch_id: str, *, limit: int = 200) -> list[dict[str, Any]]:
    """The whole history, page by page."""
    found: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await person.get(f"/v1/batches/{batch_id}/events", limit=limit, **cursor)).json()
        found += page["items"]
        assert len(page["items"]) <= limit
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


async def test_the_history_of_a_worked_batch_is_that_of_the_log(api: RunningApi, ada: Person) -> None:
    files = {name: (PICTURES / name).read_bytes() for name in ("cat.png", "broken-download.jpg")}
    async with processor_beside(api.settings):
        batch_id = await ada.opens_batch(name="n")
        await ada.send(f"/v1/batches/{batch_id}/uploads", files, key="k")
        await ada.post(f"/v1/batches/{batch_id}/seal")
        await ended(ada, batch_id)
        projected = await events_of(ada, batch_id)
    await ada.post(f"/v1/batches/{batch_id}/retry")
    events = await events_of(ada, batch_id, limit=2)

    log = await judge(api.settings)
    facts = [(fact, why) for fact, why in log.became if fact.batch_id == batch_id]

    assert [(each["id"], each["type"], each["position"], each["ignored"]) for each in events] == [
        (fact.id, fact.event.type, log.position(fact), why) for fact, why in facts
    ]
    assert events[: len(projected)] == projected
    assert not {"blob", "request", "key_hash"} & {name for event in events for name in event["data"]}
    assert events[0]["data"]["name"] == "n"
    assert [event["type"] for event in events][-1] == "sluice.UploadRetried.v1"


async def test_ignored_facts_stand_in_the_history_with_the_reason(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch(expected_uploads=1)
    async with running_api(api.settings) as replica:
        elsewhere = await replica.person("ada")
        for number in range(20):  # until two of them race
            batch_id = await ada.opens_batch(expected_uploads=1)
            await _both(ada.put(batch_id, f"{number}.jpg", a_picture()), elsewhere.put(batch_id, "b.jpg", a_picture()))
            events = await events_of(ada, batch_id)
            if len(events) > 2:
                break

    assert [event["ignored"] for event in events] == [None, None, "batch_sealed"]


async def test_a_batch_as_it_was_is_the_fold_of_the_log_up_to_there(api: RunningApi, ada: Person) -> None:
    files = {name: (PICTURES / name).read_bytes() for name in ("cat.png", "broken-download.jpg")}
    async with processor_beside(api.settings):
        batch_id = (await ada.send("/v1/batches", files)).json()["batch"]["id"]
        await ended(ada, batch_id)
    events = await events_of(ada, batch_id)
    path = f"/v1/batches/{batch_id}"

    for event in events:
        log = await judge(api.settings, upto=Position.parse(event["position"]))
        assert (await ada.get(path, at=event["position"])).json() == log.view(batch_id)
    for time in {event["time"] for event in events}:
        last = [event["position"] for event in events if event["time"] <= time][-1]
        assert (await ada.get(path, at=time)).json() == (await ada.get(path, at=last)).json()
    now = (await ada.get(path)).json()
    assert (await ada.get(path, at=events[-1]["position"])).json() == now
    assert (await ada.get(path, at="2999-12-31T23:59:59+01:00")).json() == now
    assert {(await ada.get(path, at=event["position"])).json()["status"] for event in events} == {
        "pending",
        "processing",
        "completed",
    }


async def test_a_moment_that_makes_no_sense_is_said(api: RunningApi, ada: Person) -> None:
    first = await ada.post("/v1/batches", json={})
    path = f"/v1/batches/{first.json()['id']}"
    log_id, ahead = api.tail.position().log, api.tail.position().at(0, 10**9)

    answers = {
        "invalid_position": [await ada.get(path, at=at) for at in ("yesterday", "", "2026-01-31", "1769860800")],
        "position_of_another_log": [await ada.get(path, at="00000000.0-1")],
        "projection_behind": [await ada.get(path, at=str(ahead)), await ada.get(path, at=f"{log_id}.1-0")],
        "not_found": [
            await ada.get(path, at=f"{log_id}.0-0"),
            await ada.get(path, at="1999-12-31T23:59:59Z"),
            await ada.get("/v1/batches/nope", at="2999-12-31T23:59:59Z"),
            await ada.get("/v1/batches/nope/events"),
        ],
        "invalid_request": [
            await ada.get(f"{path}/events", limit=0),
            await ada.get(f"{path}/events", limit=201),
            await ada.get(f"{path}/events", cursor="nonsense"),
        ],
    }

    for code, given in answers.items():
        assert [code_of(answer) for answer in given] == [code] * len(given)


async def test_the_past_of_others_and_of_what_was_deleted_is_not_found(api: RunningApi, ada: Person) -> None:
    grace = await api.person("grace")
    batch_id = await ada.opens_batch()
    path, then = f"/v1/batches/{batch_id}", str(api.tail.position())
    foreign = [await grace.get(f"{path}/events"), await grace.get(path, at=then)]

    await ada.http.delete(path)
    deleted = [await ada.get(f"{path}/events"), await ada.get(path, at=then)]

    assert {code_of(answer) for answer in (*foreign, *deleted)} == {"not_found"}


async def _both(*wishes: Any) -> None:
    async with asyncio.TaskGroup() as tasks:
        for wish in wishes:
            tasks.create_task(wish)
