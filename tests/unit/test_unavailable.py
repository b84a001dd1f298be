"""What callers are told of a Postgres that cannot do its work just now, and of an address that is none."""

import asyncpg
import pytest

from services.database import Database, DatabaseUnavailable, reaching
from services.lifecycle import StartError


def test_a_full_disk_is_told_as_what_it_is_and_ends_by_itself() -> None:
    said = 'could not extend file "base/16384/16529": No space left on device'

    with pytest.raises(DatabaseUnavailable) as refused, reaching():
        raise asyncpg.DiskFullError(said)

    assert str(refused.value) == f"Postgres writes nothing more, since its disk is full: make room there ({said})"
    assert refused.value.told == "the database's disk is full"


def test_a_mistake_in_sql_is_none_of_that() -> None:
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
