"""What `up` starts, decided from the settings alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.errors import WrongUse
from services.cli.up import Plan, _members, _url, is_free, plan
from services.embedded.folders import free_ports
from services.serving import bound
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


@pytest.fixture(params=["127.0.0.1", "::1", "::"])
def listening(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """An address of this machine, and a port of it that is taken."""
    host: str = request.param
    try:
        taken = bound(host, 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with taken:
        taken.listen()
        yield host, taken.getsockname()[1]


def test_a_port_is_taken_where_somebody_listens_and_free_afterwards(listening: tuple[str, int]) -> None:
    host, port = listening

    assert not is_free(load(host=host), port)
    assert is_free(load(host=host), 0)


@pytest.mark.parametrize(
    ("host", "reason"),
    [("203.0.113.1", "Cannot assign requested address"), ("nowhere.invalid", "not known|resolution")],
)
def test_an_address_of_another_machine_is_refused_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, reason: str
) -> None:
    monkeypatch.setenv("SLUICE_HOST", host)
    (port,) = free_ports(1)

    with pytest.raises(WrongUse, match=f"No service can listen on port {port} of SLUICE_HOST='{host}': .*({reason})"):
        plan(data_dir=tmp_path, api_port=0, notifier_port=port)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),  # asked, not listened on
        ("", "http://127.0.0.1:80"),
        ("10.1.2.3", "http://10.1.2.3:80"),
        ("::", "http://127.0.0.1:80"),
        ("fd00::1", "http://[fd00::1]:80"),
    ],
)
def test_a_service_is_asked_where_it_listens_an_ipv6_address_in_brackets(host: str, url: str) -> None:
    assert _url(host, 80) == url
