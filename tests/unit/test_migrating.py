"""Which versions of Sluice may use one database side by side, as their migrations say."""

from pathlib import Path

import pytest

from services.migrating import compatible_from, refusal

KNOWN = {"0001_operations.sql": "", "0002_processors.sql": ""}


def refused(found: dict[str, str | None]) -> str | None:
    return refusal(newest_known="0002_processors.sql", known=KNOWN, found=found)


def test_what_is_known_is_not_refused() -> None:
    assert refused({"0001_operations.sql": None, "0002_processors.sql": "0001"}) is None


@pytest.mark.parametrize("oldest", ["0001", "0002"])
def test_a_newer_migration_that_is_compatible_with_ours_is_not_refused(oldest: str) -> None:
    assert refused({"0001_operations.sql": None, "0003_more.sql": oldest}) is None


def test_a_newer_migration_that_needs_newer_services_is_refused_with_its_name() -> None:
    said = refused({"0001_operations.sql": None, "0003_more.sql": "0001", "0004_less.sql": "0003"})

    assert said is not None
    assert "(0004_less.sql), which needs a Sluice that knows migration 0003" in said
    assert "up to 0002_processors.sql" in said


def test_a_newer_migration_that_says_nothing_is_refused() -> None:
    said = refused({"0003_more.sql": None})

    assert said is not None
    assert "which this one cannot work with" in said


def test_every_migration_after_the_first_says_what_it_is_compatible_with() -> None:
    scripts = sorted(Path("schemas/migrations").glob("[0-9]*.sql"))

    unsaid = [path.name for path in scripts[1:] if compatible_from(path.read_text(encoding="utf-8")) is None]

    assert len(scripts) >= 2
    assert unsaid == []
