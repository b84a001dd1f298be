"""The public keys that tokens are checked with: fetched from an identity provider (JWKS, RFC 7517) and kept.

They are fetched again in the background well before they are too old, and at once when a token names one that is not
known, though not more often than every `pause_s`. What cannot be fetched leaves the known ones in force until they are
older than `max_age_s`; from then on no token can be checked, and `problems` says so. Which algorithm a key is for
follows from the key, never from a token (RFC 8725, section 3.1).
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import jwt

from schemas.errors import PartError
from services.observability import logger

_log = logger("keys")

ALGORITHM_OF = {"RSA": "RS256", "EC": "ES256"}
FETCH_TIMEOUT_S = 5.0
DOCUMENT_BYTES_MAX = 1024 * 1024
REFRESH_PAUSE_S = 10.0
REFRESHES_PER_AGE = 4
START_WAIT_S = 30.0
START_RETRY_S = 0.5
_RSA_BITS_MIN = 2_048
_AWAY = "the keys that check tokens cannot be fetched"


class KeysUnavailable(PartError):  # noqa: N818  # named for what it says
    """There are no keys to check tokens with; the message says why."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """`kid`: its name, where it has one; `key`: as the cryptography package has it."""

    kid: str | None
    algorithm: str
    key: Any


class KeySet:
    """The keys of one address; see the module's text. Open it with `KeySet.open`."""

    def __init__(self, url: str, *, max_age_s: float, pause_s: float = REFRESH_PAUSE_S) -> None:
        self._url = url
        self._shown_url = _without_secrets(url)
        self._max_age_s = max_age_s
        self._pause_s = pause_s
        self._keys: tuple[PublicKey, ...] = ()
        self._fetched_at_s: float | None = None
        self._tried_at_s = float("-inf")
        self._failure: str | None = None
        self._fetching = asyncio.Lock()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, url: str, *, max_age_s: float, pause_s: float = REFRESH_PAUSE_S, wait_s: float = START_WAIT_S
    ) -> AsyncIterator[Self]:
        """The keys, kept fresh until the block is left; raises KeysUnavailable where none come within `wait_s`."""
        keys = cls(url, max_age_s=max_age_s, pause_s=pause_s)
        await keys._first(wait_s)
        keeping = asyncio.create_task(keys._keep_fresh(), name="keep_keys_fresh")
        try:
            yield keys
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def find(self, kid: str | None, algorithm: str) -> Any:
        """The key of this name for this algorithm; without a name, the only one there is. None: there is no such key.

        Raises KeysUnavailable where there are no keys that count.
        """
        found = self._known(kid, algorithm)
        if found is None:
            await self._fetch(pause_s=self._pause_s)
            found = self._known(kid, algorithm)
        if found is None and not self._fresh():
            raise self._unavailable()
        return None if found is None else found.key

    def problems(self) -> list[str]:
        """Why no token can be checked just now; empty when they can."""
        if self._fresh():
            return []
        return [_AWAY]

    def _unavailable(self) -> KeysUnavailable:
        why = self._failure or "not fetched yet"
        return KeysUnavailable(f"the keys that check tokens cannot be had from {self._shown_url}: {why}", told=_AWAY)

    def _known(self, kid: str | None, algorithm: str) -> PublicKey | None:
        if not self._fresh():
            return None
        usable = [key for key in self._keys if key.algorithm == algorithm and kid in (None, key.kid)]
        return usable[0] if len(usable) == 1 or (usable and kid is not None) else None

    def _fresh(self) -> bool:
        return self._fetched_at_s is not None and time.monotonic() - self._fetched_at_s < self._max_age_s

    async def _first(self, wait_s: float) -> None:
        began_s = time.monotonic()
        while not await self._fetch(pause_s=0):
            if time.monotonic() - began_s > wait_s:
                raise self._unavailable()
            await asyncio.sleep(START_RETRY_S)

    async def _keep_fresh(self) -> None:
        while True:
            known_for_s = time.monotonic() - (self._fetched_at_s or 0.0)
            due_in_s = self._max_age_s / REFRESHES_PER_AGE - known_for_s
            await asyncio.sleep(max(due_in_s, min(self._pause_s, self._max_age_s / REFRESHES_PER_AGE)))
            await self._fetch(pause_s=0)

    async def _fetch(self, *, pause_s: float) -> bool:
        """Fetch the keys, unless somebody tried less than `pause_s` ago; whether there are keys that count."""
        async with self._fetching:
            if time.monotonic() - self._tried_at_s >= pause_s:
                self._tried_at_s = time.monotonic()
                try:
                    self._keys = _read(await _get(self._url))
                    self._fetched_at_s = time.monotonic()
                    self._say(None)
                except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
                    self._say(_reason(error))
            return self._fresh()

    def _say(self, failure: str | None) -> None:
        if failure and not self._failure:
            _log.warning("keys_not_fetched", url=self._shown_url, reason=failure)
        elif self._failure and not failure:
            _log.info("keys_fetched_again", url=self._shown_url, keys=len(self._keys))
        self._failure = failure


async def _get(url: str) -> bytes:
    """The document; raises what httpx raises, TimeoutError, ValueError for one that is too large."""
    body = b""
    async with (
        asyncio.timeout(FETCH_TIMEOUT_S),
        httpx.AsyncClient(timeout=FETCH_TIMEOUT_S) as client,
        client.stream("GET", url, headers={"Accept": "application/json"}) as answer,
    ):
        if answer.status_code != httpx.codes.OK:
            raise ValueError(f"the answer is {answer.status_code}")
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > DOCUMENT_BYTES_MAX:
                raise ValueError(f"the answer is larger than {DOCUMENT_BYTES_MAX} bytes")
    return body


def _read(document: bytes) -> tuple[PublicKey, ...]:
    """The keys that tokens may be signed with; the rest is passed over. Raises ValueError where there are none."""
    found = json.loads(document)
    members = found.get("keys") if isinstance(found, dict) else None
    keys = tuple(key for member in members or () if isinstance(member, dict) and (key := _key(member)) is not None)
    if not keys:
        raise ValueError("there is no RSA or P-256 signing key in it")
    return keys


def _key(member: Mapping[str, Any]) -> PublicKey | None:
    algorithm = ALGORITHM_OF.get(str(member.get("kty")))
    operations = member.get("key_ops")
    if (
        algorithm is None
        or "d" in member  # a private key: nothing signed with it can be trusted any more
        or member.get("alg") not in (None, algorithm)
        or member.get("use") not in (None, "sig")
        or (isinstance(operations, list) and "verify" not in operations)
    ):
        return None
    try:
        key = jwt.PyJWK(dict(member), algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if algorithm == "RS256" and key.key_size < _RSA_BITS_MIN:
        return None
    if algorithm == "ES256" and key.curve.name != "secp256r1":
        return None
    kid = member.get("kid")
    return PublicKey(kid if isinstance(kid, str) else None, algorithm, key)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no answer within {FETCH_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__


def _without_secrets(url: str) -> str:
    """The address as it may be shown: without a user's name, password or query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
