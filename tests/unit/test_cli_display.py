"""How a board looks, and how the demo judges itself."""

import io
from typing import Any

from rich.console import Console, RenderableType

from services.cli.board import Board
from services.cli.demo import judge
from services.cli.display import outcomes, render
from services.demo import FAILURES, pictures
from tests.unit.test_cli_board import FIRST, a_board_of_three, counts, event


def drawn(renderable: RenderableType, *, columns: int = 140) -> str:
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def in_work(board: Board, *, attempt: int = 1) -> Board:
    board.apply(event(9, "UploadStarted", counts(total=3), upload_id=FIRST, attempt=attempt))
    return board


def test_the_file_in_work_is_shown_with_the_stage_and_percentage_that_were_told() -> None:
    board = in_work(a_board_of_three(), attempt=2)
    told = {"type": "progress", "batch_id": board.batch_id, "upload_id": FIRST, "attempt": 2}

    before = drawn(render(board))
    board.apply({**told, "stage": "thumbnail", "percent": 70})
    after = drawn(render(board))

    assert "started  attempt 2" in before
    assert "%" not in before
    assert "70 %  thumbnail  attempt 2" in after
    assert "100.jpg" in after
    assert "0/3 files" in after
    assert "0 B of 900 B · ? files/s · ? left" in after


def test_the_bars_fit_into_eighty_columns() -> None:
    lines = drawn(render(in_work(a_board_of_three(), attempt=2)), columns=80).splitlines()

    assert [line.split()[0] for line in lines] == ["file", "batch", "0"]
    assert "…" not in "".join(lines)


def test_a_board_without_news_can_be_drawn() -> None:
    assert "none in work" in drawn(render(Board("0198c0de-0000-7000-8000-000000000000")))


def test_the_table_names_every_file_with_its_outcome_and_why() -> None:
    uploads = [an_upload("cat.png", "completed"), an_upload("bad\x1b[2J.jpg", "failed", "corrupt_media")]
    rejected = [{"filename": "notes.txt", "code": "unsupported_media_type", "detail": "it is no picture"}]

    lines = drawn(outcomes(uploads, rejected)).splitlines()

    assert lines[1].split() == ["cat.png", "image/png", "1.0", "kB", "3×2", "1", "completed"]
    assert "bad�[2J.jpg" in lines[2]
    assert lines[2].rstrip().endswith("failed: corrupt_media, it is so")
    assert lines[3].rstrip().endswith("rejected: unsupported_media_type, it is no picture")


def an_upload(filename: str, status: str, code: str | None = None) -> dict[str, Any]:
    return {
        "filename": filename,
        "content_type": "image/png",
        "size_bytes": 1_000,
        "attempts": 1,
        "status": status,
        "result": {"width": 3, "height": 2} if status == "completed" else None,
        "error": {"code": code, "message": "it is so"} if code else None,
    }


def as_it_should_be() -> list[dict[str, Any]]:
    names = [picture.name for picture in pictures()]
    return [an_upload(name, "failed" if name in FAILURES else "completed", FAILURES.get(name)) for name in names]


def test_the_demo_is_content_when_all_completed_but_the_broken_one() -> None:
    assert judge(as_it_should_be(), []) == []
    assert len(as_it_should_be()) >= 13


def test_the_demo_complains_of_each_picture_that_did_not_end_as_it_should() -> None:
    uploads = as_it_should_be()
    good = next(upload for upload in uploads if upload["status"] == "completed")
    bad = next(upload for upload in uploads if upload["status"] == "failed")
    uploads.remove(good)
    bad.update(status="completed", error=None)

    complaints = judge(uploads, [{"filename": good["filename"], "detail": "no room"}])

    assert complaints == sorted(
        [
            f"{good['filename']} should have completed, but was not taken: no room",
            f"{bad['filename']} should have failed with corrupt_media, but completed",
        ]
    )
