"""SLUICE_FAULT: what it takes, what it refuses, and that a point strikes once, at its time."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services import faults
from services.settings import Settings, SettingsError, load


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm("")


def test_nothing_is_armed_by_default() -> None:
    faults.arm(Settings().fault)

    for point in faults.POINTS:
        faults.reach(point)


def test_a_point_strikes_at_its_time_and_not_again() -> None:
    faults.arm("api.after_append:error:2, processor.in_work:error")

    faults.reach("api.after_append")
    with pytest.raises(faults.FaultError, match=r"api\.after_append"):
        faults.reach("api.after_append")
    faults.reach("api.after_append")
    with pytest.raises(faults.FaultError, match=r"processor\.in_work"):
        faults.reach("processor.in_work")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("api.nowhere:kill", "choose from api.after_blob"),
        ("api.after_append", "choose from kill, stop, term, error"),
        ("api.after_append:explode", "choose from kill, stop, term, error"),
        ("api.after_append:kill:0", "'0', which is not a number"),
        ("api.after_append:kill:soon", "'soon', which is not a number"),
    ],
)
def test_a_setting_that_means_nothing_stops_the_start_and_says_what_there_is(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=r"SLUICE_FAULT") as raised:
        load(fault=text)

    assert complaint in str(raised.value)


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_an_action_ends_the_process_by_its_signal(action: str, number: signal.Signals) -> None:
    program = f"from services import faults; faults.arm('api.after_blob:{action}'); faults.reach('api.after_blob')"

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)

    assert ended.returncode == -number
    assert ended.stderr.decode() == f"SLUICE_FAULT: {action} at api.after_blob\n"
