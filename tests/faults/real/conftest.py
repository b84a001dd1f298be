"""Scenes on the session's servers."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from zlib import crc32

import pytest

from tests.faults.real.scene import Places, Scene, a_scene


@pytest.fixture
def places(kafka: str, database_url: str, tmp_path: Path, unique: str) -> Places:
    return Places(kafka=kafka, database_url=database_url, folder=tmp_path, unique=f"{unique}{uuid.uuid4().hex[:6]}")


@pytest.fixture
async def scene(places: Places, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    """A scene that plays the same way each time, as far as processes do."""
    async with a_scene(places, seed=crc32(request.node.name.encode())) as made:
        yield made
