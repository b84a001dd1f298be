"""What the api asks the read models, where the order of a list cannot be told from outside."""

import dataclasses
from collections.abc import AsyncIterator

import pytest

from services.api.queries import Page, batches_of
from services.database import Database
from services.processor.projection import Projection
from services.processor.rows import Rows
from tests.examples import LOG_ID, START_MS, USER, a_batch_created, a_log_created, an_id, records_of


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url)
    await opened.migrate()
    yield opened
    await opened.close()


async def test_batches_of_one_millisecond_stand_newest_first_by_their_place_in_the_log(database: Database) -> None:
    batch_ids = [an_id("batch", number) for number in range(9)]
    assert batch_ids not in (sorted(batch_ids), sorted(batch_ids, reverse=True))
    events = [a_log_created(), *(a_batch_created(batch_id) for batch_id in batch_ids)]
    at_once = [dataclasses.replace(record, timestamp_ms=START_MS) for record in records_of(*events)]
    projection = await Projection.open(await Rows.live(database), partition=0, log_id=LOG_ID)
    await projection.fold(at_once)
    await projection.flush()

    listed: list[str] = []
    cursor: str | None = None
    while cursor is not None or not listed:
        batches, cursor = await batches_of(database, user_id=USER, page=Page(limit=2, cursor=cursor, status=None))
        listed += [batch.id for batch in batches]

    assert listed == batch_ids[::-1]
