"""What callers are told of a Postgres that cannot do its work just now."""

import asyncpg
import pytest

from services.database import DatabaseUnavailable, reaching


def test_a_full_disk_is_told_as_what_it_is_and_ends_by_itself() -> None:
    said = 'could not extend file "base/16384/16529": No space left on device'

    with pytest.raises(DatabaseUnavailable) as refused, reaching():
        raise asyncpg.DiskFullError(said)

    assert str(refused.value) == f"Postgres writes nothing more, since its disk is full: make room there ({said})"
    assert refused.value.told == "the database's disk is full"


def test_a_mistake_in_sql_is_none_of_that() -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError), reaching():
        raise asyncpg.PostgresSyntaxError("syntax error")
