"""The table of faults at the end of a test run, also where several workers share the tests (pytest-xdist)."""

from typing import Any

import pytest

from tests.faults.real import table


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its part to whoever prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = table.shared()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker is done: its part is ours now."""
    table.take(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := table.lines():
        terminalreporter.section("faults that were injected")
        for line in lines:
            terminalreporter.write_line(line)
