"""The api beside a real processor: read models, pages, positions, results, and what a retry or a removal brings."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from services.demo import PICTURES
from tests.integration.api_client import (
    DONE_TIMEOUT_S,
    Person,
    RunningApi,
    a_picture,
    answered_with,
    api_settings,
    code_of,
    ended,
    processor_beside,
    running_api,
)


@pytest.fixture
async def api(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[RunningApi]:
    """An api and, in a process of its own, the processor of its lane."""
    settings = api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs")
    async with running_api(settings) as running, processor_beside(settings):
        yield running


async def pages(person: Person, path: str, **params: Any) -> AsyncIterator[list[dict[str, Any]]]:
    """The pages of a list, one after the other."""
    cursor: str | None = None
    while True:
        page = (await person.get(path, **params, **({"cursor": cursor} if cursor else {}))).json()
        yield page["items"]
        if (cursor := page["next_cursor"]) is None:
            return


async def test_pictures_become_results_and_thumbnails(ada: Person, tmp_path: Path) -> None:
    files = {name: (PICTURES / name).read_bytes() for name in ("cat.png", "broken-download.jpg", "coffee.webp")}

    made = (await ada.send("/v1/batches", files)).json()
    batch = await ended(ada, made["batch"]["id"])
    uploads = (await ada.get(f"/v1/batches/{batch['id']}/uploads")).json()["items"]
    cat, broken, _ = uploads
    thumbnail = await ada.get(f"/v1/uploads/{cat['id']}/thumbnail")
    (tmp_path / "thumbnail.jpg").write_bytes(thumbnail.content)

    assert (batch["status"], batch["successful_uploads"], batch["failed_uploads"]) == ("completed", 2, 1)
    assert [upload["status"] for upload in uploads] == ["completed", "failed", "completed"]
    assert broken["error"]["code"] == "corrupt_media"
    assert (thumbnail.status_code, thumbnail.headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(tmp_path / "thumbnail.jpg") as image:
        assert image.size == (cat["result"]["thumbnail"]["width"], cat["result"]["thumbnail"]["height"])
    assert code_of(await ada.get(f"/v1/uploads/{broken['id']}/thumbnail")) == "not_found"


async def test_a_list_that_waits_for_a_position_holds_what_was_written(ada: Person) -> None:
    for _ in range(10):
        made = await ada.post("/v1/batches", json={})

        listed = (await ada.get("/v1/batches", min_position=made.headers["Sluice-Position"])).json()["items"]

        assert listed[0]["id"] == made.json()["id"]


async def test_pages_neither_repeat_nor_miss_while_others_write(ada: Person) -> None:
    batch_ids = [await ada.opens_batch() for _ in range(7)]
    last = await ada.send(f"/v1/batches/{batch_ids[0]}/uploads", {f"{n}.jpg": a_picture() for n in range(7)})
    await ada.get("/v1/batches", min_position=last.headers["Sluice-Position"])

    seen_batches: list[str] = []
    async for page in pages(ada, "/v1/batches", limit=3):
        seen_batches += [batch["id"] for batch in page]
        await ada.opens_batch()
    seen_uploads: list[str] = []
    async for page in pages(ada, f"/v1/batches/{batch_ids[0]}/uploads", limit=2):
        seen_uploads += [upload["id"] for upload in page]

    assert seen_batches == batch_ids[::-1]
    assert seen_uploads == [upload["id"] for upload in last.json()["accepted"]]


async def test_a_page_is_the_same_whatever_happened_to_what_stands_on_it(ada: Person) -> None:
    batch_ids = [await ada.opens_batch() for _ in range(6)]
    files = {f"{number}.jpg": a_picture() for number in range(6)}
    last = await ada.send(f"/v1/batches/{batch_ids[0]}/uploads", files)
    position = last.headers["Sluice-Position"]
    first = (await ada.get("/v1/batches", limit=2, min_position=position)).json()
    first_uploads = (await ada.get(f"/v1/batches/{batch_ids[0]}/uploads", limit=2)).json()

    await ada.http.delete(f"/v1/batches/{batch_ids[4]}")  # the one the first page ended with
    await ada.put(batch_ids[0], "late.jpg", a_picture())
    cancelled = await ada.post(f"/v1/batches/{batch_ids[3]}/cancel")
    position = cancelled.headers["Sluice-Position"]
    rest = (await ada.get("/v1/batches", cursor=first["next_cursor"], min_position=position)).json()
    rest_uploads = await ada.get(f"/v1/batches/{batch_ids[0]}/uploads", cursor=first_uploads["next_cursor"])

    assert [batch["id"] for batch in first["items"]] == [batch_ids[5], batch_ids[4]]
    assert [batch["id"] for batch in rest["items"]] == [batch_ids[3], batch_ids[2], batch_ids[1], batch_ids[0]]
    assert [upload["filename"] for upload in first_uploads["items"]] == ["0.jpg", "1.jpg"]
    assert [upload["filename"] for upload in rest_uploads.json()["items"]] == [
        "2.jpg",
        "3.jpg",
        "4.jpg",
        "5.jpg",
        "late.jpg",
    ]


async def test_what_has_not_changed_is_not_sent_again(ada: Person) -> None:
    files = {"cat.png": (PICTURES / "cat.png").read_bytes()}
    made = (await ada.send("/v1/batches", files)).json()
    batch_id = made["batch"]["id"]
    await ended(ada, batch_id)
    await ada.get("/v1/batches", min_position=(await ended(ada, batch_id))["position"])
    paths = [
        "/v1/batches",
        f"/v1/batches/{batch_id}",
        f"/v1/batches/{batch_id}/uploads",
        f"/v1/batches/{batch_id}/events",
        f"/v1/uploads/{made['accepted'][0]['id']}",
    ]

    first = [await ada.get(path) for path in paths]
    tags = [answer.headers["ETag"] for answer in first]
    again = [await conditional(ada, path, tag) for path, tag in zip(paths, tags, strict=True)]
    other = [await conditional(ada, path, '"other"') for path in paths]
    deleted = await ada.http.delete(f"/v1/batches/{batch_id}")
    await ada.get("/v1/batches", min_position=deleted.headers["Sluice-Position"])
    changed = [await conditional(ada, path, tag) for path, tag in zip(paths, tags, strict=True)]

    assert [(answer.status_code, answer.content) for answer in again] == [(304, b"")] * len(paths)
    assert [answer.headers["ETag"] for answer in again] == tags
    assert [answer.content for answer in other] == [answer.content for answer in first]
    assert [answer.status_code for answer in changed] == [200, 404, 404, 404, 404]


async def conditional(person: Person, path: str, tag: str) -> httpx.Response:
    return await person.http.get(path, headers={"If-None-Match": f'"no", W/{tag}'})


async def test_lists_are_filtered_by_status(ada: Person) -> None:
    files = {name: (PICTURES / name).read_bytes() for name in ("cat.png", "broken-download.jpg")}
    open_batch = await ada.opens_batch()
    done = (await ada.send("/v1/batches", files)).json()["batch"]["id"]
    position = (await ended(ada, done))["position"]

    pending = await ada.get("/v1/batches", status="pending", min_position=position)
    completed = await ada.get("/v1/batches", status="completed")
    failed = await ada.get(f"/v1/batches/{done}/uploads", status="failed")

    assert [batch["id"] for batch in pending.json()["items"]] == [open_batch]
    assert [batch["id"] for batch in completed.json()["items"]] == [done]
    assert [upload["filename"] for upload in failed.json()["items"]] == ["broken-download.jpg"]


async def test_a_repetition_is_told_the_thing_as_it_is_now(ada: Person) -> None:
    files = {"cat.png": (PICTURES / "cat.png").read_bytes()}
    first = await ada.send("/v1/batches", files, key="k")
    done = await ended(ada, first.json()["batch"]["id"])

    again = await ada.send("/v1/batches", files, key="k")

    assert (again.status_code, again.headers["Sluice-Position"]) == (202, first.headers["Sluice-Position"])
    assert again.json()["batch"] == done
    assert again.json()["accepted"][0]["status"] == "completed"


async def test_a_failed_upload_is_retried_once_under_a_key(ada: Person) -> None:
    made = (await ada.send("/v1/batches", {"b.jpg": (PICTURES / "broken-download.jpg").read_bytes()})).json()
    batch_id, upload_id = made["batch"]["id"], made["accepted"][0]["id"]
    failed = await ended(ada, batch_id)

    retried = await ada.post(f"/v1/uploads/{upload_id}/retry", key="k")
    failed_again = await ended_after(ada, batch_id, failed)
    repeated = await ada.post(f"/v1/uploads/{upload_id}/retry", key="k")
    batch = (await ada.get(f"/v1/batches/{batch_id}", min_position=failed_again["position"])).json()
    whole = await ada.post(f"/v1/batches/{batch_id}/retry", key="k")
    failed_at_last = await ended_after(ada, batch_id, failed_again)
    both = [await ada.post(f"/v1/{which}/retry", key="k") for which in (f"uploads/{upload_id}", f"batches/{batch_id}")]
    untouched = (await ada.get(f"/v1/batches/{batch_id}", min_position=failed_at_last["position"])).json()

    assert failed["status"] == "failed"
    # An answer tells how the thing is when it is given; by then the processor may have been at it once more.
    assert (retried.status_code, whole.status_code) == (202, 202)
    assert retried.json()["error"] is None or retried.json()["attempts"] == 2
    assert (whole.json()["status"] == "processing") == (whole.json()["completed_at"] is None)
    assert (repeated.status_code, repeated.json()["attempts"]) == (202, 2)
    assert repeated.headers["Sluice-Position"] == retried.headers["Sluice-Position"]
    assert batch == failed_again
    # The older request is a repetition after the newer one, too.
    assert [answer.status_code for answer in both] == [202, 202]
    assert both[0].headers["Sluice-Position"] == retried.headers["Sluice-Position"]
    assert both[1].headers["Sluice-Position"] == whole.headers["Sluice-Position"]
    assert untouched == failed_at_last


async def ended_after(person: Person, batch_id: str, before: dict[str, Any]) -> dict[str, Any]:
    """The batch when it ended another time."""
    async with asyncio.timeout(DONE_TIMEOUT_S):
        while True:
            batch = await ended(person, batch_id)
            if batch["completed_at"] != before["completed_at"]:
                return batch
            await asyncio.sleep(0.05)


async def test_a_removed_batch_is_gone_at_once_and_its_files_soon(api: RunningApi, ada: Person) -> None:
    made = (await ada.send("/v1/batches", {"cat.png": (PICTURES / "cat.png").read_bytes()})).json()
    batch_id, upload_id = made["batch"]["id"], made["accepted"][0]["id"]
    await ended(ada, batch_id)

    removed = await ada.http.delete(f"/v1/batches/{batch_id}")
    found = [await ada.get(f"/v1/batches/{batch_id}"), await ada.get(f"/v1/uploads/{upload_id}")]
    listed = await ada.get("/v1/batches", min_position=removed.headers["Sluice-Position"])

    assert removed.status_code == 204
    assert {code_of(answer) for answer in found} == {"not_found"}
    assert listed.json()["items"] == []
    async with asyncio.timeout(DONE_TIMEOUT_S):
        while api.blobs:  # noqa: ASYNC110  # a folder cannot be awaited
            await asyncio.sleep(0.05)


async def test_a_cancelled_batch_is_not_worked_on(ada: Person) -> None:
    batch_id = await ada.opens_batch()
    await ada.post(f"/v1/batches/{batch_id}/cancel")

    status = await answered_with(lambda: ada.get("/v1/status"), lambda body: body["mode"] == "full")
    answer = await ada.get(f"/v1/batches/{batch_id}")

    assert (answer.json()["status"], answer.json()["progress"]) == ("cancelled", 1.0)
    assert status["degraded"] == []
