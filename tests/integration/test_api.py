"""The api over real HTTP on real Kafka, Postgres and a blob folder, with no processor: everything from the tail."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import httpx
import pytest

from services.eventlog import EventLog, LogSettings
from tests.integration.api_client import (
    DONE_TIMEOUT_S,
    Person,
    RunningApi,
    a_picture,
    answered,
    answered_with,
    api_settings,
    code_of,
    running_api,
    sha256,
)

MIB = 1024 * 1024


@pytest.fixture
async def grace(api: RunningApi) -> Person:
    return await api.person("grace")


async def test_a_form_of_pictures_becomes_a_sealed_batch(api: RunningApi, ada: Person) -> None:
    pictures = {f"{number}.jpg": a_picture() for number in range(3)}

    answer = await ada.send("/v1/batches", pictures, name="holiday")

    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert body["rejected"] == []
    assert [upload["filename"] for upload in body["accepted"]] == list(pictures)
    assert [upload["sha256"] for upload in body["accepted"]] == [sha256(each) for each in pictures.values()]
    assert (body["batch"]["name"], body["batch"]["sealed"], body["batch"]["total_uploads"]) == ("holiday", True, 3)
    assert answer.headers["Location"] == f"/v1/batches/{body['batch']['id']}"
    assert answer.headers["Sluice-Position"] == body["batch"]["position"]
    assert len(api.blobs) == 3


async def test_what_was_just_made_is_found_though_nothing_is_projected(ada: Person) -> None:
    made = (await ada.send("/v1/batches", {"a.jpg": a_picture(), "b.jpg": a_picture()})).json()

    batch = await ada.get(f"/v1/batches/{made['batch']['id']}")
    uploads = await ada.get(f"/v1/batches/{made['batch']['id']}/uploads")
    upload = await ada.get(f"/v1/uploads/{made['accepted'][0]['id']}")

    assert batch.json() == made["batch"]
    assert uploads.json() == {"items": made["accepted"], "next_cursor": None}
    assert upload.json() == made["accepted"][0]


async def test_another_api_on_the_same_log_finds_it_too(api: RunningApi, ada: Person) -> None:
    async with running_api(api.settings) as replica:
        ada_elsewhere = await replica.person("ada")

        made = (await ada.send("/v1/batches", {"a.jpg": a_picture()})).json()
        batch = await ada_elsewhere.get(f"/v1/batches/{made['batch']['id']}")
        put = await ada_elsewhere.put(made["batch"]["id"], "b.jpg", a_picture())

    assert batch.json() == made["batch"]
    assert code_of(put) == "batch_sealed"


async def test_a_batch_is_open_until_it_is_sealed(ada: Person) -> None:
    batch_id = await ada.opens_batch(name="n", metadata={"trip": "Iceland"})

    first = await ada.send(f"/v1/batches/{batch_id}/uploads", {"a.jpg": a_picture()})
    sealed = await ada.post(f"/v1/batches/{batch_id}/seal")
    again = await ada.post(f"/v1/batches/{batch_id}/seal")
    late = await ada.send(f"/v1/batches/{batch_id}/uploads", {"b.jpg": a_picture()})

    assert first.status_code == 202
    assert (sealed.status_code, sealed.json()["sealed"], sealed.json()["metadata"]) == (202, True, {"trip": "Iceland"})
    assert (again.status_code, again.headers["Sluice-Position"]) == (202, sealed.headers["Sluice-Position"])
    assert (late.status_code, code_of(late)) == (409, "batch_sealed")


async def test_a_batch_seals_itself_when_the_expected_uploads_came(ada: Person) -> None:
    batch_id = await ada.opens_batch(expected_uploads=2)

    await ada.put(batch_id, "a.jpg", a_picture())
    before = (await ada.get(f"/v1/batches/{batch_id}")).json()
    await ada.put(batch_id, "b.jpg", a_picture())
    after = (await ada.get(f"/v1/batches/{batch_id}")).json()

    assert (before["sealed"], after["sealed"]) == (False, True)


async def test_bad_files_are_rejected_and_the_good_ones_go_on(api: RunningApi, ada: Person) -> None:
    files = {"good.jpg": a_picture(), "empty.jpg": b"", "note.jpg": b"only text", "../..": a_picture()}

    answer = await ada.send("/v1/batches", files)

    body = answer.json()
    assert [upload["filename"] for upload in body["accepted"]] == ["good.jpg"]
    assert [(each["filename"], each["code"]) for each in body["rejected"]] == [
        ("empty.jpg", "empty_file"),
        ("note.jpg", "unsupported_media_type"),
        ("../..", "invalid_request"),
    ]
    assert len(api.blobs) == 1


async def test_a_form_with_nothing_good_makes_no_batch(api: RunningApi, ada: Person) -> None:
    answer = await ada.send("/v1/batches", {"note.txt": b"text", "empty.jpg": b""})

    assert (answer.status_code, code_of(answer)) == (415, "unsupported_media_type")
    assert [each["code"] for each in answer.json()["rejected"]] == ["unsupported_media_type", "empty_file"]
    assert (await ada.get("/v1/batches")).json()["items"] == []
    assert api.blobs == []


async def test_a_put_is_known_by_its_name_and_bytes(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()
    picture = a_picture()

    first = await ada.put(batch_id, "a%20b.jpg", picture)
    again = await ada.put(batch_id, "a%20b.jpg", picture)
    other = await ada.put(batch_id, "a%20b.jpg", a_picture())
    await ada.post(f"/v1/batches/{batch_id}/seal")
    after_seal = await ada.put(batch_id, "a%20b.jpg", picture)

    assert (first.status_code, first.json()["filename"]) == (202, "a b.jpg")
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["Sluice-Position"] == first.headers["Sluice-Position"]
    assert (other.status_code, code_of(other)) == (409, "filename_taken")
    assert (after_seal.status_code, after_seal.json()) == (202, first.json())
    assert len(api.blobs) == 1


async def test_a_put_is_checked_against_its_announced_digest(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()
    picture = a_picture()
    right = base64.b64encode(hashlib.sha256(picture).digest()).decode()
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()

    refused = await ada.put(batch_id, "a.jpg", picture, Repr_Digest=f"sha-256=:{wrong}:")
    unreadable = await ada.put(batch_id, "a.jpg", picture, Repr_Digest="sha-256=:no:")
    blobs_between = api.blobs
    unnamed = await ada.put(batch_id, "b.jpg", picture, Repr_Digest=f"xsha-256=:{wrong}:, sha-256x=:{wrong}:")
    two_lines = [("Repr-Digest", "sha-512=:AA==:"), ("Repr-Digest", f"sha-256=:{wrong}:")]
    refused_too = await ada.http.put(f"/v1/batches/{batch_id}/uploads/c.jpg", content=picture, headers=two_lines)
    taken = await ada.put(batch_id, "a.jpg", picture, Repr_Digest=f"sha-512=:AA==:, sha-256=:{right}:")

    assert (refused.status_code, code_of(refused)) == (400, "digest_mismatch")
    assert (unreadable.status_code, code_of(unreadable)) == (422, "invalid_request")
    assert blobs_between == []
    assert unnamed.status_code == 202
    assert code_of(refused_too) == "digest_mismatch"
    assert taken.status_code == 202


async def test_fifty_posts_with_one_key_make_one_batch(api: RunningApi, ada: Person) -> None:
    files = {"a.jpg": a_picture(), "b.jpg": a_picture()}

    answers = await asyncio.gather(*(ada.send("/v1/batches", files, key="once", name="n") for _ in range(50)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["batch"]["id"] for answer in answers}) == 1
    assert len({answer.headers["Sluice-Position"] for answer in answers}) == 1
    assert len({tuple(upload["id"] for upload in answer.json()["accepted"]) for answer in answers}) == 1
    assert answers[0].json()["batch"]["total_uploads"] == 2
    assert len(api.blobs) == 2


async def test_fifty_json_posts_with_one_key_make_one_batch(ada: Person) -> None:
    answers = await asyncio.gather(*(ada.post("/v1/batches", key="k", json={"name": "n"}) for _ in range(50)))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1


async def test_a_key_is_good_for_one_request_only(api: RunningApi, ada: Person, grace: Person) -> None:
    first = await ada.send("/v1/batches", {"a.jpg": a_picture()}, key="k")
    other_body = await ada.send("/v1/batches", {"a.jpg": a_picture()}, key="k")
    as_json = await ada.post("/v1/batches", key="k", json={})
    other_user = await grace.send("/v1/batches", {"a.jpg": a_picture()}, key="k")

    assert (other_body.status_code, code_of(other_body)) == (422, "idempotency_key_reused")
    assert (as_json.status_code, code_of(as_json)) == (422, "idempotency_key_reused")
    assert other_user.json()["batch"]["id"] != first.json()["batch"]["id"]
    assert len(api.blobs) == 2


async def test_of_two_requests_at_once_under_one_key_one_is_refused(ada: Person) -> None:
    for number in range(5):
        path = f"/v1/batches/{await ada.opens_batch()}/uploads"
        key = f"k{number}"

        added = await asyncio.gather(*(ada.send(path, {"a.jpg": a_picture()}, key=key) for _ in range(2)))
        made = await asyncio.gather(*(ada.send("/v1/batches", {"a.jpg": a_picture()}, key=key) for _ in range(2)))

        for answers in (added, made):
            refused = [answer for answer in answers if answer.status_code != 202]
            assert [code_of(answer) for answer in refused] == ["idempotency_key_reused"]


async def test_files_added_under_a_key_are_added_once(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()
    path = f"/v1/batches/{batch_id}/uploads"
    files = {"a.jpg": a_picture(), "bad.txt": b"text"}

    first = await ada.send(path, files, key="k")
    again = await ada.send(path, files, key="k")
    await ada.post(f"/v1/batches/{batch_id}/seal")
    after_seal = await ada.send(path, files, key="k")
    other = await ada.send(path, {"a.jpg": a_picture()}, key="k")

    assert first.status_code == again.status_code == after_seal.status_code == 202
    assert again.json() == after_seal.json() == first.json()
    assert again.headers["Sluice-Position"] == first.headers["Sluice-Position"]
    assert (other.status_code, code_of(other)) == (422, "idempotency_key_reused")
    assert len(api.blobs) == 1


@pytest.mark.parametrize("round_", range(3))
async def test_two_puts_for_the_last_place_get_one_yes(
    kafka: str, database_url: str, unique: str, tmp_path: Path, round_: int
) -> None:
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", files_max=2
    )
    async with running_api(settings) as api:
        ada = await api.person(f"ada{round_}")
        batch_id = await ada.opens_batch()
        await ada.put(batch_id, "first.jpg", a_picture())

        answers = await asyncio.gather(*(ada.put(batch_id, f"{name}.jpg", a_picture()) for name in "abcd"))

        assert sorted(answer.status_code for answer in answers) == [202, 413, 413, 413]
        assert {code_of(answer) for answer in answers if answer.status_code == 413} == {"too_many_files"}
        assert (await ada.get(f"/v1/batches/{batch_id}")).json()["total_uploads"] == 2
        assert len(api.blobs) == 2


async def test_a_put_against_the_seal_is_in_or_out(api: RunningApi, ada: Person) -> None:
    for _ in range(10):
        batch_id = await ada.opens_batch()

        put, sealed = await asyncio.gather(
            ada.put(batch_id, "a.jpg", a_picture()), ada.post(f"/v1/batches/{batch_id}/seal")
        )

        batch = (await ada.get(f"/v1/batches/{batch_id}")).json()
        assert sealed.status_code == 202
        assert batch["sealed"]
        if put.status_code == 202:
            assert batch["total_uploads"] == 1
        else:
            assert (code_of(put), batch["total_uploads"]) == ("batch_sealed", 0)


async def test_limits_are_those_the_batch_was_made_with(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka,
        database_url=database_url,
        unique=unique,
        blobs=tmp_path / "blobs",
        files_max=3,
        file_bytes_max=5_000,
        batch_bytes_max=9_000,
    )
    async with running_api(settings) as api:
        ada = await api.person("ada")
        batch_id = await ada.opens_batch()

        large = await ada.put(batch_id, "large.jpg", a_picture(5_001))
        surplus = await ada.send(
            f"/v1/batches/{batch_id}/uploads",
            {
                "1.jpg": a_picture(5_001),
                "2.jpg": a_picture(5_000),
                "3.jpg": a_picture(4_001),
                "4.jpg": a_picture(1_000),
            },
        )
        two_more = await ada.send(
            f"/v1/batches/{batch_id}/uploads", {"5.jpg": a_picture(1_000), "6.jpg": a_picture(1_000)}
        )

        assert (large.status_code, code_of(large)) == (413, "file_too_large")
        assert [each["filename"] for each in surplus.json()["accepted"]] == ["2.jpg", "4.jpg"]
        assert [(each["filename"], each["code"]) for each in surplus.json()["rejected"]] == [
            ("1.jpg", "file_too_large"),
            ("3.jpg", "batch_too_large"),
        ]
        assert [each["code"] for each in two_more.json()["rejected"]] == ["too_many_files"]
        assert len(api.blobs) == 3


async def test_a_repeated_form_says_of_its_surplus_what_it_said_and_adds_nothing_to_the_log(ada: Person) -> None:
    batch_id = await ada.opens_batch(expected_uploads=1)
    files = {"1.jpg": a_picture(1_000), "2.jpg": a_picture(2_000)}

    first = await ada.send(f"/v1/batches/{batch_id}/uploads", files, key="k")
    head = (await ada.get("/v1/status")).json()["head"]
    again = await ada.send(f"/v1/batches/{batch_id}/uploads", files, key="k")

    assert (first.status_code, again.status_code) == (202, 202)
    assert [each["code"] for each in first.json()["rejected"]] == ["batch_sealed"]
    assert again.json() == first.json()
    assert again.headers["Sluice-Position"] == first.headers["Sluice-Position"]
    assert (await ada.get("/v1/status")).json()["head"] == head


async def test_a_repeated_batch_of_files_says_of_its_surplus_what_it_said(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", files_max=2
    )
    files = {name: a_picture() for name in ("1.jpg", "2.jpg", "3.jpg")}
    async with running_api(settings) as api:
        first = await (await api.person("ada")).send("/v1/batches", files, key="k")
    async with running_api(settings.model_copy(update={"files_max": 1_000})) as api:
        again = await (await api.person("ada")).send("/v1/batches", files, key="k")

    assert [(each["filename"], each["code"]) for each in first.json()["rejected"]] == [("3.jpg", "too_many_files")]
    assert (again.status_code, again.json()) == (202, first.json())


async def test_a_thousand_files_in_one_form(ada: Person) -> None:
    files = {f"{'n' * 200}{number:04}.jpg": a_picture(600) for number in range(1_001)}

    answer = await ada.send("/v1/batches", files)

    body = answer.json()
    assert (answer.status_code, len(body["accepted"]), body["batch"]["total_uploads"]) == (202, 1_000, 1_000)
    assert [each["code"] for each in body["rejected"]] == ["too_many_files"]


async def test_the_facts_of_one_request_stand_side_by_side_and_carry_its_trace(
    api: RunningApi, ada: Person, kafka: str
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    files = [("files", ("a.jpg", a_picture())), ("files", ("b.jpg", a_picture()))]
    made = await ada.http.post("/v1/batches", files=files, headers={"traceparent": trace})

    log_settings = LogSettings(bootstrap_servers=kafka, topic=api.settings.log_topic)
    async with EventLog.open(log_settings) as log:
        reader = log.reader([0])
        await reader.seek(0, 1)
        records = []
        while len(records) < (await reader.ends())[0] - 1:
            records += await reader.read(records_max=100, timeout_ms=1_000)

    types = [dict(record.headers)["ce_type"].decode() for record in records]
    assert types == [
        "sluice.BatchCreated.v1",
        "sluice.UploadQueued.v1",
        "sluice.UploadQueued.v1",
        "sluice.BatchSealed.v1",
    ]
    assert {dict(record.headers)["traceparent"].decode() for record in records} == {trace}
    assert {record.key for record in records} == {made.json()["batch"]["id"].encode()}


async def test_a_key_means_the_same_batch_after_lanes_were_added(api: RunningApi, ada: Person) -> None:
    files = {"a.jpg": a_picture()}
    before = await ada.send("/v1/batches", files, key="k")

    async with running_api(api.settings.model_copy(update={"partitions": 3})) as wider:
        ada_there = await wider.person("ada")
        again = await ada_there.send("/v1/batches", files, key="k")
        others = [await ada_there.send("/v1/batches", files) for _ in range(30)]
        found = [await ada_there.get(f"/v1/batches/{other.json()['batch']['id']}") for other in others]

    assert again.json() == before.json()
    assert {other.json()["batch"]["id"][-2:] for other in others} == {"00", "01", "02"}
    assert [answer.json() for answer in found] == [other.json()["batch"] for other in others]


async def test_others_see_nothing_of_it(ada: Person, grace: Person) -> None:
    made = (await ada.send("/v1/batches", {"a.jpg": a_picture()})).json()
    batch, upload = f"/v1/batches/{made['batch']['id']}", f"/v1/uploads/{made['accepted'][0]['id']}"
    open_batch = await ada.opens_batch()

    answers = [
        await grace.get(batch),
        await grace.get(f"{batch}/uploads"),
        await grace.get(upload),
        await grace.get(f"{upload}/content"),
        await grace.get(f"{upload}/thumbnail"),
        await grace.post(f"/v1/batches/{open_batch}/seal"),
        await grace.put(open_batch, "a.jpg", a_picture()),
        await grace.send(f"/v1/batches/{open_batch}/uploads", {"a.jpg": a_picture()}),
    ]

    assert {(answer.status_code, code_of(answer)) for answer in answers} == {(404, "not_found")}


async def test_the_bytes_come_back_whole_and_in_ranges(ada: Person) -> None:
    picture = a_picture(10_000)
    made = (await ada.send("/v1/batches", {"straße 'a'.jpg": picture})).json()
    path = f"/v1/uploads/{made['accepted'][0]['id']}/content"

    whole = await ada.get(path)
    etag = whole.headers["ETag"]
    part = await ada.http.get(path, headers={"Range": "bytes=10-19"})
    tail = await ada.http.get(path, headers={"Range": "bytes=-5", "If-Range": etag})
    stale = await ada.http.get(path, headers={"Range": "bytes=-5", "If-Range": '"other"'})
    weak = await ada.http.get(path, headers={"Range": "bytes=-5", "If-Range": f"W/{etag}"})
    beyond = await ada.http.get(path, headers={"Range": "bytes=10000-"})
    unchanged = await ada.http.get(path, headers={"If-None-Match": etag})
    head = await ada.http.head(path)

    assert (whole.status_code, whole.content, whole.headers["Content-Type"]) == (200, picture, "image/jpeg")
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in whole.headers["Content-Security-Policy"]
    assert whole.headers["Content-Disposition"] == "attachment; filename*=UTF-8''stra%C3%9Fe%20%27a%27.jpg"
    assert etag == f'"{sha256(picture)}"'
    assert (part.status_code, part.content) == (206, picture[10:20])
    assert part.headers["Content-Range"] == "bytes 10-19/10000"
    assert (tail.status_code, tail.content) == (206, picture[-5:])
    assert (stale.status_code, stale.content) == (200, picture)
    assert (weak.status_code, weak.content) == (200, picture)
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */10000")
    assert (code_of(beyond), beyond.headers["ETag"]) == ("range_not_satisfiable", etag)
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, "10000", b"")


async def test_there_is_no_thumbnail_before_the_work_is_done(ada: Person) -> None:
    made = (await ada.send("/v1/batches", {"a.jpg": a_picture()})).json()

    answer = await ada.get(f"/v1/uploads/{made['accepted'][0]['id']}/thumbnail")

    assert code_of(answer) == "not_found"


async def test_a_cancelled_batch_ends_at_once(ada: Person) -> None:
    batch_id = await ada.opens_batch()
    await ada.put(batch_id, "a.jpg", a_picture())

    cancelled = await ada.post(f"/v1/batches/{batch_id}/cancel")
    again = await ada.post(f"/v1/batches/{batch_id}/cancel")
    put = await ada.put(batch_id, "b.jpg", a_picture())
    retried = await ada.post(f"/v1/batches/{batch_id}/retry")
    uploads = (await ada.get(f"/v1/batches/{batch_id}/uploads")).json()["items"]

    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    assert (again.status_code, again.json()) == (202, cancelled.json())
    assert (put.status_code, code_of(put)) == (409, "batch_ended")
    assert (retried.status_code, code_of(retried)) == (409, "batch_ended")
    assert [upload["status"] for upload in uploads] == ["cancelled"]


async def test_a_deleted_batch_is_gone_from_then_on(ada: Person) -> None:
    made = (await ada.send("/v1/batches", {"a.jpg": a_picture()}, key="k")).json()
    batch, upload = f"/v1/batches/{made['batch']['id']}", f"/v1/uploads/{made['accepted'][0]['id']}"

    deleted = await ada.http.delete(batch)
    answers = [await ada.get(batch), await ada.get(upload), await ada.http.delete(batch)]
    repeated = await ada.post("/v1/batches", key="k", json={})

    assert (deleted.status_code, deleted.content) == (204, b"")
    assert "Sluice-Position" in deleted.headers
    assert {code_of(answer) for answer in answers} == {"not_found"}
    assert code_of(repeated) in ("not_found", "idempotency_key_reused")


async def test_a_form_that_is_repeated_while_its_batch_is_deleted_is_not_found(ada: Person) -> None:
    batch_id = await ada.opens_batch()
    picture, sent, deleted = a_picture(32 * MIB), asyncio.Event(), asyncio.Event()
    deleted.set()

    async def body() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        for start in range(0, len(picture), MIB):
            if start == 24 * MIB:  # more than lies between the api and us: it has begun
                sent.set()
                await deleted.wait()
            yield picture[start : start + MIB]
        yield b"\r\n--x--\r\n"

    def form() -> Awaitable[httpx.Response]:
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Idempotency-Key": "k"}
        return ada.http.post(f"/v1/batches/{batch_id}/uploads", content=body(), headers=headers)

    first = await form()
    deleted.clear()
    sent.clear()
    again = asyncio.ensure_future(form())
    await sent.wait()
    assert (await ada.http.delete(f"/v1/batches/{batch_id}")).status_code == 204
    deleted.set()

    assert (first.status_code, len(first.json()["accepted"])) == (202, 1)
    assert ((await again).status_code, code_of(await again)) == (404, "not_found")


async def test_only_a_failed_upload_is_retried(ada: Person) -> None:
    made = (await ada.send("/v1/batches", {"a.jpg": a_picture()})).json()

    retried = await ada.post(f"/v1/uploads/{made['accepted'][0]['id']}/retry")
    none_failed = await ada.post(f"/v1/batches/{made['batch']['id']}/retry")

    assert (retried.status_code, code_of(retried)) == (409, "not_failed")
    assert none_failed.status_code == 202


async def test_every_wrong_request_is_answered_with_a_problem(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()
    other_log = "0" * 8 + ".0-1"
    stranger = httpx.AsyncClient(base_url=api.url, trust_env=False, timeout=30)
    async with stranger:
        answers = {
            "unauthorized": [
                await stranger.get("/v1/batches"),
                await stranger.get("/v1/batches", headers={"Authorization": "Bearer no.such.token"}),
                await stranger.post("/v1/batches", json={}),
                await stranger.get("/v1/status"),
            ],
            "not_found": [
                await ada.get("/v1/nowhere"),
                await ada.get("/v1/batches/not-an-id"),
                await ada.get(f"/v1/batches/{'0' * 8}-0000-4000-8000-{'0' * 12}"),
                await ada.get(f"/v1/uploads/{'0' * 8}-0000-4000-8000-{'0' * 12}"),
                await ada.get(f"/v1/uploads/{'0' * 8}-0000-4000-8000-{'f' * 12}"),
                await ada.post("/v1/batches/nope/seal"),
            ],
            "method_not_allowed": [await ada.http.patch("/v1/batches"), await ada.post("/v1/config")],
            "invalid_request": [
                await ada.get("/v1/batches", limit=201),
                await ada.get("/v1/batches", limit="many"),
                await ada.get("/v1/batches", status="odd"),
                await ada.get("/v1/batches", cursor="nonsense"),
                await ada.get(f"/v1/batches/{batch_id}/uploads", cursor="Yi4xLi0"),
                await ada.post("/v1/batches", content=b"{"),
                await ada.post("/v1/batches", json={"nmae": "typo"}),
                await ada.post("/v1/batches", json={"name": "x" * 201}),
                await ada.post("/v1/batches", json={"name": "nul \0"}),
                await ada.post("/v1/batches", content=b'{"name": "\\ud800"}'),
                await ada.post("/v1/batches", json={"expected_uploads": -1}),
                await ada.post("/v1/batches", json={"metadata": {"long": "x" * 16_000}}),
                await ada.post("/v1/batches", content=b" " * 70_000),
                await ada.post("/v1/batches", json={}, key="k" * 256),
                await ada.post("/v1/batches", data={"name": "n"}),
                await ada.send("/v1/batches", {"a.jpg": a_picture()}, nmae="typo"),
                await ada.post(f"/v1/batches/{batch_id}/uploads", json={}),
                await ada.put(batch_id, "%ff.png", a_picture()),
            ],
            "invalid_position": [await ada.get(f"/v1/batches/{batch_id}", min_position="nonsense")],
            "position_of_another_log": [await ada.get(f"/v1/batches/{batch_id}", min_position=other_log)],
        }

    for code, given in answers.items():
        assert [code_of(answer) for answer in given] == [code] * len(given)
    assert answers["unauthorized"][0].headers["WWW-Authenticate"] == "Bearer"
    assert answers["method_not_allowed"][0].headers["Allow"] == "GET, POST"


async def test_a_broken_form_leaves_nothing_behind(api: RunningApi, ada: Person) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + a_picture() + b"\r\n--x\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}

    answer = await ada.http.post("/v1/batches", content=body, headers=headers)

    assert (answer.status_code, code_of(answer)) == (422, "invalid_request")
    assert api.blobs == []


async def test_a_sender_who_leaves_in_the_middle_leaves_nothing_behind(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()

    async def breaking_off() -> AsyncIterator[bytes]:
        yield a_picture(3_000_000)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await ada.http.put(f"/v1/batches/{batch_id}/uploads/a.jpg", content=breaking_off())

    async with asyncio.timeout(DONE_TIMEOUT_S):
        while api.blobs:  # noqa: ASYNC110  # a folder cannot be awaited
            await asyncio.sleep(0.02)
    assert (await ada.get(f"/v1/batches/{batch_id}")).json()["total_uploads"] == 0


async def test_min_position_waits_and_then_says_that_nothing_projects(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", projection_timeout_s=0.3
    )
    async with running_api(settings) as api:
        ada = await api.person("ada")
        made = await ada.post("/v1/batches", json={})

        upload = (await ada.put(made.json()["id"], "a.jpg", a_picture())).json()
        mine = f"/v1/uploads/{upload['id']}"
        paths = ("/v1/batches", made.headers["Location"], mine, f"{mine}/content", f"{mine}/thumbnail")

        answers = [await ada.get(path, min_position=upload["position"]) for path in paths]

        assert {(answer.status_code, code_of(answer)) for answer in answers} == {(503, "projection_behind")}
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
        assert code_of(await ada.get(f"{mine}/content", min_position="nonsense")) == "invalid_position"


async def test_the_service_tells_how_it_is(api: RunningApi, ada: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lanes.LEFT_ALONE_S", "health.STALLED_AFTER_S"):  # nobody works the lane here, and nobody minds
        monkeypatch.setattr(f"services.api.{name}", 3_600.0)
    await ada.opens_batch()

    status = await answered_with(lambda: ada.get("/v1/status"), lambda body: body["mode"] == "full")
    async with httpx.AsyncClient(base_url=api.url, trust_env=False, timeout=30) as anyone:
        config = (await anyone.get("/v1/config")).json()
        pages = {path: await anyone.get(path) for path in ("/", "/docs", "/openapi.json", "/livez", "/metrics")}
        ready = await answered(lambda: anyone.get("/readyz"), 200)

    assert (status["degraded"], status["projected"], status["lag"]) == ([], None, 2)
    assert ready.json()["problems"] == []
    assert config["limits"]["files_max"] == 1_000
    assert {page.status_code for page in pages.values()} == {200}
    assert "sluice_http_seconds_count" in pages["/metrics"].text
    posted = 'method="POST",route="/v1/batches",status="2xx"'
    assert len([line for line in pages["/metrics"].text.splitlines() if posted in line]) < 10
    assert posted in pages["/metrics"].text
    assert "_created" not in pages["/metrics"].text
    assert "http" not in pages["/docs"].text.replace(api.url, "")
