"""What a watcher knows: counts, bytes, rate and time left come from facts, and unknown stays unknown."""

from typing import Any

import pytest

from services.cli.board import Board
from services.cli.display import clean, duration, facts_line, size
from tests.examples import BATCH, OTHER_BATCH, an_id

FIRST, SECOND, THIRD = (an_id("upload", number) for number in (1, 2, 3))


def position(offset: int) -> str:
    return f"1f3a9c02.0-{offset}"


def counts(
    *, total: int, good: int = 0, bad: int = 0, sealed: bool = True, status: str = "processing"
) -> dict[str, Any]:
    return {
        "id": BATCH,
        "status": status,
        "sealed": sealed,
        "total_uploads": total,
        "processed_uploads": good + bad,
        "successful_uploads": good,
        "failed_uploads": bad,
        "cancelled_uploads": 0,
        "progress": (good + bad) / total if total else 0.0,
    }


def subscribed(offset: int, batch: dict[str, Any]) -> dict[str, Any]:
    return {"type": "subscribed", "batch_id": BATCH, "position": position(offset), "batch": batch, "recovered": False}


def event(offset: int, name: str, batch: dict[str, Any] | None, *, second: float = 0, **data: Any) -> dict[str, Any]:
    return {
        "type": "event",
        "position": position(offset),
        "event": {
            "id": an_id("event", offset),
            "type": f"sluice.{name}.v1",
            "time": f"2026-01-01T12:00:{second:06.3f}Z",
            "data": {"batch_id": BATCH, **data},
        },
        "batch": batch,
    }


def queued(offset: int, upload_id: str, size_bytes: int, *, total: int) -> dict[str, Any]:
    data = {"upload_id": upload_id, "filename": f"{size_bytes}.jpg", "size_bytes": size_bytes}
    return event(offset, "UploadQueued", counts(total=total), **data)


def succeeded(offset: int, upload_id: str, batch: dict[str, Any], *, second: float) -> dict[str, Any]:
    return event(offset, "UploadSucceeded", batch, second=second, upload_id=upload_id, attempt=1, result={})


def a_board_of_three() -> Board:
    board = Board(BATCH)
    board.apply(subscribed(1, counts(total=0, sealed=False, status="pending")))
    for offset, (upload_id, size_bytes) in enumerate(((FIRST, 100), (SECOND, 200), (THIRD, 600)), start=2):
        board.apply(queued(offset, upload_id, size_bytes, total=offset - 1))
    return board


def test_what_facts_do_not_tell_yet_is_unknown() -> None:
    board = a_board_of_three()

    assert board.rate is None
    assert board.time_left_s is None
    assert (board.bytes_done, board.bytes_total) == (0, 900)
    assert "? left" in facts_line(board)


def test_rate_and_time_left_come_from_the_times_of_outcomes() -> None:
    board = a_board_of_three()

    board.apply(succeeded(5, FIRST, counts(total=3, good=1), second=10))
    after_one = board.rate
    board.apply(succeeded(6, SECOND, counts(total=3, good=2), second=12))

    assert after_one is None
    assert board.rate is not None
    assert (board.rate.items_per_s, board.rate.bytes_per_s) == (0.5, 100)
    assert board.time_left_s == pytest.approx(600 / 100)


def test_time_left_is_unknown_while_files_may_still_be_added() -> None:
    board = a_board_of_three()

    board.apply(succeeded(5, FIRST, counts(total=3, good=1, sealed=False), second=10))
    board.apply(succeeded(6, SECOND, counts(total=3, good=2, sealed=False), second=12))

    assert board.rate is not None
    assert board.time_left_s is None
    assert "? left" in facts_line(board)


def test_outcomes_of_one_moment_give_no_rate() -> None:
    board = a_board_of_three()

    board.apply(succeeded(5, FIRST, counts(total=3, good=1), second=10))
    board.apply(succeeded(6, SECOND, counts(total=3, good=2), second=10))

    assert board.rate is None


def test_a_message_that_comes_twice_changes_nothing() -> None:
    board = a_board_of_three()
    message = succeeded(5, FIRST, counts(total=3, good=1), second=10)

    first, second = board.apply(message), board.apply(message)

    assert (first, second) == (True, False)
    assert (board.done, board.bytes_done) == (1, 100)


def test_messages_of_another_batch_change_nothing() -> None:
    board = a_board_of_three()
    foreign = succeeded(9, FIRST, counts(total=3, good=3), second=10)
    foreign["event"]["data"]["batch_id"] = OTHER_BATCH

    assert not board.apply(foreign)
    assert board.done == 0


