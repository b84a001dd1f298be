"""What may be stored: text, numbers and JSON objects that Postgres and every reader of the log can hold.

The caps are those of the contract; each is tried at its edge.
"""

import json
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from schemas.text import (
    FILENAME_BYTES_MAX,
    METADATA_BYTES_MAX,
    NESTING_LEVELS_MAX,
    RESULT_BYTES_MAX,
    STORABLE,
    Filename,
    Metadata,
    Result,
    json_bytes,
    storable_json,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
    max_leaves=12,
)

STORABLE_TEXT = Annotated[str, STORABLE]


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels - 1):
        value = [value]
    return {"a": value}


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "half \udfff of one"])
def test_text_that_postgres_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(STORABLE_TEXT).validate_python(text)


@pytest.mark.parametrize("text", ["", "plain", "Zoë 🏔", "tab\tand\nnewline", "\x01\x7f\u202e"])
def test_all_other_text_is_kept_as_it_is(text: str) -> None:
    assert TypeAdapter(STORABLE_TEXT).validate_python(text) == text


@pytest.mark.parametrize(
    "value",
    [
        {"deep": [{"er": "a\0b"}]},
        {"key\0": 1},
        {"\ud800": 1},
        {"n": float("nan")},
        {"n": [float("inf")]},
        {"n": 2**2000},
        {1: "a number as key"},
        {"n": b"bytes"},
        {"n": (1, 2)},
        nested(NESTING_LEVELS_MAX + 1),
    ],
    ids=repr,
)
def test_json_that_cannot_be_stored_is_refused(value: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"holds|nested"):
        storable_json(value)


def test_json_may_be_nested_as_deep_as_allowed() -> None:
    assert storable_json(nested(NESTING_LEVELS_MAX))


@given(json_values)
def test_any_other_json_may_be_stored(value: Any) -> None:
    assert storable_json(value) == value
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("value", "size"), [({}, 2), ({"a": 1}, 7), ({"a": "ë"}, 10), ({"a": "🏔"}, 12), ({"a": [1, None]}, 14)]
)
def test_the_size_of_json_is_that_of_its_compact_utf_8_bytes(value: dict[str, Any], size: int) -> None:
    assert json_bytes(value) == size


@pytest.mark.parametrize(("cap", "bytes_max"), [(Metadata, METADATA_BYTES_MAX), (Result, RESULT_BYTES_MAX)])
def test_an_object_may_take_as_many_bytes_as_allowed_and_not_one_more(cap: Any, bytes_max: int) -> None:
    largest = {"a": "x" * (bytes_max - len('{"a":""}'))}
    one_more = {"a": largest["a"] + "x"}

    assert TypeAdapter(cap).validate_python(largest) == largest
    with pytest.raises(ValidationError, match=f"takes {bytes_max + 1} bytes as JSON, {bytes_max} are allowed"):
        TypeAdapter(cap).validate_python(one_more)


def test_a_filename_is_measured_in_bytes() -> None:
    longest = "ë" * (FILENAME_BYTES_MAX // 2) + "x"

    assert TypeAdapter(Filename).validate_python(longest) == longest
    with pytest.raises(ValidationError, match="takes 256 bytes"):
        TypeAdapter(Filename).validate_python(longest + "x")
