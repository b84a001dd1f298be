"""Many simulated runs: `python -m tests.faults.simulation --seeds 1000 [--seed 7] [--scenario zombie]`.

Each seed tells every story once with everything breaking at random; the first also tells them with a crash at each
point, and pairs of crashes are sampled for each. What goes wrong is printed with the command that runs just that again,
with its trace; the exit code is then 1.
"""

import argparse
import sys
import time
from collections.abc import Iterator

from tests.faults.simulation.planted import PLANTED
from tests.faults.simulation.run import Result, at_random, crash_at, every_crash, pairs_of_crashes
from tests.faults.simulation.scenarios import SCENARIOS

PROGRESS_S = 5.0
PAIRS_PER_SEED = 4
SHOWN_MAX = 5
FOUND_MAX = 10


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 where every run kept every promise."""
    chosen = _parser().parse_args(arguments)
    if chosen.planted:
        return _find_planted()
    if chosen.trace or chosen.crash:
        return _replay(chosen)
    began_s = told_s = time.perf_counter()
    runs = crashes = failures = found = 0
    for result in _runs(chosen.seed, chosen.seeds, chosen.scenario):
        runs, crashes, failures = runs + 1, crashes + len(result.crashes), failures + result.failures
        if result.violations:
            found += 1
            _tell(result)
        if found == FOUND_MAX:
            _say("enough is wrong for now")
            break
        if chosen.minutes is not None and time.perf_counter() - began_s > chosen.minutes * 60:
            break
        if time.perf_counter() - told_s > PROGRESS_S:
            told_s = time.perf_counter()
            _say(f"{runs} runs in {told_s - began_s:.0f} s, at seed {result.seed} of {result.scenario}, {found} wrong")
    seconds = time.perf_counter() - began_s
    _say(f"{runs} runs, {crashes} crashes, {failures} other faults, {found} runs wrong, in {seconds:.0f} s")
    return 1 if found else 0


def _runs(seed: int, seeds: int, scenario: str | None) -> Iterator[Result]:
    stories = [scenario] if scenario else list(SCENARIOS)
    for number in range(seed, seed + seeds):
        for story in stories:
            yield at_random(story, seed=str(number))
            yield from pairs_of_crashes(story, seed=str(number), pairs=PAIRS_PER_SEED)
    for story in stories:
        yield from every_crash(story, seed=str(seed))


def _replay(chosen: argparse.Namespace) -> int:
    if chosen.scenario is None:
        _say(f"say which story with --scenario: one of {', '.join(SCENARIOS)}")
        return 2
    seed = str(chosen.seed)
    if chosen.crash:
        result = crash_at(chosen.scenario, seed=seed, points=[int(point) for point in chosen.crash.split(",")])
    else:
        result = at_random(chosen.scenario, seed=seed)
    for at_s, node, what, details in result.trace if chosen.trace else ():
        _say(f"{at_s - 1_000:10.6f}  {node:12} {what:28} {details}")
    _tell(result)
    return 1 if result.violations else 0


def _find_planted() -> int:
    """Whether every planted bug is found."""
    missed = 0
    for name, planted in PLANTED.items():
        seed = planted.found_at()
        missed += seed is None
        _say(f"{name}: {'NOT FOUND' if seed is None else f'found at seed {seed}'}")
    return 1 if missed else 0


def _tell(result: Result) -> None:
    crashes = "; ".join(f"{node} died {where}" for node, where in result.crashes[:SHOWN_MAX])
    _say(f"{result.scenario}, seed {result.seed}: {len(result.violations)} wrong ({crashes or 'nobody died'})")
    for violation in result.violations[:SHOWN_MAX]:
        _say(f"  {violation}")
    if result.violations:
        _say(f"  again: {result.command}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds (20)")
    parser.add_argument("--seed", type=int, default=1, help="the first one (1)")
    parser.add_argument("--minutes", type=float, help="stop after so long, however many seeds are left")
    parser.add_argument("--scenario", choices=list(SCENARIOS), help="only this story")
    parser.add_argument("--crash", help="run once, with crashes at these points, separated by commas")
    parser.add_argument("--trace", action="store_true", help="run once, and print what happened")
    parser.add_argument("--planted", action="store_true", help="plant each of the known bugs and look for it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
