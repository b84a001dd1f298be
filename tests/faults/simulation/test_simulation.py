"""What breaks in a simulated world costs nobody anything, and the simulation itself can be trusted.

`make drill` runs thousands of seeds; here are a few hundred runs: a crash at a good part of the points of each story,
pairs of crashes, and everything at random. A failure names the command that runs it again.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.simulation.__main__ import main
from tests.faults.simulation.planted import PLANTED
from tests.faults.simulation.run import Result, at_random, crash_at, every_crash, pairs_of_crashes
from tests.faults.simulation.scenarios import SCENARIOS

ROOT = Path(__file__).parents[3]
SEED = "1"
CRASHES = 25
SEEDS = range(1, 8)


def wrong(results: list[Result]) -> str:
    """The first run that went wrong, and how to run it again; empty where all went well."""
    return next((f"{result.command}\n{result.violations}" for result in results if result.violations), "")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_point_breaks_no_promise(scenario: str) -> None:
    quiet, *runs = every_crash(scenario, seed=SEED, runs=CRASHES)

    assert (quiet.crashes, quiet.failures) == ([], 0)
    assert wrong([quiet, *runs]) == ""
    assert len(runs) >= CRASHES
    assert {len(run.crashes) for run in runs} == {1}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_crashes_break_no_promise(scenario: str) -> None:
    runs = list(pairs_of_crashes(scenario, seed=SEED, pairs=5))

    assert wrong(runs) == ""
    assert sum(len(run.crashes) for run in runs) > len(runs)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_fails_no_promise_is_broken(scenario: str) -> None:
    runs = [at_random(scenario, seed=str(seed)) for seed in SEEDS]

    assert wrong(runs) == ""
    assert sum(run.failures for run in runs) > len(runs)


def test_the_read_models_are_rebuilt_and_switched_to_while_work_goes_on() -> None:
    quiet = crash_at("rebuilt", seed=SEED, points=[])

    (switched_at_s,) = [at_s for at_s, _, what, _ in quiet.trace if what == "switched"]
    landed_at_s = [at_s for at_s, _, what, _ in quiet.trace if what == "landed"]
    assert min(landed_at_s) < switched_at_s < max(landed_at_s)


def test_a_replay_that_dies_anywhere_leaves_live_what_was_live() -> None:
    _, *runs = every_crash("rebuilt", seed=SEED, runs=CRASHES, of="replayer")

    assert wrong(runs) == ""
    steps = [[(what, said) for _, _, what, said in run.trace if what in ("crash", "switched")] for run in runs]
    again = {tuple(said for what, said in each if what == "switched") for each in steps}
    assert all([what for what, _ in each].count("crash") == 1 for each in steps)
    assert again == {("gen_2",), ("gen_2", "gen_3")}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str) -> None:
    assert PLANTED[name].found_at() is not None


def test_the_same_seed_is_the_same_run() -> None:
    first, again = at_random("zombie", seed="7"), at_random("zombie", seed="7")
    other = at_random("zombie", seed="8")

    assert first.trace == again.trace
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_same_seed_is_the_same_run_in_another_process() -> None:
    here = [at_random("duplicates", seed="3").fingerprint, crash_at("deploy", seed="3", points=[90, 120]).fingerprint]
    there = (
        "from tests.faults.simulation.run import at_random, crash_at\n"
        "print(at_random('duplicates', seed='3').fingerprint)\n"
        "print(crash_at('deploy', seed='3', points=[90, 120]).fingerprint)\n"
    )

    command = [sys.executable, "-c", there]
    said = subprocess.run(
        command, cwd=ROOT, env={"PYTHONHASHSEED": "4711"}, capture_output=True, text=True, check=True
    ).stdout

    assert said.split() == here


def test_the_command_prints_how_to_run_a_failure_again(capsys: pytest.CaptureFixture[str]) -> None:
    with PLANTED["bytes dropped in doubt"].plant():
        code = main(["--seeds", "1", "--seed", "1", "--scenario", "last_place"])
    said = capsys.readouterr().out
    again = next(line for line in said.splitlines() if "again: " in line).split("tests.faults.simulation ")[1]
    with PLANTED["bytes dropped in doubt"].plant():
        code_again = main(again.split())

    assert (code, code_again) == (1, 1)
    assert "are gone" in capsys.readouterr().out


def test_the_command_is_content_where_nothing_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--scenario", "cancelled_in_work", "--seed", "5", "--crash", "12"])

    assert code == 0
    assert "0 wrong" in capsys.readouterr().out
