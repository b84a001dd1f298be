"""Requests that race each other at two api processes on one log, with a processor at work: whatever wins, every answer
agrees with what the log says, and both apis show the same."""

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from schemas.batch import Batch
from schemas.events import (
    BatchCancelled,
    BatchCompleted,
    BatchCreated,
    BatchDeleted,
    BatchSealed,
    UploadFailed,
    UploadQueued,
    UploadRetried,
    UploadSucceeded,
)
from services.demo import PICTURES
from services.settings import Settings
from tests.integration.api_client import (
    DONE_TIMEOUT_S,
    Person,
    a_picture,
    api_beside,
    api_settings,
    code_of,
    ended,
    files_below,
    person_at,
    processor_beside,
)
from tests.integration.judge import Judge, judge

FILES_MAX = 4
ROUNDS = 6


@dataclass(frozen=True)
class Town:
    """One log, two apis, one processor. `ada` and `twin` are the same user, each at an api of her own."""

    settings: Settings
    ada: Person
    twin: Person

    @property
    def both(self) -> tuple[Person, Person]:
        return self.ada, self.twin

    async def judged(self, batch_id: str) -> Judge:
        """The log once the batch is at rest in it, with which what both apis show agrees.

        Whether it is at rest only the log can tell: an api may not have read yet what another one was just told.
        """
        async with asyncio.timeout(DONE_TIMEOUT_S):
            while not at_rest((log := await judge(self.settings)).batch(batch_id)):  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.1)
        views = []
        for person in self.both:
            views.append(
                (await person.get(f"/v1/batches/{batch_id}", min_position=log.view(batch_id)["position"])).json()
            )
            uploads = (await person.get(f"/v1/batches/{batch_id}/uploads")).json()["items"]
            assert uploads == [log.upload_view(upload) for upload in in_order(log, batch_id)]
        assert views == [log.view(batch_id)] * 2
        return log

    def blobs(self, log: Judge, batch_id: str) -> tuple[set[str], set[str]]:
        """The files that lie in the store for uploads this log ever heard of in the batch, and those it refers to."""
        named = {str(fact.upload_id) for fact, _ in log.facts(UploadQueued, batch_id)}
        folder = self.settings.blob_folder
        lying = {f"{name}/{path.name}" for name in named for path in files_below(folder / name)}
        return {each for each in lying if "/thumb-" not in each}, {each.blob for each in log.uploads(batch_id)}


def at_rest(batch: Batch) -> bool:
    """Whether nothing more comes of it by itself, as long as nobody asks for something."""
    return batch.queued == batch.processing == 0 and (batch.ended or not batch.sealed)


def in_order(log: Judge, batch_id: str) -> list[Any]:
    return sorted(log.uploads(batch_id), key=lambda upload: upload.created_offset)


@pytest.fixture(scope="module")
async def town(kafka: str, postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Town]:
    unique = f"t{uuid.uuid4().hex[:16]}"
    connection = await asyncpg.connect(postgres)
    await connection.execute(f"CREATE DATABASE {unique}")
    settings = api_settings(
        kafka=kafka,
        database_url=urlsplit(postgres)._replace(path=f"/{unique}").geturl(),
        unique=unique,
        blobs=tmp_path_factory.mktemp("races") / "blobs",
        files_max=FILES_MAX,
        partitions=1,
    )
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(api_beside(settings))
        second = await stack.enter_async_context(api_beside(settings))
        await stack.enter_async_context(processor_beside(settings))
        ada = await stack.enter_async_context(person_at(first, "ada"))
        twin = await stack.enter_async_context(person_at(second, "ada"))
        yield Town(settings, ada, twin)
    await connection.execute(f"DROP DATABASE {unique} WITH (FORCE)")
    await connection.close()


async def at_once(*wishes: Awaitable[httpx.Response]) -> list[httpx.Response]:
    return list(await asyncio.gather(*wishes))


def picture(name: str = "cat.png") -> bytes:
    return (PICTURES / name).read_bytes()


