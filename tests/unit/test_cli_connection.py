"""Which Sluice a command talks to, and what `up` plans before it starts anything."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from services.cli import connection, up
from services.cli.errors import WrongUse
from services.settings import SettingsError

HERE = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_URL", "TOKEN", "JWT_SECRET", "KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "API_PORT"):
        monkeypatch.delenv(f"SLUICE_{name}", raising=False)


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """A folder where an `up` runs."""
    connection.keep_secret(tmp_path)
    connection.write_endpoints(tmp_path, {"api": HERE, "pid": os.getpid()})
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_running_up_is_found_and_a_token_made_with_its_secret(running: Path) -> None:
    found = connection.find(data_dir=running)

    secret = connection.secret_file(running).read_text().strip()
    assert found.api == HERE
    assert jwt.decode(found.token, secret, algorithms=["HS256"])["sub"] == connection.DEFAULT_USER


def test_the_environment_wins(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_API_URL", "https://sluice.example/")
    monkeypatch.setenv("SLUICE_TOKEN", "mine")

    assert connection.find(data_dir=running) == connection.Connection(api="https://sluice.example", token="mine")


def test_a_token_made_here_never_goes_elsewhere(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_API_URL", "https://sluice.example")

    with pytest.raises(WrongUse, match="SLUICE_TOKEN is not set"):
        connection.find(data_dir=running)


def test_where_nothing_runs_the_message_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="`sluice up`"):
        connection.find(data_dir=tmp_path)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "http://[::1", "http://127.0.0.1:99999", "http://:8080"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SLUICE_API_URL", url)

    with pytest.raises(WrongUse, match="is not an address"):
        connection.find(data_dir=tmp_path)


def test_a_token_with_what_no_token_has_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_API_URL", HERE)
    monkeypatch.setenv("SLUICE_TOKEN", "eyJ…")

    with pytest.raises(WrongUse, match="no token has") as refused:
        connection.find(data_dir=tmp_path)

    assert "eyJ" not in str(refused.value)


def test_the_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first, second = connection.keep_secret(tmp_path), connection.keep_secret(tmp_path)

    assert first == second
    assert len(first) >= 32
    assert stat.S_IMODE(connection.secret_file(tmp_path).stat().st_mode) == 0o600


def test_the_secret_of_the_environment_wins(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "from the environment, long enough"
    monkeypatch.setenv("SLUICE_JWT_SECRET", secret)

    token = connection.make_token(user="ada", data_dir=running, scopes=("read", "write"))

    assert jwt.decode(token, secret, algorithms=["HS256"])["scope"] == "read write"


def test_a_scope_that_means_nothing_is_wrong_use(running: Path) -> None:
    with pytest.raises(WrongUse, match="--scope 'admin' means nothing here: there are read and write"):
        connection.make_token(user="ada", data_dir=running, scopes=("read", "admin"))


def test_broken_endpoints_are_as_good_as_none(tmp_path: Path) -> None:
    connection.endpoints_file(tmp_path).write_text("{")

    assert connection.read_endpoints(tmp_path) == {}


@pytest.mark.parametrize("pid", [2**22 + 1, 2**80, 0, -1, "1", None])
def test_what_a_killed_up_left_behind_is_as_good_as_nothing(tmp_path: Path, pid: object) -> None:
    connection.write_endpoints(tmp_path, {"api": HERE, "pid": pid})

    assert connection.read_endpoints(tmp_path) == {}
    with pytest.raises(WrongUse, match=r"nothing runs in .*`sluice up`"):
        connection.find(data_dir=tmp_path)


def test_an_up_of_another_user_runs(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(connection.os, "kill", refused)

    assert connection.read_endpoints(running)["api"] == HERE


def test_a_taken_port_is_refused_where_it_was_asked_for(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(WrongUse, match=f"Port {taken_port} of 127.0.0.1, where the notifier"):
        up.plan(data_dir=tmp_path, api_port=0, notifier_port=taken_port, any_port=True)


def test_any_port_means_free_ones_all_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_PROCESSOR_PORT", "0")

    plan = up.plan(data_dir=tmp_path, api_port=0, notifier_port=0)

    ports = {plan.settings.api_port, plan.settings.notifier_port, plan.settings.processor_port}
    assert len(ports) == 3
    assert 0 not in ports


def test_the_demo_takes_another_port_where_a_default_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = up.Settings.model_fields["api_port"].default
    monkeypatch.setattr(up, "is_free", lambda _settings, port: port != default)

    plan = up.plan(data_dir=tmp_path, any_port=True)

    assert plan.settings.api_port not in (0, default)
    with pytest.raises(WrongUse, match=str(default)):
        up.plan(data_dir=tmp_path)


def test_servers_that_are_named_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_DATABASE_URL", "postgresql://elsewhere/sluice")
    monkeypatch.setenv("SLUICE_PROCESSOR_PORT", "0")

    plan = up.plan(data_dir=tmp_path, api_port=0, notifier_port=0)

    assert plan.is_external("database_url")
    assert not plan.is_external("kafka_bootstrap_servers")


def test_a_wrong_setting_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_JWT_SECRET", "short")

    with pytest.raises(SettingsError, match="SLUICE_JWT_SECRET is shorter"):
        up.plan(data_dir=tmp_path / "new")

    assert not (tmp_path / "new").exists()
