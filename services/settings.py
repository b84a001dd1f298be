"""Every setting, its default and its check: environment variables `SLUICE_*`, read once at start.

A wrong or missing one stops the start with one line each (`SettingsError`); nothing reads the environment elsewhere.
Units stand last in the names. docs/operations.md explains when to change which.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services import faults

_MIB = 1024 * 1024
JWT_SECRET_BYTES_MIN = 32
_BUCKET_URL = re.compile(
    r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/((?!\.{1,2}(?:/|$))[\w.!*'()-]+(?:/(?!\.{1,2}(?:/|$))[\w.!*'()-]+)*)?/?)?",
    re.ASCII,
)
_ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/[\w./-]*)?", re.ASCII)
_HOST = r"(?:[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9A-Fa-f:.]+\])"
_KAFKA_ADDRESS = re.compile(rf"{_HOST}(?::(\d{{1,5}}))?", re.ASCII)
_WEB_URL = re.compile(
    r"(?i:https?)://(?:[^\s/?#@]*@)?(?:[^\s/?#@:\[\]]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?(?:[/?#]\S*)?"
)
_TOPIC = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}", re.ASCII)
_PORT_MAX = 65_535
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s@,]+", re.ASCII)

Port = Annotated[int, Field(ge=0, le=_PORT_MAX)]
Bytes = Annotated[int, Field(ge=1, lt=2**63)]
"""As many as an event can say (schemas.events)."""
BlankIsUnset = BeforeValidator(lambda given: None if isinstance(given, str) and not given.strip() else given)
Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]


class SettingsError(Exception):
    """Settings that cannot be started with; the message has one line for each."""


class BlobBucket(NamedTuple):
    """An S3 bucket, and what every name in it begins with."""

    name: str
    prefix: str


class Settings(BaseSettings):
    """The settings of all services; each uses what it needs."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_", frozen=True, extra="ignore")

    kafka_bootstrap_servers: str = Field(default="127.0.0.1:9092", description="Kafka's addresses, host:port,…")
    database_url: SecretStr = Field(
        default=SecretStr("postgresql://sluice@127.0.0.1:5432/sluice"), description="where Postgres is"
    )
    blob_url: str = Field(
        default="", description="where files are kept: file:///an/absolute/folder or s3://bucket/prefix"
    )

    log_topic: str = Field(default="sluice.events", description="the topic of facts")
    progress_topic: str = Field(default="sluice.progress", description="the topic of percentages")
    partitions: Annotated[int, Field(ge=1, le=256)] = Field(default=1, description="lanes; they are never taken away")
    partition: Annotated[int, Field(ge=0, le=255)] = Field(default=0, description="the lane this processor works")
    replication_factor: Annotated[int, Field(ge=1, le=15)] = Field(default=1, description="of topics made at start")
    fsync: bool = Field(default=False, description="survive the loss of power, not only of processes (slower)")

    jwt_secret: SecretStr | None = Field(default=None, description="the HS256 key of tokens, 32 bytes or more")
    jwks_url: Annotated[str | None, BlankIsUnset] = Field(
        default=None,
        description="where RS256 and ES256 keys of tokens are (JWKS); the secret is not used then",
    )
    jwks_max_age_s: Seconds = Field(default=3_600, description="keys fetched longer ago than this count no more")
    jwt_issuer: Annotated[str | None, BlankIsUnset] = Field(
        default=None, description="the `iss` every token must carry, if set"
    )
    jwt_audience: Annotated[str | None, BlankIsUnset] = Field(
        default=None, description="the `aud` every token must carry, if set"
    )
    jwt_leeway_s: Annotated[float, Field(ge=0, le=300)] = Field(default=10, description="clock difference forgiven")

    host: str = Field(default="127.0.0.1", description="the address every service listens on")
    api_port: Port = Field(default=8080, description="the api's port")
    notifier_port: Port = Field(default=8081, description="the notifier's port")
    processor_port: Port = Field(default=8082, description="the processor's port for health and metrics")
    notifier_public_url: str = Field(default="", description="where browsers reach the notifier")
    allowed_origins: str = Field(
        default="", description="origins whose pages may call api and notifier, separated by commas; *: any"
    )
    rate_limit_per_s: Annotated[float, Field(ge=0, le=1_000_000)] = Field(
        default=5_000, description="requests a second of one user, on average; 0: no limit"
    )
    rate_limit_burst: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default=20_000, description="requests one user may send at once"
    )

    files_max: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=1_000, description="files of a new batch")
    batch_bytes_max: Bytes = Field(default=10_000_000_000, description="bytes of a new batch")
    file_bytes_max: Bytes = Field(default=100_000_000, description="bytes of one of its files")
    idle_seal_s: Seconds = Field(default=24 * 3600, description="an open batch is sealed so long after its last file")

    work_timeout_s: Seconds = Field(default=120, description="longest work on one file")
    work_memory_bytes: Annotated[int, Field(ge=0)] = Field(
        default=1024 * _MIB, description="most memory for the work on one file; 0: no limit"
    )
    pixels_max: Annotated[int, Field(ge=1)] = Field(default=100_000_000, description="pixels of one picture")

    read_back_timeout_s: Seconds = Field(default=10, description="longest wait for a write to come back from the log")
    projection_timeout_s: Seconds = Field(default=5, description="longest wait for `min_position`")
    tail_lag_max_s: Seconds = Field(default=2, description="a tail further behind than this takes no writes")
    tail_batches_max: Annotated[int, Field(ge=1)] = Field(default=2_000, description="batches held in memory at rest")
    tail_facts_max: Annotated[int, Field(ge=1_000)] = Field(
        default=200_000, description="facts held that the read models do not have yet"
    )

    clients_max: Annotated[int, Field(ge=1)] = Field(default=10_000, description="progress connections, all users")
    clients_per_user_max: Annotated[int, Field(ge=1)] = Field(default=100, description="progress connections, one user")
    client_bytes_max: Annotated[int, Field(ge=65_536)] = Field(
        default=8 * _MIB, description="bytes waiting for one client before it is closed as too slow"
    )
    heartbeat_s: Seconds = Field(default=20, description="pause between the notifier's pings")

    stop_timeout_s: Seconds = Field(default=15, description="longest clean stop")
    log_format: Literal["console", "json"] = Field(default="console", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    fault: str = Field(default="", description="for tests: where to break on purpose, as point:action[:nth],…")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        complaints: list[str] = []
        if self.jwt_secret is not None and len(self.jwt_secret.get_secret_value().encode()) < JWT_SECRET_BYTES_MIN:
            complaints.append(f"SLUICE_JWT_SECRET is shorter than {JWT_SECRET_BYTES_MIN} bytes; use a random one")
        if self.partition >= self.partitions:
            complaints.append(f"SLUICE_PARTITION={self.partition} is not below SLUICE_PARTITIONS={self.partitions}")
        if self.file_bytes_max > self.batch_bytes_max:
            complaints.append("SLUICE_FILE_BYTES_MAX is larger than SLUICE_BATCH_BYTES_MAX")
        if self.blob_url and (complaint := _complaint_about_blob_url(self.blob_url)):
            complaints.append(complaint)
        complaints += self._complaints_about_kafka()
        for variable, url in (("JWKS_URL", self.jwks_url), ("NOTIFIER_PUBLIC_URL", self.notifier_public_url)):
            if url and not is_web_url(url):
                complaints.append(f"SLUICE_{variable} is not of the form https://host[:port]/path")
        if bad := [origin for origin in self.origins if not _ORIGIN.fullmatch(origin)]:
            complaints.append(f"SLUICE_ALLOWED_ORIGINS names {bad[0]!r}, which is not of the form https://host[:port]")
        try:
            faults.parse(self.fault)
        except ValueError as error:
            complaints.append(f"SLUICE_FAULT: {error}")
        if complaints:
            raise ValueError("\n".join(complaints))
        return self

    def _complaints_about_kafka(self) -> Iterator[str]:
        addresses = self.kafka_bootstrap_servers.strip().removesuffix(",").split(",")
        for address in addresses:
            if not _matches(_KAFKA_ADDRESS, address.strip()):
                form = f"of the form host:port, with a port from 1 to {_PORT_MAX}"
                yield f"SLUICE_KAFKA_BOOTSTRAP_SERVERS names {address!r}, which is not {form}"
        for variable, topic in (("LOG_TOPIC", self.log_topic), ("PROGRESS_TOPIC", self.progress_topic)):
            if not _TOPIC.fullmatch(topic):
                yield f"SLUICE_{variable}={topic!r:.80} is no topic's name: 1 to 249 letters, digits and ._- only"
        if self.log_topic == self.progress_topic:
            yield f"SLUICE_LOG_TOPIC and SLUICE_PROGRESS_TOPIC are both {self.log_topic!r:.80}; name two topics"

    @property
    def blob_folder(self) -> Path:
        """The local folder of the blob store, where `blob_bucket` is None."""
        return Path(unquote(urlsplit(self.blob_url).path))

    @property
    def blob_bucket(self) -> BlobBucket | None:
        """The bucket of the blob store; None where that is a local folder."""
        match = _BUCKET_URL.fullmatch(self.blob_url)
        return BlobBucket(match[1], match[2] or "") if match else None

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins whose pages may call; ("*",) is any."""
        return tuple(origin.strip() for origin in self.allowed_origins.split(",") if origin.strip())

    @property
    def notifier_url(self) -> str:
        """Where clients reach the notifier."""
        return self.notifier_public_url or f"http://{host_in_url(self.host)}:{self.notifier_port}"


def host_in_url(host: str) -> str:
    """The host as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_web_url(text: str) -> bool:
    """Whether it is an http or https URL with a host, and a port that can be where it names one."""
    return _matches(_WEB_URL, text)


def _matches(form: re.Pattern[str], text: str) -> bool:
    """Whether the text is of this form, whose first group is a port."""
    match = form.fullmatch(text)
    return match is not None and 1 <= int(match[1] or 1) <= _PORT_MAX


def _complaint_about_blob_url(url: str) -> str | None:
    """What is wrong with it, in a line that repeats no credentials."""
    if "@" in url and not url.startswith("file:"):
        return "SLUICE_BLOB_URL holds an @; credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if url.startswith("s3://") and not _BUCKET_URL.fullmatch(url):
        return f"SLUICE_BLOB_URL={url!r} is not of the form s3://bucket/prefix (letters, digits and -_.!*'() only)"
    if not url.startswith(("file:///", "s3://")):
        return f"SLUICE_BLOB_URL={url!r} is not of the form file:///an/absolute/folder or s3://bucket/prefix"
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(variable, "")
        if url.startswith("s3://") and endpoint and not _ENDPOINT.fullmatch(endpoint):
            return f"{variable} is not of the form http://host:port or https://host"
    return None


def load(*, needs: tuple[str, ...] = (), **overrides: Any) -> Settings:
    """The settings from the environment; raises SettingsError with a line for each wrong or missing one.

    `needs` names fields that have no default a service could start with; of `"a|b"` one is enough.
    """
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_lines(error))) from None
    missing = [name for name in needs if not any(getattr(settings, either) for either in name.split("|"))]
    if missing:
        raise SettingsError("\n".join(map(_missing, missing)))
    return settings


def _missing(name: str) -> str:
    fields = {f"SLUICE_{each.upper()}": Settings.model_fields[each].description for each in name.split("|")}
    if len(fields) == 1:
        return "".join(f"{variable} is not set: {meaning}" for variable, meaning in fields.items())
    described = "; ".join(f"{variable}: {meaning}" for variable, meaning in fields.items())
    return f"{' or '.join(fields)} is not set ({described})"


def _lines(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for found in error.errors(include_url=False):
        name = f"SLUICE_{str(found['loc'][0]).upper()}" if found["loc"] else ""
        message = found["msg"].removeprefix("Value error, ")
        shown = "" if "secret" in name.lower() or "url" in name.lower() or not name else f"={found['input']!r:.80}"
        lines.append(f"{name}{shown}: {message}" if name else message)
    return lines
