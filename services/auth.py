"""Who is asking: the check of tokens that api and notifier share.

A token is a JWT whose `sub` is the user. It is signed either with HS256 and `SLUICE_JWT_SECRET`, or, where
`SLUICE_JWKS_URL` is set, with RS256 or ES256 and a key found there; never both, and which algorithm counts is decided
by the key alone, never by the token (RFC 8725, section 3.1). Its scopes are `read` and `write`; a token that names none
has both. No token ever stands in an error or a log line.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import jwt
from pydantic import TypeAdapter, ValidationError

from schemas.errors import Code, RequestError
from schemas.events import UserId
from services.keys import ALGORITHM_OF, KeySet, KeysUnavailable
from services.settings import Settings

Scope = Literal["read", "write"]
SCOPES: frozenset[str] = frozenset({"read", "write"})
_SECRET_ALGORITHM = "HS256"  # noqa: S105  # the name of an algorithm
_TOKEN_CHARACTERS_MAX = 8_192
_USER_ID: TypeAdapter[str] = TypeAdapter(UserId)


@dataclass(frozen=True, slots=True)
class Principal:
    """The user a token speaks for. `expires_at_s`: until when it is taken, the leeway included, in seconds since 1970
    UTC; None for a token that never expires."""

    user_id: str
    scopes: frozenset[str]
    expires_at_s: float | None

    def check(self, scope: Scope) -> None:
        """Raises RequestError(FORBIDDEN_SCOPE) where the token does not allow this."""
        if scope not in self.scopes:
            raise RequestError(Code.FORBIDDEN_SCOPE, f"this needs a token with the scope `{scope}`, which yours lacks")


class Authenticator:
    """Says whom a token speaks for; opened once by each service that is asked by people."""

    def __init__(self, settings: Settings, keys: KeySet | None = None) -> None:
        self._settings = settings
        self._keys = keys

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Self]:
        """With the key of the settings, or with keys that are fetched; raises KeysUnavailable where none come."""
        if settings.jwks_url is None:
            yield cls(settings)
            return
        async with KeySet.open(settings.jwks_url, max_age_s=settings.jwks_max_age_s) as keys:
            yield cls(settings, keys)

    async def authenticate(self, token: str, *, scope: Scope | None = None) -> Principal:
        """The user a valid token speaks for, which allows this. Raises RequestError: UNAUTHORIZED, which says what is
        wrong with it, FORBIDDEN_SCOPE, or KEYS_UNAVAILABLE where that cannot be told just now."""
        if len(token) > _TOKEN_CHARACTERS_MAX:
            raise RequestError(Code.UNAUTHORIZED, f"the token is longer than {_TOKEN_CHARACTERS_MAX} characters")
        if self._keys is None:
            assert self._settings.jwt_secret is not None, "services that check tokens do not start without a key"
            claims = _claims(token, self._settings.jwt_secret.get_secret_value(), _SECRET_ALGORITHM, self._settings)
        else:
            algorithm, key = await self._key_of(token, self._keys)
            claims = _claims(token, key, algorithm, self._settings)
        principal = _principal(claims, leeway_s=self._settings.jwt_leeway_s)
        if scope is not None:
            principal.check(scope)
        return principal

    def problems(self) -> list[str]:
        """Why no token can be checked just now; empty when they can."""
        return [] if self._keys is None else self._keys.problems()

    async def _key_of(self, token: str, keys: KeySet) -> tuple[str, Any]:
        """The algorithm and the key for this token: it may only name one of those there are."""
        algorithms = sorted(ALGORITHM_OF.values())
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError):
            header = {}
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in algorithms:
            raise _no_jwt(" or ".join(algorithms))
        try:
            key = await keys.find(kid if isinstance(kid, str) else None, algorithm)
        except KeysUnavailable as error:
            raise RequestError(Code.KEYS_UNAVAILABLE, error.told) from None
        if key is None:
            raise RequestError(Code.UNAUTHORIZED, "the token is signed with another key than those this service trusts")
        return algorithm, key


def bearer(authorization: str | None) -> str:
    """The token of an `Authorization` header (RFC 6750, section 2.1); raises RequestError(UNAUTHORIZED)."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise RequestError(Code.UNAUTHORIZED, "send a token in the header `Authorization: Bearer …`")
    return token.strip()