def granted(answers: list[httpx.Response]) -> list[httpx.Response]:
    return [answer for answer in answers if answer.status_code < 300]


def refusals(answers: list[httpx.Response]) -> list[str]:
    return sorted(code_of(answer) for answer in answers if answer.status_code >= 300)


async def test_fifty_posts_with_one_key_at_two_apis_make_one_batch(town: Town) -> None:
    key, files, others = os.urandom(8).hex(), {"a.jpg": a_picture(), "b.jpg": a_picture()}, {"a.jpg": a_picture()}

    answers = await at_once(*(town.both[n % 2].send("/v1/batches", files, key=key) for n in range(50)))
    reused = await at_once(*(person.send("/v1/batches", others, key=key) for person in town.both))

    assert {answer.status_code for answer in answers} == {202}
    batch_id = answers[0].json()["batch"]["id"]
    assert {answer.json()["batch"]["id"] for answer in answers} == {batch_id}
    assert len({answer.headers["Sluice-Position"] for answer in answers}) == 1
    assert len({tuple(upload["id"] for upload in answer.json()["accepted"]) for answer in answers}) == 1
    assert refusals(reused) == ["idempotency_key_reused"] * 2
    await ended(town.ada, batch_id)
    log = await town.judged(batch_id)
    assert (log.effective(BatchCreated, batch_id), log.effective(UploadQueued, batch_id)) == (1, 2)
    lying, referred = town.blobs(log, batch_id)
    assert lying == referred


async def test_two_bodies_under_one_key_make_one_batch_and_one_refusal(town: Town) -> None:
    for _ in range(ROUNDS):
        key = os.urandom(8).hex()

        answers = await at_once(*(person.send("/v1/batches", {"a.jpg": a_picture()}, key=key) for person in town.both))

        assert refusals(answers) == ["idempotency_key_reused"]
        made = granted(answers)[0].json()
        await ended(town.ada, made["batch"]["id"])
        log = await town.judged(made["batch"]["id"])
        assert [upload.sha256 for upload in in_order(log, made["batch"]["id"])] == [made["accepted"][0]["sha256"]]


async def test_of_puts_for_the_last_place_one_is_granted(town: Town) -> None:
    for _ in range(ROUNDS):
        batch_id = await town.ada.opens_batch()
        for number in range(FILES_MAX - 1):
            await town.ada.put(batch_id, f"{number}.jpg", a_picture())

        answers = await at_once(*(town.both[n % 2].put(batch_id, f"last{n}.jpg", a_picture()) for n in range(4)))

        assert (len(granted(answers)), refusals(answers)) == (1, ["too_many_files"] * 3)
        log = await town.judged(batch_id)
        assert log.effective(UploadQueued, batch_id) == FILES_MAX
        assert granted(answers)[0].json()["id"] == in_order(log, batch_id)[-1].id
        lying, referred = town.blobs(log, batch_id)
        assert lying == referred


async def test_of_puts_under_one_name_all_are_the_same_or_taken(town: Town) -> None:
    for _ in range(ROUNDS):
        batch_id = await town.ada.opens_batch()
        mine, other = a_picture(), a_picture()

        answers = await at_once(*(town.both[n % 2].put(batch_id, "a.jpg", mine if n < 4 else other) for n in range(8)))

        log = await town.judged(batch_id)
        assert log.effective(UploadQueued, batch_id) == 1
        kept = log.uploads(batch_id)[0]
        assert {answer.json()["sha256"] for answer in granted(answers)} == {kept.sha256}
        assert (len(granted(answers)), set(refusals(answers))) == (4, {"filename_taken"})
        lying, referred = town.blobs(log, batch_id)
        assert lying == referred


