"""Tokens signed with keys that an identity provider publishes, over real HTTP: rotated, away, wrong, and never mixed
with the secret."""

import asyncio
import base64
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from schemas.errors import Code, RequestError
from services import keys as fetched
from services.auth import Authenticator, make_token
from services.keys import DOCUMENT_BYTES_MAX, KeySet, KeysUnavailable
from services.serving import serving
from services.settings import Settings

SECRET = "a secret for tests that is long enough"
LONG_S = 3_600.0
SOON_S = 30


class Signer:
    """A private key, and what is published of it."""

    def __init__(self, kid: str | None, *, kind: str = "EC", bits: int = 2_048, curve: Any = None) -> None:
        self.kid = kid
        self.algorithm = {"EC": "ES256", "RSA": "RS256"}[kind]
        self._key: Any = (
            ec.generate_private_key(curve or ec.SECP256R1())
            if kind == "EC"
            else rsa.generate_private_key(public_exponent=65_537, key_size=bits)
        )

    def jwk(self, *, private: bool = False, **changes: Any) -> dict[str, Any]:
        algorithms = {"ES256": jwt.algorithms.ECAlgorithm, "RS256": jwt.algorithms.RSAAlgorithm}
        key = self._key if private else self._key.public_key()
        named = {} if self.kid is None else {"kid": self.kid}
        return {**json.loads(algorithms[self.algorithm].to_jwk(key)), **named, **changes}

    def token(self, user: str = "ada", **claims: Any) -> str:
        headers = {} if self.kid is None else {"kid": self.kid}
        return jwt.encode({"sub": user, **claims}, self._key, algorithm=self.algorithm, headers=headers)


@dataclass
class Provider:
    """An identity provider that can be told what to answer."""

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    body: bytes | None = None
    asked: int = 0
    told: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, _request: Request) -> Response:
        self.asked += 1
        self.told.set()
        body = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
        return Response(body, status_code=self.status, media_type="application/json")

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(SOON_S):
            while self.asked < times:
                self.told.clear()
                await self.told.wait()


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    given = Provider()
    app = Starlette(routes=[Route("/keys", given.answer)])
    async with serving(app, host="127.0.0.1", port=0, stop_timeout_s=1) as port:
        given.url = f"http://127.0.0.1:{port}/keys"
        yield given


@contextlib.asynccontextmanager
async def authenticator(
    provider: Provider, *, max_age_s: float = LONG_S, pause_s: float = 0.0, **changes: Any
) -> AsyncIterator[Authenticator]:
    settings = Settings(jwks_url=provider.url, jwt_secret=SECRET, **changes)
    async with KeySet.open(provider.url, max_age_s=max_age_s, pause_s=pause_s, wait_s=0) as keys:
        yield Authenticator(settings, keys)


async def refusal_of(given: Authenticator, token: str) -> RequestError:
    with pytest.raises(RequestError) as refused:
        await given.authenticate(token)
    assert token not in refused.value.detail
    return refused.value


@pytest.mark.parametrize("kind", ["EC", "RSA"])
@pytest.mark.parametrize("kid", ["k1", None])
async def test_a_token_signed_with_a_published_key_counts(provider: Provider, kind: str, kid: str | None) -> None:
    signer = Signer(kid, kind=kind)
    provider.keys = [signer.jwk()]

    async with authenticator(provider) as given:
        principal = await given.authenticate(signer.token(scope="read"))
        stranger = await refusal_of(given, Signer(kid, kind=kind).token())

    assert (principal.user_id, principal.scopes) == ("ada", frozenset({"read"}))
    assert stranger.code is Code.UNAUTHORIZED
    assert "another key" in stranger.detail


async def test_a_token_without_a_key_name_needs_that_there_is_one_key_only(provider: Provider) -> None:
    nameless, other = Signer(None), Signer("k2")
    provider.keys = [nameless.jwk(), other.jwk()]

    async with authenticator(provider) as given:
        refused = await refusal_of(given, nameless.token())

    assert refused.code is Code.UNAUTHORIZED


async def test_the_secret_never_counts_beside_published_keys(provider: Provider) -> None:
    signer = Signer("k1", kind="RSA")
    provider.keys = [signer.jwk(), {"kty": "oct", "kid": "k2", "k": "c2VjcmV0", "alg": "HS256"}]
    forged = signed_by_hand({"alg": "HS256", "kid": "k1"}, {"sub": "ada"}, json.dumps(signer.jwk()).encode())

    async with authenticator(provider) as given:
        refused = [
            await refusal_of(given, make_token("ada", SECRET, ttl_s=60)),
            await refusal_of(given, forged),
            await refusal_of(given, jwt.encode({"sub": "ada"}, SECRET, "HS256", headers={"kid": "k2"})),
            await refusal_of(given, jwt.encode({"sub": "ada"}, None, "none", headers={"kid": "k1"})),
            await refusal_of(given, "no.token.at all"),
        ]

    assert {error.code for error in refused} == {Code.UNAUTHORIZED}
    assert all("ES256 or RS256" in error.detail for error in refused)


async def test_the_algorithm_follows_from_the_key(provider: Provider) -> None:
    rsa_key, ec_key = Signer("k", kind="RSA"), Signer("k")
    provider.keys = [rsa_key.jwk()]

    async with authenticator(provider) as given:
        assert (await given.authenticate(rsa_key.token())).user_id == "ada"
        assert "another key" in (await refusal_of(given, ec_key.token())).detail