def make_token(
    user: str,
    secret: str,
    *,
    ttl_s: float | None,
    scopes: Iterable[str] = (),
    issuer: str | None = None,
    audience: str | None = None,
) -> str:
    """A token for a user, signed with the secret; `ttl_s`: how many seconds it is good for, None for ever."""
    now_s = int(time.time())
    claims: dict[str, Any] = {"sub": _USER_ID.validate_python(user), "iat": now_s}
    if ttl_s is not None:
        claims["exp"] = now_s + int(ttl_s)
    if scope := " ".join(scopes):
        claims["scope"] = scope
    if issuer is not None:
        claims["iss"] = issuer
    if audience is not None:
        claims["aud"] = audience
    return jwt.encode(claims, secret, algorithm=_SECRET_ALGORITHM)


def _claims(token: str, key: Any, algorithm: str, settings: Settings) -> dict[str, Any]:
    try:
        return jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            leeway=settings.jwt_leeway_s,
            options={"verify_aud": settings.jwt_audience is not None},
        )
    except jwt.ExpiredSignatureError:
        raise RequestError(Code.UNAUTHORIZED, "the token has expired; get a new one") from None
    except jwt.ImmatureSignatureError:
        raise RequestError(Code.UNAUTHORIZED, "the token is not valid yet; do the clocks agree?") from None
    except jwt.InvalidSignatureError:
        raise RequestError(Code.UNAUTHORIZED, "the token is signed with another key than this service's") from None
    except jwt.MissingRequiredClaimError as error:
        raise RequestError(Code.UNAUTHORIZED, f"the token lacks the claim `{error.claim}`") from None
    except jwt.InvalidIssuerError:
        raise RequestError(Code.UNAUTHORIZED, "the token's `iss` is not the one this service trusts") from None
    except jwt.InvalidAudienceError:
        raise RequestError(Code.UNAUTHORIZED, "the token's `aud` does not name this service") from None
    except (jwt.PyJWTError, ValueError, OverflowError):
        raise _no_jwt(algorithm) from None


def _no_jwt(algorithms: str) -> RequestError:
    return RequestError(Code.UNAUTHORIZED, f"the token is no JWT signed with {algorithms}")


def _principal(claims: dict[str, Any], *, leeway_s: float) -> Principal:
    try:
        user_id = _USER_ID.validate_python(claims.get("sub"), strict=True)
    except ValidationError:
        raise RequestError(
            Code.UNAUTHORIZED, "the token's `sub`, which is the user, must be text of 1 to 255 characters without NUL"
        ) from None
    end_s = _end(claims.get("exp"))
    return Principal(user_id, _scopes(claims), None if end_s is None else end_s + leeway_s)


def _end(exp: Any) -> float | None:
    """When a token ends, in seconds since 1970; its `exp` was found to be a number that has not passed."""
    try:
        return None if exp is None else float(exp)
    except OverflowError:
        raise RequestError(Code.UNAUTHORIZED, "the token's `exp` is too large to be a time") from None


def _scopes(claims: dict[str, Any]) -> frozenset[str]:
    """The scopes of a token: `scope` is text separated by spaces (RFC 8693, section 4.2), `scopes` a list of texts."""
    if "scope" not in claims and "scopes" not in claims:
        return SCOPES
    scope, scopes = claims.get("scope", ""), claims.get("scopes", [])
    if not isinstance(scope, str) or not isinstance(scopes, list) or not all(isinstance(each, str) for each in scopes):
        raise RequestError(
            Code.UNAUTHORIZED, "the token's `scope` must be text separated by spaces, its `scopes` a list of texts"
        )
    return frozenset([*scope.split(), *scopes])
