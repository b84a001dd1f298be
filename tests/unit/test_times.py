"""Reading RFC 3339: its own examples, what comes out of a query, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.times import read_rfc3339
from schemas.views import rfc3339


@given(st.integers(min_value=0, max_value=253_402_300_799_999))
def test_what_we_write_is_read_as_it_was(time_ms: int) -> None:
    assert read_rfc3339(rfc3339(time_ms)) == time_ms


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1985-04-12T23:20:50.52Z", 482_196_050_520),
        ("1996-12-19T16:39:57-08:00", 851_042_397_000),
        ("1990-12-31T23:59:60Z", 662_688_000_000),
        ("1990-12-31T15:59:60-08:00", 662_688_000_000),
        ("1937-01-01T12:00:27.87+00:20", -1_041_337_172_130),
        ("2026-01-31t12:00:00.123987z", 1_769_860_800_123),
        ("2026-01-31 12:00:00Z", 1_769_860_800_000),
        ("2026-01-31T13:00:00 01:00", 1_769_860_800_000),
        ("0001-01-01T00:00:00+23:59", -62_135_683_140_000),
    ],
)
def test_a_time_is_its_millisecond(text: str, time_ms: int) -> None:
    assert read_rfc3339(text) == time_ms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-01-31T12:00Z",
        "2026-02-30T12:00:00Z",
        "2026-01-31T24:00:00Z",
        "2026-01-31T12:00:61Z",
        "2026-01-31T12:00:00+24:00",
        "2026-01-31T12:00:00+01",
        "0000-01-01T00:00:00Z",
        "2026-01-31T12:00:00.Z",
        "2026-01-31T12:00:00Z ",
        "२०२६-01-31T12:00:00Z",
        "1769860800",
    ],
)
def test_what_is_no_time_is_none(text: str) -> None:
    assert read_rfc3339(text) is None
