"""Servers and names that any test may ask for: real Kafka and Postgres, started when the first test needs them.

`kafka` and `postgres` are addresses; `database_url` is an empty database of the test's own; `unique` a name nobody else
has, for topics and the like; `data_dir` a folder for servers of the test's own. A developer who keeps servers running
names them in SLUICE_TEST_KAFKA (host:port) and SLUICE_TEST_POSTGRES (a URL whose user may create databases), and the
suite starts none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from services.embedded import EmbeddedKafka, EmbeddedPostgres
from tests.faults.real.reporting import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown
from tests.turns import pytest_runtest_protocol

__all__ = ["pytest_runtest_protocol", "pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]


@contextmanager
def folder_for_servers() -> Iterator[Path]:
    """Not in pytest's own temporary folder, which keeps what are hundreds of megabytes for three runs, and which each
    run closes to other users: a Postgres started by root runs as one of those and has to pass through.
    """
    folder = Path(tempfile.mkdtemp(prefix="sluice-test-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    with folder_for_servers() as folder:
        yield folder


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """An empty folder for servers of the test's own."""
    with folder_for_servers() as folder:
        yield folder


@pytest.fixture(scope="session")
async def kafka_server(servers_dir: Path) -> AsyncIterator[EmbeddedKafka]:
    async with EmbeddedKafka(data_dir=servers_dir) as server:
        yield server


@pytest.fixture(scope="session")
async def postgres_server(servers_dir: Path) -> AsyncIterator[EmbeddedPostgres]:
    async with EmbeddedPostgres(data_dir=servers_dir) as server:
        yield server


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> str:
    """The bootstrap address, `host:port`, of a Kafka that all tests share: name topics with `unique`."""
    return os.environ.get("SLUICE_TEST_KAFKA") or request.getfixturevalue("kafka_server").bootstrap_servers


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> str:
    """The URL of a database that all tests share. Most want `database_url` instead."""
    return os.environ.get("SLUICE_TEST_POSTGRES") or request.getfixturevalue("postgres_server").url


@pytest.fixture
def unique() -> str:
    """A name of letters and digits that no other test, in this run or another, will use."""
    return f"t{uuid.uuid4().hex[:16]}"


@pytest.fixture
async def database_url(postgres: str, unique: str) -> AsyncIterator[str]:
    """The URL of an empty database, dropped afterwards with whatever still uses it."""
    connection = await asyncpg.connect(postgres)
    try:
        await connection.execute(f"CREATE DATABASE {unique}")
        yield urlsplit(postgres)._replace(path=f"/{unique}").geturl()
        await connection.execute(f"DROP DATABASE {unique} WITH (FORCE)")
    finally:
        await connection.close()
