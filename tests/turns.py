"""Turns among the processes of one test run: a test marked `alone` runs while no other process runs any.

Tests that hold a time the contract promises would else measure how busy the other half of the suite keeps the machine.
Every test holds a shared lock on this file, one that is alone an exclusive one. A gate before it, a lock on the folder,
keeps the others from going round for ever while it waits. Setting up and tearing down belong to the turn.
"""

import contextlib
import fcntl
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

_TURN = Path(__file__)
_GATE = _TURN.parent


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the turn, where there are several processes; it is not part of the test's time limit."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    with _turn(alone=item.get_closest_marker("alone") is not None) if several else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    with _locked(_GATE, fcntl.LOCK_EX) as gate, _locked(_TURN, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing leaves it to a child that was forked meanwhile
        os.close(descriptor)