async def test_issuer_audience_and_times_are_checked_as_with_a_secret(provider: Provider) -> None:
    signer = Signer("k1")
    provider.keys = [signer.jwk()]

    async with authenticator(provider, jwt_issuer="https://login", jwt_audience="sluice", jwt_leeway_s=0) as given:
        right = await given.authenticate(signer.token(iss="https://login", aud=["sluice"]))
        wrong = [
            await refusal_of(given, signer.token(iss="https://login", aud="other")),
            await refusal_of(given, signer.token(iss="https://other", aud="sluice")),
            await refusal_of(given, signer.token(iss="https://login", aud="sluice", exp=1)),
        ]

    assert right.user_id == "ada"
    assert [next(word for word in ("`aud`", "`iss`", "expired") if word in each.detail) for each in wrong] == [
        "`aud`",
        "`iss`",
        "expired",
    ]


async def test_a_new_key_is_fetched_when_a_token_names_it(provider: Provider) -> None:
    old, new = Signer("old"), Signer("new")
    provider.keys = [old.jwk()]

    async with authenticator(provider) as given:
        assert (await given.authenticate(old.token())).user_id == "ada"
        provider.keys = [new.jwk()]
        rotated = await asyncio.gather(*(given.authenticate(new.token(f"user{n}")) for n in range(20)))
        refused = await refusal_of(given, old.token())

    assert [principal.user_id for principal in rotated] == [f"user{n}" for n in range(20)]
    assert refused.code is Code.UNAUTHORIZED


async def test_unknown_names_do_not_make_it_fetch_again_and_again(provider: Provider) -> None:
    known = Signer("known")
    provider.keys = [known.jwk()]

    async with authenticator(provider, pause_s=LONG_S) as given:
        for number in range(20):
            await refusal_of(given, Signer(f"k{number}").token())
        still = await given.authenticate(known.token())

    assert provider.asked == 1
    assert still.user_id == "ada"


async def test_keys_are_renewed_before_they_are_too_old(provider: Provider) -> None:
    old, new = Signer("old"), Signer("new")
    provider.keys = [old.jwk()]

    async with authenticator(provider, max_age_s=2.0, pause_s=LONG_S) as given:
        provider.keys = [new.jwk()]
        await provider.until_asked(2)
        async with asyncio.timeout(SOON_S):
            while await _refused(given, new.token()):  # noqa: ASYNC110  # the answer is still on its way
                await asyncio.sleep(0.01)


async def test_a_provider_that_is_away_is_survived_until_the_keys_are_too_old(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_s = 0.0
    monkeypatch.setattr(fetched, "time", SimpleNamespace(monotonic=lambda: 1_000.0 + passed_s))
    signer = Signer("k1")
    provider.keys = [signer.jwk()]

    async with authenticator(provider, max_age_s=0.6) as given:
        provider.status = 503
        await provider.until_asked(2)
        meanwhile = await given.authenticate(signer.token())
        passed_s = 0.6
        refused = await refusal_of(given, signer.token())
        says = given.problems()
        provider.status = 200
        again = await given.authenticate(signer.token())

    assert meanwhile.user_id == again.user_id == "ada"
    assert refused.code is Code.KEYS_UNAVAILABLE
    assert says == [refused.detail] == ["the keys that check tokens cannot be fetched"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: {"body": b"not json"},
        lambda: {"body": b"[]"},
        lambda: {"body": b'{"keys": {}}'},
        lambda: {"body": b" " * (DOCUMENT_BYTES_MAX + 1)},
        lambda: {"status": 404},
        lambda: {"status": 302},
        lambda: {"keys": []},
        lambda: {"keys": ["k", {"kty": "EC"}, {"kty": "RSA", "n": "!", "e": 1}, {"kty": ["RSA"]}]},
        lambda: {"keys": [Signer("k", kind="RSA", bits=1_024).jwk()]},
        lambda: {"keys": [Signer("k", curve=ec.SECP384R1()).jwk()]},
        lambda: {"keys": [Signer("k").jwk(private=True)]},
        lambda: {"keys": [Signer("k").jwk(use="enc"), Signer("k").jwk(alg="ES512"), Signer("k").jwk(key_ops=["sign"])]},
    ],
)
async def test_a_provider_without_a_usable_key_stops_the_start(
    provider: Provider, spoil: Callable[[], dict[str, Any]]
) -> None:
    for name, value in spoil().items():
        setattr(provider, name, value)

    with pytest.raises(KeysUnavailable, match="cannot be had from http"):
        async with authenticator(provider):
            pytest.fail("it must not open")


async def test_an_address_is_shown_without_what_is_secret_in_it() -> None:
    with pytest.raises(KeysUnavailable) as refused:
        async with KeySet.open("http://me:pass@127.0.0.1:1/keys?token=abc", max_age_s=60, wait_s=0):
            pytest.fail("nobody listens there")

    assert "http://127.0.0.1:1/keys" in str(refused.value)
    assert not {"me:", "pass", "abc"} & set(str(refused.value).split())
    assert "pass" not in str(refused.value)


def signed_by_hand(header: dict[str, str], claims: dict[str, str], secret: bytes) -> str:
    """An HS256 token under any key: the library refuses to use a public key as a secret."""
    signed = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims))
    signature = base64.urlsafe_b64encode(hmac.digest(secret, signed, "sha256")).rstrip(b"=")
    return (signed + b"." + signature).decode()


async def _refused(given: Authenticator, token: str) -> bool:
    try:
        await given.authenticate(token)
    except RequestError:
        return True
    return False