async def test_a_put_against_the_seal_is_in_or_out(town: Town) -> None:
    for _ in range(ROUNDS):
        batch_id = await town.ada.opens_batch()

        put, form, sealed = await at_once(
            town.ada.put(batch_id, "a.jpg", a_picture()),
            town.twin.send(f"/v1/batches/{batch_id}/uploads", {"b.jpg": a_picture(), "c.jpg": a_picture()}),
            town.twin.post(f"/v1/batches/{batch_id}/seal"),
        )

        assert sealed.status_code == 202
        taken = [*granted([put])] + [answer for answer in [form] if answer.status_code == 202]
        log = await town.judged(batch_id)
        names = {upload.filename for upload in log.uploads(batch_id)}
        assert ("a.jpg" in names) == (put.status_code == 202)
        assert {"b.jpg", "c.jpg"} & names == ({"b.jpg", "c.jpg"} if form.status_code == 202 else set())
        assert set(refusals([put, form])) <= {"batch_sealed", "batch_ended"}
        assert log.effective(BatchSealed, batch_id) == 1
        assert log.effective(UploadQueued, batch_id) == len(names) >= len(taken)


async def test_what_reaches_the_expected_number_first_is_in(town: Town) -> None:
    for _ in range(ROUNDS):
        batch_id = await town.ada.opens_batch(expected_uploads=2)

        answers = await at_once(
            town.ada.put(batch_id, "a.jpg", a_picture()),
            town.twin.put(batch_id, "b.jpg", a_picture()),
            town.ada.put(batch_id, "c.jpg", a_picture()),
            town.twin.put(batch_id, "d.jpg", a_picture()),
        )

        assert len(granted(answers)) == 2
        assert set(refusals(answers)) <= {"batch_sealed", "batch_ended"}
        batch = await ended(town.twin, batch_id)
        log = await town.judged(batch_id)
        assert (batch["sealed"], batch["total_uploads"], log.effective(UploadQueued, batch_id)) == (True, 2, 2)
        assert {answer.json()["id"] for answer in granted(answers)} == {each.id for each in log.uploads(batch_id)}


async def test_a_form_that_goes_beyond_the_expected_number_is_taken_in_part(town: Town) -> None:
    for _ in range(ROUNDS):
        batch_id = await town.ada.opens_batch(expected_uploads=3)
        path = f"/v1/batches/{batch_id}/uploads"

        answers = await at_once(
            *(
                person.send(path, {f"{name}{n}.jpg": a_picture() for n in range(2)})
                for person, name in zip(town.both, "ab", strict=True)
            )
        )

        taken = [upload["id"] for answer in granted(answers) for upload in answer.json()["accepted"]]
        rejected = [each["code"] for answer in granted(answers) for each in answer.json()["rejected"]]
        await ended(town.ada, batch_id)
        log = await town.judged(batch_id)
        assert sorted(taken) == sorted(upload.id for upload in log.uploads(batch_id))
        assert (len(taken), rejected, refusals(answers)) == (3, ["batch_sealed"], [])


async def test_cancelling_against_the_last_outcome_ends_one_way(town: Town) -> None:
    ways = set()
    for round_ in range(ROUNDS * 2):
        made = await town.ada.send("/v1/batches", {"a.png": picture()})
        batch_id = made.json()["batch"]["id"]
        if round_ % 2:  # as close to the end as can be seen from here
            await until_begun(town.twin, batch_id)

        cancelled, again = await at_once(
            town.ada.post(f"/v1/batches/{batch_id}/cancel"), town.twin.post(f"/v1/batches/{batch_id}/cancel")
        )

        batch = await ended(town.twin, batch_id)
        log = await town.judged(batch_id)
        ways.add(batch["status"])
        won = batch["status"] == "cancelled"
        assert [cancelled.status_code, again.status_code] == [202 if won else 409] * 2
        assert refusals([cancelled, again]) == ([] if won else ["batch_ended"] * 2)
        assert log.effective(BatchCancelled, batch_id) == int(won)
        assert log.effective(BatchCompleted, batch_id) == int(not won)
        assert log.effective(UploadSucceeded, batch_id) == batch["successful_uploads"]
    assert "cancelled" in ways


