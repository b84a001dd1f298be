"""Services in this process that most tests here begin with; a file that needs another one overrides its fixture.

`ada` is somebody with a token at an api without a processor; `scene` is a notifier and the log that it tells, `quiet`
the same before the notifier is there, with the `settings` it gets.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.notifier.main import notifying
from services.settings import Settings
from tests.integration.api_client import Person, RunningApi, api_settings, running_api
from tests.notifiers import Scene, a_quiet_scene, settings_for


@pytest.fixture
async def api(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[RunningApi]:
    settings = api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs")
    async with running_api(settings) as running:
        yield running


@pytest.fixture
async def ada(api: RunningApi) -> Person:
    return await api.person("ada")


@pytest.fixture
def settings(kafka: str, database_url: str, unique: str) -> Settings:
    return settings_for(kafka=kafka, database_url=database_url, unique=unique)


@pytest.fixture
async def quiet(settings: Settings) -> AsyncIterator[Scene]:
    """A log with a claimed lane, and no notifier yet."""
    async with a_quiet_scene(settings) as scene:
        yield scene


@pytest.fixture
async def scene(quiet: Scene) -> AsyncIterator[Scene]:
    async with notifying(quiet.settings) as notifier:
        quiet.port = notifier.port
        yield quiet
