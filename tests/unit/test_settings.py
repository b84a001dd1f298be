"""What settings take, and that a wrong one is told in a line before anything starts."""

import pytest

from services.settings import SettingsError, load

HOST_AND_PORT = "not of the form host:port, with a port from 1 to 65535"
WEB_URL = r"not of the form https://host\[:port\]/path"
TOPIC = "no topic's name"
INT64_MAX = 2**63 - 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *[
            ("KAFKA_BOOTSTRAP_SERVERS", servers, HOST_AND_PORT)
            for servers in ("localhost:abc", "127.0.0.1:99999", "kafka:0", "kafka:", "", "a:1,,b:1", "::1", "a..b:1")
        ],
        *[("LOG_TOPIC", topic, TOPIC) for topic in ("", ".", "..", "a b", "a/b", "é", "a\n", "a" * 250)],
        ("PROGRESS_TOPIC", "a b", TOPIC),
        ("LOG_TOPIC", "sluice.progress", "SLUICE_LOG_TOPIC and SLUICE_PROGRESS_TOPIC are both 'sluice.progress'"),
        *[
            (name, url, WEB_URL)
            for name in ("JWKS_URL", "NOTIFIER_PUBLIC_URL")
            for url in ("login.example/keys", "http://", "https:///keys", "http://a:99999/", "ws://a", "http://a b/")
        ],
        ("BATCH_BYTES_MAX", str(INT64_MAX + 1), "less than 9223372036854775808"),
        ("FILE_BYTES_MAX", str(INT64_MAX + 1), "less than 9223372036854775808"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(f"SLUICE_{name}", value)

    with pytest.raises(SettingsError, match=said) as refused:
        load()

    assert f"SLUICE_{name}" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka-0.kafka.ns.svc.cluster.local:9092, [::1]:9093,10.0.0.1, "),
        ("LOG_TOPIC", "a" * 249),
        ("JWKS_URL", "https://user:word@login.example:8443/keys?tenant=1"),
        ("NOTIFIER_PUBLIC_URL", "http://[::1]:8081"),
    ],
)
def test_what_can_be_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"SLUICE_{name}", value)

    assert getattr(load(), name.lower()) == value


def test_the_largest_limits_are_those_of_an_event() -> None:
    settings = load(batch_bytes_max=INT64_MAX, file_bytes_max=INT64_MAX)

    assert settings.batch_bytes_max == settings.file_bytes_max == INT64_MAX


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize("name", ["jwt_issuer", "jwt_audience", "jwks_url"])
def test_what_is_blank_is_not_set(monkeypatch: pytest.MonkeyPatch, name: str, blank: str) -> None:
    monkeypatch.setenv(f"SLUICE_{name.upper()}", blank)

    assert getattr(load(), name) is None


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8081"), ("::1", "http://[::1]:8081"), ("here", "http://here:8081")],
)
def test_the_notifiers_address_has_an_ipv6_host_in_brackets(host: str, url: str) -> None:
    assert load(host=host).notifier_url == url
