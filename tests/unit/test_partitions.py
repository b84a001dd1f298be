"""How far the read models are, as one partition of the tail hears it, and when they are not to be asked."""

from collections import deque

from schemas.batch import Lane
from services.partitions import Partition, first_waiting


def a_partition(next_offset: int) -> Partition:
    return Partition.at(Lane(0, "log", next_offset))


def test_what_was_heard_late_takes_nothing_back() -> None:
    partition = a_partition(10)

    partition.heard(30)
    partition.heard(20)
    partition.found(25, before=10)

    assert (partition.projected, partition.includes, partition.complaint) == (30, 30, None)


def test_read_models_that_went_back_are_not_to_be_asked_until_they_are_as_far_again() -> None:
    partition = a_partition(30)

    partition.found(4, before=30)
    complaint = partition.complaint
    partition.heard(20)
    still = partition.complaint
    partition.heard(31)

    assert complaint is not None
    assert "they include 4 records, and included 30 before" in complaint
    assert still is not None
    assert (partition.projected, partition.includes, partition.complaint) == (31, 31, None)


def test_the_first_fact_that_waits_is_found_behind_those_that_do_not() -> None:
    order = deque([(3, "a"), (7, "b"), (9, "a")])

    assert [first_waiting(order, projected) for projected in (0, 4, 8, 10)] == ["a", "b", "a", None]
