"""Ranges of bytes (RFC 9110, section 14) and the ETags that go with them."""

import pytest

from services.api.ranges import Span, names, unchanged, wanted

SIZE = 1_000
WHOLE = Span(0, SIZE, partial=False)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, WHOLE),
        ("bytes=0-99", Span(0, 100, partial=True)),
        ("bytes=900-", Span(900, 1_000, partial=True)),
        ("bytes=990-5000", Span(990, 1_000, partial=True)),
        ("bytes=-10", Span(990, 1_000, partial=True)),
        ("bytes=-5000", Span(0, 1_000, partial=True)),
        ("bytes=999-999", Span(999, 1_000, partial=True)),
        ("bytes=1000-", None),
        ("bytes=-0", None),
        ("bytes=5-4", WHOLE),
        ("bytes=0-1,5-6", WHOLE),
        ("bytes=-", WHOLE),
        ("lines=0-1", WHOLE),
        ("bytes=a-b", WHOLE),
    ],
)
def test_a_range_is_what_it_says_and_nonsense_asks_for_the_whole(header: str | None, expected: Span | None) -> None:
    assert wanted(header, size_bytes=SIZE) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [('"x"', True), ('W/"x"', True), ('"a", "x"', True), ("*", True), ('"y"', False), ("x", False), (None, False)],
)
def test_an_etag_is_named_or_not(header: str | None, expected: bool) -> None:  # noqa: FBT001  # pytest gives it
    assert names(header, '"x"') is expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, True), ('"x"', True), ('W/"x"', False), ("*", False), ('"a", "x"', False), ('"y"', False), ("", False)],
)
def test_a_range_is_given_only_of_exactly_the_same_bytes(header: str | None, expected: bool) -> None:  # noqa: FBT001  # pytest gives it
    assert unchanged(header, '"x"') is expected
