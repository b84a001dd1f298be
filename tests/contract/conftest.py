"""The log that each test of a suite runs on: once in memory, once in Kafka."""

from collections.abc import AsyncIterator

import pytest

from services.eventlog import Log
from tests.worlds import SOURCE, InMemory, OnKafka, World


@pytest.fixture(params=["in memory", "on Kafka"])
def world(request: pytest.FixtureRequest, unique: str) -> World:
    if request.param == "in memory":
        return InMemory(unique)
    return OnKafka(request.getfixturevalue("kafka"), unique)


@pytest.fixture
async def log(world: World) -> AsyncIterator[Log]:
    """An open log of two partitions, empty but for their LogCreated."""
    async with world.open() as log:
        await log.ensure_topics(partitions=2)
        await log.ensure_created(partitions=2, source=SOURCE)
        yield log