def test_percentages_count_for_the_attempt_in_work_alone() -> None:
    board = a_board_of_three()
    board.apply(event(5, "UploadStarted", counts(total=3), upload_id=FIRST, attempt=2))
    late = {"type": "progress", "batch_id": BATCH, "upload_id": FIRST, "attempt": 1, "stage": "decode", "percent": 90}

    of_the_first_attempt = board.apply(late)
    of_the_second = board.apply({**late, "attempt": 2, "percent": 40})

    assert (of_the_first_attempt, of_the_second) == (False, True)
    assert board.in_work is not None
    assert (board.in_work.attempt, board.in_work.stage, board.in_work.percent) == (2, "decode", 40)


def test_a_failed_attempt_goes_back_to_the_queue_and_tells_why() -> None:
    board = a_board_of_three()
    error = {"code": "worker_crashed", "message": "it crashed"}

    board.apply(event(5, "UploadStarted", counts(total=3), upload_id=FIRST, attempt=1))
    board.apply(event(6, "UploadAttemptFailed", counts(total=3), upload_id=FIRST, attempt=1, error=error))

    assert board.in_work is None
    assert ("queued", error) == (board.items[FIRST].status, board.items[FIRST].error)


def test_rows_of_the_api_fill_in_what_a_snapshot_does_not_hold_and_never_go_back() -> None:
    board = Board(BATCH)
    board.apply(subscribed(9, counts(total=3, good=1)))
    assert board.misses_rows
    assert board.bytes_total is None
    board.apply(event(10, "UploadStarted", counts(total=3, good=1), upload_id=SECOND, attempt=1))

    rows = [a_row(FIRST, 5, "completed", 100), a_row(SECOND, 3, "queued", 200), a_row(THIRD, 4, "queued", 600)]
    board.add_rows(rows)

    assert not board.misses_rows
    assert (board.bytes_done, board.bytes_total) == (100, 900)
    assert board.items[SECOND].status == "processing"
    assert board.items[SECOND].filename == "200.jpg"


def a_row(upload_id: str, offset: int, status: str, size_bytes: int) -> dict[str, Any]:
    return {
        "id": upload_id,
        "filename": f"{size_bytes}.jpg",
        "size_bytes": size_bytes,
        "status": status,
        "attempts": 0,
        "error": None,
        "result": None,
        "completed_at": "2026-01-01T12:00:00.000Z" if status == "completed" else None,
        "position": position(offset),
    }


def test_a_completed_batch_with_a_failed_file_is_not_all_well() -> None:
    board = a_board_of_three()
    board.apply(event(8, "BatchCompleted", counts(total=3, good=2, bad=1, status="completed")))

    assert board.ended
    assert not board.all_well
    assert board.time_left_s == 0


def test_cancelling_takes_the_unfinished_files_along() -> None:
    board = a_board_of_three()
    board.apply(succeeded(5, FIRST, counts(total=3, good=1), second=10))

    board.apply(event(6, "BatchCancelled", counts(total=3, good=1, status="cancelled")))

    assert board.ended
    assert [item.status for item in board.items.values()] == ["completed", "cancelled", "cancelled"]


def test_a_deleted_batch_has_ended_though_it_has_no_counts_any_more() -> None:
    board = a_board_of_three()

    board.apply(event(6, "BatchDeleted", None))

    assert (board.deleted, board.ended, board.all_well) == (True, True, False)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(999), "999 B"),
        (size(1_234_567), "1.2 MB"),
        (size(3e13), "30.0 TB"),
        (duration(6.4), "0:07"),
        (duration(3_725), "1:02:05"),
        (clean("a\x1b[2Jb\u202ec"), "a�[2Jb�c"),
    ],
)
def test_numbers_and_names_are_fit_for_people(shown: str, expected: str) -> None:
    assert expected == shown


def test_what_the_sender_announced_counts_until_the_batch_is_sealed() -> None:
    board = Board(BATCH, announced_files=9, announced_bytes=900)
    open_batch = {"status": "processing", "sealed": False, "total_uploads": 2, "processed_uploads": 1}
    board.counts = {**open_batch, "cancelled_uploads": 0, "failed_uploads": 0}

    assert (board.total, board.done) == (9, 1)

    board.counts |= {"sealed": True}

    assert board.total == 2
