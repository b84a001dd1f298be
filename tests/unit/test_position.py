"""Positions and ids: what callers hold in their hands and send back to us.

Both are text that comes from outside, so the parsers are fed nonsense too.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.ids import derived_id, is_id, new_id, partition_of
from schemas.position import OFFSET_MAX, PARTITIONS_MAX, InvalidPositionError, Position
from tests.examples import LOG_ID

offsets = st.dictionaries(
    st.integers(0, PARTITIONS_MAX - 1), st.integers(0, OFFSET_MAX), min_size=1, max_size=PARTITIONS_MAX
)
positions = st.builds(Position.of, st.just(LOG_ID), offsets)


def test_a_position_is_written_as_the_contract_shows_it() -> None:
    assert str(Position.of(LOG_ID, {0: 1234})) == "1f3a9c02.0-1234"
    assert str(Position.of(LOG_ID, {1: 88, 0: 1234})) == "1f3a9c02.0-1234.1-88"


@given(positions)
def test_what_a_position_is_written_as_is_read_as_the_same_position(position: Position) -> None:
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1f3a9c02",
        "1f3a9c02.",
        "1f3a9c02.0",
        "1f3a9c02.0-",
        "1f3a9c02.0-01",
        "1f3a9c02.00-1",
        "1f3a9c02.0--1",
        "1f3a9c02.0-1.",
        "1f3a9c02.0-1\n",
        "1f3a9c02.0-1.0-2",
        "1f3a9c02.256-1",
        "1f3a9c02.0-9223372036854775808",
        "1f3a9c02.0-٣",
        "1F3A9C02.0-1",
        "1f3a9c0.0-1",
        "1f3a9c02.0-1" * 1_000_000,
    ],
)
def test_what_is_no_position_is_refused_with_the_text_that_was_given(text: str) -> None:
    with pytest.raises(InvalidPositionError) as caught:
        Position.parse(text)

    assert repr(text[:80]) in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=60) | st.from_regex(r"[0-9a-f]{8}(\.[0-9]{1,4}-[0-9]{1,20}){1,3}"))
def test_any_text_is_a_position_or_refused(text: str) -> None:
    try:
        position = Position.parse(text)
    except InvalidPositionError:
        return

    assert Position.parse(str(position)) == position


def test_the_last_record_is_included() -> None:
    position = Position.of(LOG_ID, {0: 10})

    assert position.includes(Position.of(LOG_ID, {0: 10}))
    assert not position.includes(Position.of(LOG_ID, {0: 11}))


@given(positions, positions)
def test_two_positions_that_include_each_other_are_one(one: Position, other: Position) -> None:
    assert one.includes(one)
    assert (one.includes(other) and other.includes(one)) == (one == other)


def test_a_position_that_names_fewer_partitions_includes_none_of_the_others() -> None:
    one, both = Position.of(LOG_ID, {0: 10}), Position.of(LOG_ID, {0: 10, 1: 0})

    assert both.includes(one)
    assert not one.includes(both)
    assert one.offset(1) is None
    assert both.offset(1) == 0


def test_positions_of_two_logs_include_nothing_of_each_other() -> None:
    assert not Position.of("0" * 32, {0: 10}).includes(Position.of("1" * 32, {0: 1}))


def test_a_position_moves_in_one_partition() -> None:
    assert Position.of(LOG_ID, {0: 10}).at(1, 3).at(0, 11) == Position.of(LOG_ID, {0: 11, 1: 3})


@given(st.integers(0, 2**48 - 1), st.binary(min_size=9, max_size=16), st.integers(0, 255))
def test_a_new_id_is_a_version_7_uuid_that_ends_in_its_partition(now_ms: int, random: bytes, partition: int) -> None:
    identifier = new_id(now_ms=now_ms, random=random, partition=partition)

    assert is_id(identifier)
    assert identifier[14] == "7"
    assert identifier[19] in "89ab"
    assert int(identifier.replace("-", "")[:12], 16) == now_ms
    assert partition_of(identifier) == partition


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=4), st.integers(0, 255))
def test_a_derived_id_is_a_version_8_uuid_and_the_same_again(parts: list[str], partition: int) -> None:
    identifier = derived_id(*parts, partition=partition)

    assert is_id(identifier)
    assert identifier[14] == "8"
    assert identifier[19] in "89ab"
    assert partition_of(identifier) == partition
    assert derived_id(*parts, partition=partition) == identifier


def test_parts_that_only_look_alike_joined_give_different_ids() -> None:
    assert derived_id("ab", "c", partition=0) != derived_id("a", "bc", partition=0)
    assert derived_id("a", partition=0) != derived_id("a", "", partition=0)


@pytest.mark.parametrize("text", ["", "x", LOG_ID.upper(), LOG_ID.replace("-", ""), LOG_ID + "\n", f"{{{LOG_ID}}}"])
def test_only_the_canonical_form_is_an_id(text: str) -> None:
    assert is_id(LOG_ID)
    assert not is_id(text)
