"""What callers are told of a Postgres that cannot do its work just now, and of an address that is none."""

import asyncio

import asyncpg
import pytest

from services.database import Database, DatabaseUnavailable, reaching
from services.lifecycle import StartError


async def test_a_full_disk_is_told_as_what_it_is_and_ends_by_itself() -> None:
    said = 'could not extend file "base/16384/16529": No space left on device'

    with pytest.raises(DatabaseUnavailable) as refused, reaching():
        raise asyncpg.DiskFullError(said)

    assert str(refused.value) == f"Postgres writes nothing more, since its disk is full: make room there ({said})"
    assert refused.value.told == "the database's disk is full"


async def test_a_mistake_in_sql_is_none_of_that() -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError), reaching():
        raise asyncpg.PostgresSyntaxError("syntax error")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "mysql://sluice@127.0.0.1/sluice",
            'scheme is expected to be either "postgresql" or "postgres", got \'mysql\'',
        ),
        ("postgresql://sluice@127.0.0.1/sluice?sslmode=foo", "`sslmode` parameter must be one of: disable, "),
        ("postgresql://sluice:hidden@127.0.0.1:99999/sluice", "its port cannot be read"),
        ("postgresql://sluice:hidden/word@127.0.0.1/sluice", "its port cannot be read"),
    ],
)
async def test_an_address_that_is_none_is_refused_at_once_and_repeats_no_password(url: str, said: str) -> None:
    with pytest.raises(StartError) as refused:
        await Database.open(url)

    assert str(refused.value).startswith("SLUICE_DATABASE_URL cannot be used: ")
    assert said in str(refused.value)
    assert str(refused.value).endswith("; it looks like postgresql://user:password@host:port/name")
    assert "hidden" not in str(refused.value)
    assert "\n" not in str(refused.value)


async def test_a_postgres_that_is_away_is_asked_again_later() -> None:
    with pytest.raises(DatabaseUnavailable, match="the database cannot be reached"):
        await Database.open("postgresql://sluice@127.0.0.1:1/sluice")


async def test_who_is_cancelled_ends_though_a_connection_cannot_be_given_back() -> None:
    asked = asyncio.Event()
    asking = asyncio.create_task(_ask(asked))
    await asked.wait()
    asking.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_timeout_around_is_a_timeout_and_one_within_is_an_absence() -> None:
    never = asyncio.get_running_loop().create_future()
    with pytest.raises(DatabaseUnavailable), reaching():
        async with asyncio.timeout(0):
            await never
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(_ask(asyncio.Event()), 0.01)


async def _ask(asked: asyncio.Event) -> None:
    """Ask for what never comes; the connection cannot be given back either."""
    with reaching():
        try:
            asked.set()
            await asyncio.get_running_loop().create_future()
        finally:
            raise ConnectionResetError
