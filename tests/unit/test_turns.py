"""A test that is alone is so, and those that are not keep nobody out but it."""

import fcntl
import threading
import time
from pathlib import Path

import pytest

from tests import turns


@pytest.fixture(autouse=True)
def turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of this test's own: those of the run may be locked right now."""
    for name in ("turn", "gate"):
        (tmp_path / name).touch()
        monkeypatch.setattr(turns, f"_{name.upper()}", tmp_path / name)
    return tmp_path / "turn"


def is_free(path: Path, how: int) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_tests_run_side_by_side_and_keep_out_one_that_is_alone(turn: Path) -> None:
    with turns._turn(alone=False), turns._turn(alone=False):
        assert is_free(turn, fcntl.LOCK_SH)
        assert not is_free(turn, fcntl.LOCK_EX)

    assert is_free(turn, fcntl.LOCK_EX)


def test_one_that_is_alone_keeps_all_others_out(turn: Path) -> None:
    with turns._turn(alone=True):
        assert not is_free(turn, fcntl.LOCK_SH)

    assert is_free(turn, fcntl.LOCK_EX)


def test_nobody_else_begins_while_one_that_is_alone_waits(turn: Path) -> None:
    with turn.open() as running:
        fcntl.flock(running, fcntl.LOCK_SH)
        waiting = threading.Thread(target=lambda: _enter_and_leave(alone=True))
        waiting.start()
        while is_free(turn.with_name("gate"), fcntl.LOCK_SH):
            time.sleep(0)
        assert waiting.is_alive()
    waiting.join()

    assert is_free(turn.with_name("gate"), fcntl.LOCK_EX)
    assert is_free(turn, fcntl.LOCK_EX)


def _enter_and_leave(*, alone: bool) -> None:
    with turns._turn(alone=alone):
        pass
