"""Breaking on purpose, for tests: `SLUICE_FAULT=api.after_append:kill` ends the api just there.

The setting names points of the code and what happens to this process when it comes by: `point:action[:nth]`, several
by comma; the first time unless `nth` says otherwise, and once. Where nothing is armed, `reach` is one look at an empty
dictionary. The points stand at the steps between which something can be lost or doubled; tests/faults/real drives them.
"""

import os
import signal
import sys
from collections.abc import Callable

POINTS = (
    "api.after_blob",
    "api.before_append",
    "api.after_append",
    "api.before_answer",
    "processor.after_lock",
    "processor.after_claim",
    "processor.before_commit",
    "processor.in_commit",
    "processor.after_commit",
    "processor.before_start",
    "processor.after_start",
    "processor.in_work",
    "processor.after_work",
    "processor.before_outcome",
    "processor.after_outcome",
    "notifier.after_snapshot",
    "notifier.before_send",
    "notifier.after_replay",
)


class FaultError(Exception):
    """What the action `error` raises: nothing in the code expects it."""


def _raise(point: str) -> None:
    raise FaultError(f"an error at {point}, on purpose (SLUICE_FAULT)")


ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": lambda _point: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _point: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda _point: os.kill(os.getpid(), signal.SIGTERM),
    "error": _raise,
}

_armed: dict[str, list[tuple[int, str]]] = {}
_reached: dict[str, int] = {}


def parse(text: str) -> dict[str, list[tuple[int, str]]]:
    """Point → at which time, what. Raises ValueError with what there is to choose from."""
    wanted: dict[str, list[tuple[int, str]]] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        point, _, rest = part.partition(":")
        action, _, nth = rest.partition(":")
        if point not in POINTS:
            raise ValueError(f"{part!r} names no point there is; choose from {', '.join(POINTS)}")
        if action not in ACTIONS:
            raise ValueError(f"{part!r} names no action there is; choose from {', '.join(ACTIONS)}")
        if nth and not (nth.isascii() and nth.isdigit() and int(nth)):
            raise ValueError(f"{part!r} ends with {nth!r}, which is not a number from 1 on")
        wanted.setdefault(point, []).append((int(nth or 1), action))
    return wanted


def arm(text: str) -> None:
    """From here on `reach` does what the setting says; counting begins anew."""
    _armed.clear()
    _reached.clear()
    _armed.update(parse(text))


def reach(point: str) -> None:
    """This process came by here; most often nothing follows from that."""
    if point in _armed:
        _strike(point)


def _strike(point: str) -> None:
    _reached[point] = _reached.get(point, 0) + 1
    for nth, action in _armed[point]:
        if nth == _reached[point]:
            sys.stderr.write(f"SLUICE_FAULT: {action} at {point}\n")
            sys.stderr.flush()
            ACTIONS[action](point)
