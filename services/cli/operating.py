"""What commands for operators work on: the services' settings, the log and the read models, read without a service.

Settings name the servers; where they do not, those of the `sluice up` that runs in --data-dir are meant. Nothing is
made or changed by opening: no topic, no table. Errors say what to do.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from schemas.position import Position
from services.cli.connection import read_endpoints
from services.cli.display import clean, console_of
from services.cli.errors import CliError, WrongUse
from services.database import Database, DatabaseUnavailable
from services.embedded import EmbeddedKafka
from services.embedded.folders import lock_folder, make_folder
from services.eventlog import EventLog, LogError, LogIdentity, LogSettings
from services.lifecycle import StartError
from services.settings import Settings, load

_ENDPOINTS = {"kafka_bootstrap_servers": "kafka", "database_url": "postgres", "blob_url": "blobs"}
"""Setting → the name of its part in endpoints.json."""


def operator_settings(*, data_dir: Path, needs: tuple[str, ...]) -> Settings:
    """The services' settings, completed by those of the `up` in `data_dir`.

    Raises WrongUse where neither names what is needed, SettingsError.
    """
    configured = load()
    endpoints = read_endpoints(data_dir)
    found: dict[str, Any] = {
        name: endpoints[part]
        for name, part in _ENDPOINTS.items()
        if name not in configured.model_fields_set and part in endpoints
    }
    missing = [f"SLUICE_{name.upper()}" for name in needs if name not in configured.model_fields_set | found.keys()]
    if missing:
        raise WrongUse(
            f"Which Sluice? Nothing runs in {data_dir}, and {' and '.join(missing)} {_is(missing)} not set. Start one "
            f"here with `sluice up`, name its folder with --data-dir, or give the settings its services have."
        )
    return load(**found)


@contextlib.asynccontextmanager
async def kafka_of(data_dir: Path, *, make: bool) -> AsyncIterator[Settings]:
    """The settings of the Kafka that is meant, which answers as long as the block lasts. `make`: a folder without one
    gets one."""
    named = "kafka_bootstrap_servers" in load().model_fields_set or "kafka" in read_endpoints(data_dir)
    if named or not (make or (data_dir / EmbeddedKafka.name).is_dir()):
        yield operator_settings(data_dir=data_dir, needs=("kafka_bootstrap_servers",))
        return
    make_folder(data_dir, purpose="where Sluice keeps its data on this machine")
    lock = await lock_folder(data_dir)
    try:
        note = console_of(stderr=True)
        async with EmbeddedKafka(data_dir=data_dir, log=lambda line: note.print(clean(line), markup=False)) as kafka:
            yield load(kafka_bootstrap_servers=kafka.bootstrap_servers)
    finally:
        lock.release()


@contextlib.asynccontextmanager
async def opened_log(settings: Settings) -> AsyncIterator[EventLog]:
    """The log; LogError in the block becomes CliError."""
    log_settings = LogSettings(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        topic=settings.log_topic,
        progress_topic=settings.progress_topic,
        client_id="sluice-cli",
    )
    try:
        async with EventLog.open(log_settings) as log:
            yield log
    except LogError as error:
        raise CliError(_sentence(error)) from error


@contextlib.asynccontextmanager
async def opened_database(settings: Settings, *, pool_max: int = 2) -> AsyncIterator[Database]:
    """The read models; DatabaseUnavailable in the block becomes CliError."""
    try:
        database = await Database.open(settings.database_url.get_secret_value(), pool_max=pool_max)
        try:
            yield database
        finally:
            await database.close()
    except (DatabaseUnavailable, StartError) as error:
        raise CliError(_sentence(error)) from error


async def partitions_of(log: EventLog) -> range:
    """The log's partitions; raises CliError where there is no log yet."""
    found = await log.inspect()
    if found is None:
        raise CliError(
            f"There is no log yet: Kafka at {log.settings.bootstrap_servers} has no topic {log.settings.topic}. The "
            f"first start of a service makes it."
        )
    return range(found.partitions)


async def log_id_of(log: EventLog) -> str:
    """Which log this is; raises CliError where nothing was written yet."""
    log_id = await log.identify()
    if log_id is None:
        raise _empty(log)
    return log_id


async def identity_of(log: EventLog, partitions: Sequence[int]) -> LogIdentity:
    """Which log this is and which it was imported from; raises CliError where nothing was written yet."""
    identity = await log.identity(partitions)
    if identity is None:
        raise _empty(log)
    return identity


def require_same_log(position: Position, log_id: str) -> None:
    """Raises WrongUse for a position of another log."""
    ours = Position.of(log_id, {}).log
    if position.log != ours:
        raise WrongUse(f"{position} is a position of the log {position.log}, and this is the log {ours}.")


def _empty(log: EventLog) -> CliError:
    return CliError(f"The log {log.settings.topic} is empty: no service has started on it yet.")


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
