"""Tokens: who they speak for, and what is said of those that speak for nobody."""

import time
from typing import Any

import jwt
import pytest

from schemas.errors import Code, RequestError
from services.auth import Principal, authenticate, bearer, make_token
from services.settings import Settings

SECRET = "a secret for tests that is long enough"
OTHER_SECRET = "another secret for tests, long enough"


def settings(**changes: Any) -> Settings:
    return Settings(**{"jwt_secret": SECRET, **changes})


def signed(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    return jwt.encode(claims, secret, algorithm=algorithm)


def refusal_of(token: str, given: Settings | None = None) -> str:
    with pytest.raises(RequestError) as refused:
        authenticate(token, given or settings())
    assert refused.value.code is Code.UNAUTHORIZED
    assert token not in refused.value.detail
    return refused.value.detail


def test_a_token_speaks_for_its_user() -> None:
    token = make_token("ada", SECRET, ttl_s=60, scopes=["read", "write"])

    principal = authenticate(token, settings())

    assert (principal.user_id, principal.scopes) == ("ada", frozenset({"read", "write"}))
    assert principal.expires_at_s is not None
    assert 50 < principal.expires_at_s - time.time() <= 60


def test_a_token_without_an_end_is_good_for_ever() -> None:
    assert authenticate(make_token("ada", SECRET, ttl_s=None), settings()) == Principal("ada", frozenset(), None)


def test_a_token_that_ended_within_the_leeway_still_counts() -> None:
    token = signed(sub="ada", exp=int(time.time()) - 5)

    assert authenticate(token, settings(jwt_leeway_s=30)).user_id == "ada"
    assert "expired" in refusal_of(token, settings(jwt_leeway_s=0))


def test_a_token_of_another_key_or_algorithm_counts_for_nothing() -> None:
    assert "another key" in refusal_of(signed(OTHER_SECRET, sub="ada"))
    assert "HS256" in refusal_of(signed(SECRET * 2, "HS384", sub="ada"), settings(jwt_secret=SECRET * 2))
    assert "HS256" in refusal_of(jwt.encode({"sub": "ada"}, None, algorithm="none"))


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "é.é.é", "x" * 10_000, "..", "\ud800"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(RequestError) as refused:
        authenticate(token, settings())

    assert refused.value.code is Code.UNAUTHORIZED


@pytest.mark.parametrize("sub", ["", "x" * 256, "nul \0", 7, None, ["ada"]])
def test_a_user_must_be_text_that_can_be_stored(sub: Any) -> None:
    refusal_of(signed(sub=sub))


def test_a_token_without_a_user_is_refused() -> None:
    assert "`sub`" in refusal_of(signed(name="ada"))


@pytest.mark.parametrize(
    "claims", [{"exp": "soon"}, {"exp": float("inf")}, {"exp": [1]}, {"nbf": "later"}, {"nbf": 2**40}]
)
def test_times_that_make_no_sense_are_refused(claims: dict[str, Any]) -> None:
    refusal_of(signed(sub="ada", **claims))


def test_issuer_and_audience_are_checked_where_they_are_set() -> None:
    strict = settings(jwt_issuer="https://login", jwt_audience="sluice")
    right = make_token("ada", SECRET, ttl_s=60, issuer="https://login", audience="sluice")

    assert authenticate(right, strict).user_id == "ada"
    assert authenticate(right, settings()).user_id == "ada"
    assert "`iss`" in refusal_of(make_token("ada", SECRET, ttl_s=60, audience="sluice"), strict)
    assert "`iss`" in refusal_of(make_token("ada", SECRET, ttl_s=60, issuer="other", audience="sluice"), strict)
    assert "aud" in refusal_of(make_token("ada", SECRET, ttl_s=60, issuer="https://login"), strict)
    assert "aud" in refusal_of(make_token("ada", SECRET, ttl_s=60, issuer="https://login", audience="other"), strict)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "token"])
def test_a_header_without_a_token_is_refused(header: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        bearer(header)

    assert refused.value.code is Code.UNAUTHORIZED


@pytest.mark.parametrize("header", ["Bearer abc", "bearer abc", "  BEARER   abc "])
def test_the_scheme_is_read_in_any_case(header: str) -> None:
    assert bearer(header) == "abc"
