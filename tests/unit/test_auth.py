"""Tokens: who they speak for, what they allow, and what is said of those that speak for nobody."""

import time
from typing import Any

import jwt
import pytest

from schemas.errors import Code, RequestError
from services.auth import Authenticator, Principal, Scope, bearer, make_token
from services.settings import Settings, SettingsError, load

SECRET = "a secret for tests that is long enough"
OTHER_SECRET = "another secret for tests, long enough"
BOTH = frozenset({"read", "write"})


def settings(**changes: Any) -> Settings:
    return Settings(**{"jwt_secret": SECRET, **changes})


def signed(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    return jwt.encode(claims, secret, algorithm=algorithm)


async def authenticate(token: str, given: Settings | None = None, scope: Scope | None = None) -> Principal:
    return await Authenticator(given or settings()).authenticate(token, scope=scope)


async def refusal_of(token: str, given: Settings | None = None) -> str:
    with pytest.raises(RequestError) as refused:
        await authenticate(token, given)
    assert refused.value.code is Code.UNAUTHORIZED
    assert token not in refused.value.detail
    return refused.value.detail


async def test_a_token_speaks_for_its_user() -> None:
    token = make_token("ada", SECRET, ttl_s=60, scopes=["read", "write"])

    principal = await authenticate(token)

    assert (principal.user_id, principal.scopes) == ("ada", BOTH)
    assert principal.expires_at_s is not None
    leeway_s = Settings().jwt_leeway_s
    assert 50 < principal.expires_at_s - leeway_s - time.time() <= 60


async def test_a_token_without_an_end_is_good_for_ever() -> None:
    assert await authenticate(make_token("ada", SECRET, ttl_s=None)) == Principal("ada", BOTH, None)


@pytest.mark.parametrize(
    ("claims", "allowed"),
    [
        ({}, {"read", "write"}),
        ({"scope": "read"}, {"read"}),
        ({"scope": "openid write"}, {"write"}),
        ({"scope": "read  write"}, {"read", "write"}),
        ({"scopes": ["write"]}, {"write"}),
        ({"scope": "read", "scopes": ["write"]}, {"read", "write"}),
        ({"scope": ""}, set()),
        ({"scopes": []}, set()),
        ({"scope": "openid"}, set()),
        ({"scope": "reader READ"}, set()),
    ],
)
async def test_a_token_allows_what_its_scopes_name(claims: dict[str, Any], allowed: set[str]) -> None:
    token = signed(sub="ada", **claims)

    for scope in ("read", "write"):
        if scope in allowed:
            assert (await authenticate(token, scope=scope)).user_id == "ada"
        else:
            with pytest.raises(RequestError, match=f"`{scope}`") as refused:
                await authenticate(token, scope=scope)
            assert refused.value.code is Code.FORBIDDEN_SCOPE


@pytest.mark.parametrize("claims", [{"scope": 1}, {"scope": ["read"]}, {"scope": None}, {"scopes": "read write"}])
async def test_scopes_that_make_no_sense_are_refused(claims: dict[str, Any]) -> None:
    assert "`scope`" in await refusal_of(signed(sub="ada", **claims))


async def test_a_token_that_ended_within_the_leeway_still_counts() -> None:
    token = signed(sub="ada", exp=int(time.time()) - 5)

    assert (await authenticate(token, settings(jwt_leeway_s=30))).user_id == "ada"
    assert "expired" in await refusal_of(token, settings(jwt_leeway_s=0))


async def test_a_token_of_another_key_or_algorithm_counts_for_nothing() -> None:
    long_secret = settings(jwt_secret=SECRET * 2)

    assert "another key" in await refusal_of(signed(OTHER_SECRET, sub="ada"))
    assert "HS256" in await refusal_of(signed(SECRET * 2, "HS384", sub="ada"), long_secret)
    assert "HS256" in await refusal_of(jwt.encode({"sub": "ada"}, None, algorithm="none"))


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "é.é.é", "x" * 10_000, "..", "\ud800"])
async def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(RequestError) as refused:
        await authenticate(token)

    assert refused.value.code is Code.UNAUTHORIZED


@pytest.mark.parametrize("sub", ["", "x" * 256, "nul \0", 7, None, ["ada"]])
async def test_a_user_must_be_text_that_can_be_stored(sub: Any) -> None:
    await refusal_of(signed(sub=sub))


async def test_a_token_without_a_user_is_refused() -> None:
    assert "`sub`" in await refusal_of(signed(name="ada"))


@pytest.mark.parametrize(
    "claims", [{"exp": "soon"}, {"exp": float("inf")}, {"exp": 10**400}, {"exp": [1]}, {"nbf": "later"}, {"nbf": 2**40}]
)
async def test_times_that_make_no_sense_are_refused(claims: dict[str, Any]) -> None:
    await refusal_of(signed(sub="ada", **claims))


async def test_issuer_and_audience_are_checked_where_they_are_set() -> None:
    strict = settings(jwt_issuer="https://login", jwt_audience="sluice")
    right = make_token("ada", SECRET, ttl_s=60, issuer="https://login", audience="sluice")

    assert (await authenticate(right, strict)).user_id == "ada"
    assert (await authenticate(right)).user_id == "ada"
    for wrong, says in (
        ({"audience": "sluice"}, "`iss`"),
        ({"issuer": "other", "audience": "sluice"}, "`iss`"),
        ({"issuer": "https://login"}, "aud"),
        ({"issuer": "https://login", "audience": "other"}, "aud"),
    ):
        assert says in await refusal_of(make_token("ada", SECRET, ttl_s=60, **wrong), strict)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "token"])
def test_a_header_without_a_token_is_refused(header: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        bearer(header)

    assert refused.value.code is Code.UNAUTHORIZED


@pytest.mark.parametrize("header", ["Bearer abc", "bearer abc", "  BEARER   abc "])
def test_the_scheme_is_read_in_any_case(header: str) -> None:
    assert bearer(header) == "abc"


def test_a_service_that_checks_tokens_needs_the_secret_or_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_JWT_SECRET", raising=False)
    needs = ("jwt_secret|jwks_url",)

    with pytest.raises(SettingsError, match="SLUICE_JWT_SECRET or SLUICE_JWKS_URL is not set"):
        load(needs=needs)
    with pytest.raises(SettingsError, match="SLUICE_JWKS_URL"):
        load(needs=needs, jwks_url="login.example/keys")

    assert load(needs=needs, jwt_secret=SECRET).jwks_url is None
    assert load(needs=needs, jwks_url="https://login.example/keys").jwt_secret is None