async def until_begun(person: Person, batch_id: str) -> None:
    async with asyncio.timeout(DONE_TIMEOUT_S):
        while (await person.get(f"/v1/batches/{batch_id}")).json()["started_at"] is None:  # noqa: ASYNC110  # elsewhere
            await asyncio.sleep(0)


async def test_a_failed_upload_is_retried_once_however_many_ask(town: Town) -> None:
    for _ in range(3):
        made = (await town.ada.send("/v1/batches", {"b.jpg": picture("broken-download.jpg")})).json()
        batch_id, upload_id = made["batch"]["id"], made["accepted"][0]["id"]
        await ended(town.ada, batch_id)
        path = f"/v1/uploads/{upload_id}/retry"

        answers = await at_once(*(person.post(path) for person in town.both))
        await town.judged(batch_id)  # from here on both know how it ended
        keyed = await at_once(*(town.both[n % 2].post(path, key="k") for n in range(6)))
        await town.judged(batch_id)
        whole = await at_once(*(person.post(f"/v1/batches/{batch_id}/retry") for person in town.both))

        log = await town.judged(batch_id)
        retried = [fact for fact, ignored in log.facts(UploadRetried, batch_id) if ignored is None]
        # Whoever asks after the other's retry failed again asks for one more; at the same time it is one.
        assert len(granted(answers)) + 1 <= len(retried) <= len(granted(answers)) + 3
        assert set(refusals(answers)) <= {"not_failed"}
        assert {answer.status_code for answer in keyed} == {202}
        assert len({answer.headers["Sluice-Position"] for answer in granted(answers)}) == len(granted(answers))
        assert {answer.status_code for answer in whole} == {202}
        assert log.effective(UploadFailed, batch_id) == 1 + len(retried)
        key_hashes = [fact.event.request for fact in retried if getattr(fact.event, "request", None)]
        assert len(key_hashes) == 1


async def test_a_batch_deleted_in_mid_work_is_gone_everywhere(town: Town) -> None:
    for round_ in range(ROUNDS):
        files = {f"{n}.png": picture() for n in range(3)}
        made = (await town.ada.send("/v1/batches", files)).json()
        batch_id = made["batch"]["id"]
        if round_ % 2:
            await until_begun(town.twin, batch_id)

        answers = await at_once(
            town.ada.http.delete(f"/v1/batches/{batch_id}"), town.twin.http.delete(f"/v1/batches/{batch_id}")
        )

        assert {answer.status_code for answer in granted(answers)} == {204}
        assert set(refusals(answers)) <= {"not_found"}  # whoever came later; at the same time both got their wish
        for person in town.both:
            for path in (f"/v1/batches/{batch_id}", f"/v1/uploads/{made['accepted'][0]['id']}"):
                assert code_of(await person.get(path)) == "not_found"
            await person.get("/v1/batches", min_position=granted(answers)[0].headers["Sluice-Position"])
            listed = (await person.get("/v1/batches")).json()["items"]
            assert batch_id not in [batch["id"] for batch in listed]
        log = await judge(town.settings)
        deleted = next(fact for fact, ignored in log.facts(BatchDeleted, batch_id) if ignored is None)
        after = [
            fact
            for fact, ignored in log.became
            if ignored is None and fact.batch_id == batch_id and fact.offset > deleted.offset
        ]
        assert (log.effective(BatchDeleted, batch_id), after) == (1, [])
        async with asyncio.timeout(DONE_TIMEOUT_S):
            while town.blobs(log, batch_id)[0]:  # noqa: ASYNC110  # a folder cannot be awaited
                await asyncio.sleep(0.05)


async def test_nothing_lies_in_the_store_that_no_fact_names(town: Town) -> None:
    log = await judge(town.settings)
    named = {str(fact.upload_id) for fact, _ in log.became if isinstance(fact.event, UploadQueued)}

    lying = {path.parent.name for path in files_below(town.settings.blob_folder) if not path.name.startswith(".check-")}

    assert lying <= named
