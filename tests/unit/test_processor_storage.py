"""The lane and a blob store that goes away and comes back, and the files of what was deleted."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from services.blobs import StorageUnavailable
from services.lifecycle import cancelled
from services.processor.health import Health
from services.processor.storage import GIVEN_BACK_MAX, PART, REMEMBERED_MAX, REMOVED_AT_ONCE, Patience, Storage

WAIT_S = 30
LAST = "the last"


class Blobs:
    """What `Storage` asks of a store."""

    def __init__(self) -> None:
        self.away: str | None = None
        self.checked = asyncio.Event()
        self.last_removed = asyncio.Event()
        self.removed: list[str] = []
        self.removing = 0
        self.removing_most = 0

    async def check(self) -> None:
        self.checked.set()
        if self.away is not None:
            raise StorageUnavailable(self.away)

    async def delete_upload(self, upload_id: str) -> None:
        self.removing += 1
        self.removing_most = max(self.removing, self.removing_most)
        await asyncio.sleep(0)
        self.removing -= 1
        if upload_id == "stubborn":
            raise StorageUnavailable("not now")
        self.removed.append(upload_id)
        if upload_id == LAST:
            self.last_removed.set()


@contextlib.asynccontextmanager
async def kept(storage: Storage) -> AsyncIterator[None]:
    keeping = asyncio.create_task(storage.keep())
    yield
    assert not keeping.done()
    await cancelled(keeping)


async def test_a_store_that_is_away_is_a_lost_part_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.processor.storage.LOOK_INTERVAL_S", 0.01)
    blobs, health, woken = Blobs(), Health(), asyncio.Event()
    blobs.away = "s3://bucket cannot be reached"
    storage = Storage(blobs, health, woken.set)  # type: ignore[arg-type]  # as much of a store as is asked for

    async with kept(storage):
        await asyncio.wait_for(blobs.checked.wait(), WAIT_S)
        while_away, woken_while_away = set(health.parts), woken.is_set()
        blobs.away = None
        await asyncio.wait_for(woken.wait(), WAIT_S)

    assert (while_away, woken_while_away) == ({PART}, False)
    assert health.parts == {}


async def test_what_was_deleted_is_removed_some_uploads_at_a_time_and_a_failure_holds_up_none() -> None:
    blobs = Blobs()
    storage = Storage(blobs, Health(), lambda: None)  # type: ignore[arg-type]  # as much of a store as is asked for
    upload_ids = [*(str(number) for number in range(40)), LAST]

    async with kept(storage):
        storage.remove(["stubborn", *upload_ids])
        await asyncio.wait_for(blobs.last_removed.wait(), WAIT_S)

    assert blobs.removed == upload_ids
    assert blobs.removing_most == REMOVED_AT_ONCE


async def test_nothing_is_asked_of_a_store_that_is_away_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.processor.storage.LOOK_INTERVAL_S", 0.01)
    blobs = Blobs()
    blobs.away = "s3://bucket cannot be reached"
    storage = Storage(blobs, Health(), lambda: None)  # type: ignore[arg-type]  # as much of a store as is asked for
    upload_ids = [*(str(number) for number in range(40)), LAST]

    async with kept(storage):
        await asyncio.wait_for(blobs.checked.wait(), WAIT_S)
        storage.remove(upload_ids)
        for _ in range(2):
            blobs.checked.clear()
            await asyncio.wait_for(blobs.checked.wait(), WAIT_S)
        while_away = blobs.removed[:]
        blobs.away = None
        await asyncio.wait_for(blobs.last_removed.wait(), WAIT_S)

    assert (while_away, blobs.removed) == ([], upload_ids)


async def test_more_removals_than_can_wait_are_left_to_the_sweeper_and_keep_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.processor.storage.REMOVALS_MAX", 20)
    blobs = Blobs()
    storage = Storage(blobs, Health(), lambda: None)  # type: ignore[arg-type]  # as much of a store as is asked for
    kept_ids, left = [*(str(number) for number in range(19)), LAST], [f"left {number}" for number in range(30)]

    with capture_logs() as said:
        storage.remove([*kept_ids, *left])
        storage.remove(left)
        async with kept(storage):
            await asyncio.wait_for(blobs.last_removed.wait(), WAIT_S)
            storage.remove(["one more", *kept_ids, *left])

    assert [each["event"] for each in said] == ["removals_left_to_the_sweeper"] * 2
    assert said[0]["left"] == len(left)
    assert blobs.removed[:20] == kept_ids


async def test_a_file_that_cannot_be_read_again_and_again_is_to_blame_itself() -> None:
    patience = Patience(Blobs())  # type: ignore[arg-type]  # what is asked of a store here

    said = [await patience.ends_with("unreadable") for _ in range(GIVEN_BACK_MAX + 2)]

    assert said == [False] * GIVEN_BACK_MAX + [True, False]


async def test_no_file_is_to_blame_for_a_store_that_is_away() -> None:
    blobs = Blobs()
    blobs.away = "no answer"
    patience = Patience(blobs)  # type: ignore[arg-type]  # what is asked of a store here

    assert not any([await patience.ends_with("file") for _ in range(GIVEN_BACK_MAX * 3)])

    blobs.away = None
    assert await patience.ends_with("file")


async def test_files_that_cannot_be_read_are_not_remembered_without_a_bound() -> None:
    patience = Patience(Blobs())  # type: ignore[arg-type]  # what is asked of a store here

    for number in range(REMEMBERED_MAX + 10):
        await patience.ends_with(f"file {number}")

    assert len(patience._given_back) <= REMEMBERED_MAX
