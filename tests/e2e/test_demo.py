"""The demo, as a person and as a script meets it."""

import asyncio
import os
import pty
import re
import signal

import pytest

from services.demo import FAILURES, pictures
from tests.e2e.conftest import ANY_PORTS, STOP_TIMEOUT_S, Sluice, family_of, require_gone

DEMO_TIMEOUT_S = 200
pytestmark = pytest.mark.timeout(300)  # many commands, each a process that takes its time on a busy machine


async def test_without_a_terminal_the_demo_prints_every_outcome_and_ends_with_zero(sluice: Sluice) -> None:
    demo = await asyncio.wait_for(sluice.run("demo", *ANY_PORTS), DEMO_TIMEOUT_S)

    assert demo.code == 0, demo.err
    for picture in pictures():
        row = next(line for line in demo.out.splitlines() if re.match(rf"{re.escape(picture.name)}\s+image/", line))
        if picture.name in FAILURES:
            assert f"failed: {FAILURES[picture.name]}" in row
        else:
            assert re.search(r"\d+×\d+ +1 +completed", row)
    assert re.search(r"^api +http://127\.0\.0\.1:\d+", demo.out, re.MULTILINE)
    assert not (sluice.data_dir / "endpoints.json").exists()


async def test_with_a_terminal_the_demo_shows_bars_and_stays_until_ctrl_c(sluice: Sluice) -> None:
    ours, its = pty.openpty()
    demo = await sluice.start("demo", *ANY_PORTS, stdout=its, stderr=its)
    os.close(its)

    shown = await asyncio.wait_for(read_until(ours, b"Ctrl-C stops it"), DEMO_TIMEOUT_S)
    assert "Ctrl-C stops it" in shown, shown
    family = family_of(demo)
    demo.send_signal(signal.SIGINT)
    await read_until(ours, b"", to_the_end=True)
    code = await asyncio.wait_for(demo.wait(), STOP_TIMEOUT_S)
    os.close(ours)

    assert code == 0
    assert "━" in shown
    assert f"{len(pictures())}/{len(pictures())} files" in shown
    assert "Authorization: Bearer" in shown
    require_gone(family)


async def read_until(terminal: int, wanted: bytes, *, to_the_end: bool = False) -> str:
    """What a terminal shows up to and including `wanted`, or until its program has ended."""
    shown = b""
    while to_the_end or wanted not in shown:
        try:
            chunk = await asyncio.to_thread(os.read, terminal, 65_536)
        except OSError:  # how Linux says that nobody has the other side any more
            break
        if not chunk:
            break
        shown += chunk
    return shown.decode(errors="replace")  # what came last may end within a character
