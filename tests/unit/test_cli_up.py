"""What `up` starts, decided from the settings alone."""

from pathlib import Path

import pytest

from services.cli.up import Plan, _members
from services.settings import load


def members(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[tuple[str, int, dict[str, str]]]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return _members(Plan(Path("data"), load()))


def test_one_lane_has_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert members(monkeypatch) == [
        ("notifier", 8081, {}),
        ("processor", 8082, {"SLUICE_PARTITION": "0"}),
        ("api", 8080, {}),
    ]


def test_every_further_lane_has_a_processor_with_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [member for member in members(monkeypatch, SLUICE_PARTITIONS="3") if member[0].startswith("processor")]

    assert [name for name, _, _ in found] == ["processor", "processor-1", "processor-2"]
    assert [own["SLUICE_PARTITION"] for _, _, own in found] == ["0", "1", "2"]
    assert [own["SLUICE_PROCESSOR_PORT"] for _, _, own in found[1:]] == [str(port) for _, port, _ in found[1:]]
    assert len({port for _, port, _ in found}) == 3
