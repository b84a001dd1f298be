"""Who is asking: the check of tokens that api and notifier share.

A token is a JWT whose `sub` is the user. Today it is signed with HS256 and `SLUICE_JWT_SECRET`; which key and which
algorithms check a token is decided in `_key` alone, never by the token itself (RFC 8725, section 3.1), so that public
keys can come beside it. No token ever stands in an error or a log line.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jwt
from pydantic import TypeAdapter, ValidationError

from schemas.errors import Code, RequestError
from schemas.events import UserId
from services.settings import Settings

_ALGORITHM = "HS256"
_TOKEN_CHARACTERS_MAX = 8_192
_USER_ID: TypeAdapter[str] = TypeAdapter(UserId)


@dataclass(frozen=True, slots=True)
class Principal:
    """The user a token speaks for. `expires_at_s`: seconds since 1970 UTC; None for a token that never expires."""

    user_id: str
    scopes: frozenset[str]
    expires_at_s: float | None


def bearer(authorization: str | None) -> str:
    """The token of an `Authorization` header (RFC 6750, section 2.1); raises RequestError(UNAUTHORIZED)."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise RequestError(Code.UNAUTHORIZED, "send a token in the header `Authorization: Bearer …`")
    return token.strip()


def authenticate(token: str, settings: Settings) -> Principal:
    """The user a valid token speaks for; raises RequestError(UNAUTHORIZED), which says what is wrong with it."""
    claims = _claims(token, settings)
    try:
        user_id = _USER_ID.validate_python(claims.get("sub"), strict=True)
    except ValidationError:
        raise RequestError(
            Code.UNAUTHORIZED, "the token's `sub`, which is the user, must be text of 1 to 255 characters without NUL"
        ) from None
    expires_at = claims.get("exp")
    return Principal(user_id, _scopes(claims), None if expires_at is None else float(expires_at))


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
    return jwt.encode(claims, secret, algorithm=_ALGORITHM)


def _claims(token: str, settings: Settings) -> dict[str, Any]:
    if len(token) > _TOKEN_CHARACTERS_MAX:
        raise RequestError(Code.UNAUTHORIZED, f"the token is longer than {_TOKEN_CHARACTERS_MAX} characters")
    key, algorithms = _key(settings)
    try:
        return jwt.decode(
            token,
            key,
            algorithms=algorithms,
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
        raise RequestError(Code.UNAUTHORIZED, f"the token is no JWT signed with {_ALGORITHM}") from None


def _key(settings: Settings) -> tuple[str, list[str]]:
    """What checks a token, and the algorithms it may be signed with."""
    assert settings.jwt_secret is not None, "services that check tokens do not start without a key"
    return settings.jwt_secret.get_secret_value(), [_ALGORITHM]


def _scopes(claims: dict[str, Any]) -> frozenset[str]:
    """The scopes of a token (RFC 8693, section 4.2: one text, separated by spaces)."""
    scope = claims.get("scope")
    return frozenset(scope.split()) if isinstance(scope, str) else frozenset()
