"""Which Sluice a client command talks to, and as whom.

`SLUICE_API_URL` and `SLUICE_TOKEN` say so. Where they are not set, the endpoints.json of a running `sluice up` does,
and a token is made with the secret kept beside it; such a token never goes to an address that is not named there.
"""

import json
import os
import secrets
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from services import auth, settings
from services.cli.errors import WrongUse

DEFAULT_DATA_DIR = Path(".sluice")
DEFAULT_USER = "me"
TOKEN_TTL_S = 12 * 3600.0
TOKEN_TTL_S_MAX = 100 * 365 * 24 * 3600.0


class ClientSettings(BaseSettings):
    """What the client commands read from the environment, beside SLUICE_JWT_SECRET."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_", extra="ignore", frozen=True)

    api_url: str = ""
    token: SecretStr = SecretStr("")


@dataclass(frozen=True, slots=True)
class Connection:
    """`api`: the api's address, without a slash at its end."""

    api: str
    token: str

    @property
    def is_local(self) -> bool:
        return is_loopback(self.api)


def find(*, data_dir: Path) -> Connection:
    """The Sluice to talk to. Raises WrongUse where neither the environment nor `data_dir` names one."""
    wanted = ClientSettings()
    endpoints = read_endpoints(data_dir)
    api = (wanted.api_url or endpoints.get("api", "")).rstrip("/")
    if not api:
        raise WrongUse(
            f"Which Sluice? SLUICE_API_URL is not set and nothing runs in {data_dir}. Start one here with `sluice up`, "
            f"name its folder with --data-dir, or set SLUICE_API_URL."
        )
    if not settings.is_web_url(api):
        raise WrongUse(f"SLUICE_API_URL={api!r} is not an address such as http://127.0.0.1:8080.")
    token = wanted.token.get_secret_value().strip()
    if not token.isascii() or not token.isprintable():
        raise WrongUse("SLUICE_TOKEN holds characters that no token has; was it copied whole, and nothing else?")
    if not token and api == endpoints.get("api"):
        token = make_token(user=DEFAULT_USER, data_dir=data_dir)
    if not token:
        raise WrongUse(
            f"SLUICE_TOKEN is not set, and {api} is not a Sluice of this folder: set it to a token of that one."
        )
    return Connection(api=api, token=token)


def make_token(*, user: str, data_dir: Path, ttl_s: float = TOKEN_TTL_S, scopes: tuple[str, ...] = ()) -> str:
    """A token signed with SLUICE_JWT_SECRET, else with the secret that `sluice up` keeps in `data_dir`.

    Raises WrongUse, for a scope that means nothing too: such a token would be refused wherever it is shown.
    """
    if unknown := [scope for scope in scopes if scope not in auth.SCOPES]:
        there = " and ".join(sorted(auth.SCOPES))
        raise WrongUse(
            f"--scope {unknown[0]!r:.80} means nothing here: there are {there}; without any it carries both."
        )
    configured = settings.load()
    if configured.jwt_secret is not None:
        secret = configured.jwt_secret.get_secret_value()
    elif (kept := secret_file(data_dir)).is_file():
        secret = kept.read_text(encoding="ascii").strip()
    else:
        raise WrongUse(
            f"There is no secret to sign a token with: SLUICE_JWT_SECRET is not set and {secret_file(data_dir)} does "
            f"not exist. Start `sluice up` once, name its folder with --data-dir, or set SLUICE_JWT_SECRET."
        )
    return auth.make_token(
        user,
        secret,
        ttl_s=ttl_s,
        scopes=scopes,
        issuer=configured.jwt_issuer,
        audience=configured.jwt_audience,
    )


def secret_file(data_dir: Path) -> Path:
    return data_dir / "jwt-secret"


def keep_secret(data_dir: Path) -> str:
    """The secret of this folder, made at the first call; only its owner can read the file."""
    file = secret_file(data_dir)
    if not file.exists():
        _write_whole(file, secrets.token_urlsafe(48) + "\n")
    secret = file.read_text(encoding="utf-8").strip()
    if len(secret.encode()) < settings.JWT_SECRET_BYTES_MIN:
        least = settings.JWT_SECRET_BYTES_MIN
        raise WrongUse(f"{file} holds less than the {least} bytes of a secret. Remove it, and a new one is made.")
    return secret


def endpoints_file(data_dir: Path) -> Path:
    return data_dir / "endpoints.json"


def read_endpoints(data_dir: Path) -> dict[str, Any]:
    """What a running `up` wrote into its folder; empty where none runs, whatever one that was killed left there."""
    try:
        found = json.loads(endpoints_file(data_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and _runs(found.get("pid")) else {}


def _runs(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)  # asks whether there is such a process, and does nothing to it
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def write_endpoints(data_dir: Path, endpoints: dict[str, Any]) -> None:
    """Appears whole or not at all; for its owner alone, since the database's address may hold a password."""
    _write_whole(endpoints_file(data_dir), json.dumps(endpoints, indent=2) + "\n")


def _write_whole(file: Path, text: str) -> None:
    """For its owner alone; there is never half of it."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as fresh:
        fresh.write(text)
    partial.replace(file)


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, which no proxy can reach for us."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
