"""Postgres: connections, migrations, and reading the live generation of the read models.

The read models lie in a schema of their own per generation (`gen_N`); a row of `sluice_ops.live_generation` says which
one is live, and every read checks it in the statement that reads the rows. Writing them is the projection's business.
Ids are text and JSON is Python values on every connection.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import asyncpg

from schemas.batch import Batch, Lane, Upload
from schemas.errors import PartError
from schemas.ids import partition_of
from services.lifecycle import StartError
from services.migrating import apply_migrations, ensure_generation
from services.observability import logger

_log = logger("database")

Connection = asyncpg.Connection
SERVER_VERSION_MIN = 15
PROJECTED_CHANNEL = "sluice_projected"
IDLE_IN_TRANSACTION_MS = 3_000
"""A process that is paused in the middle of a transaction keeps others from its rows no longer than this."""
_MIGRATION_LOCK = 0x51_1CE
_GENERATION_ATTEMPTS_MAX = 5
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a connection says that was cut while this process was paused
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
_REFUSED = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
_GONE = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidSchemaNameError)

_BATCH_NAMES = {"offset": "last_offset"}
_UPLOAD_NAMES = {"offset": "last_offset"}
BATCH_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Batch) if f.name != "deleted")
UPLOAD_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Upload))
BATCH_COLUMN_NAMES = tuple(_BATCH_NAMES.get(name, name) for name in BATCH_FIELDS)
UPLOAD_COLUMN_NAMES = tuple(_UPLOAD_NAMES.get(name, name) for name in UPLOAD_FIELDS)
BATCH_COLUMNS = ", ".join(BATCH_COLUMN_NAMES)
UPLOAD_COLUMNS = ", ".join(UPLOAD_COLUMN_NAMES)
_TOMBSTONE_COLUMNS = (
    "id, partition, user_id, request_key_hash, request_body_hash, "
    "created_ms, created_offset, deleted_ms, deleted_offset"
)

SILENT_S = "abs(extract(epoch FROM clock_timestamp() - heartbeat))::float8"
"""How long ago a processor was heard, in a query of `sluice_ops.processors`; or how long ahead, where Postgres' clock
was set back since: either way it is not to count as heard for long."""


class DatabaseUnavailable(PartError):  # noqa: N818  # named for what it says
    """Postgres cannot be reached or is shutting down; asking again later can help."""


class ReadModelsGone(DatabaseUnavailable):
    """Postgres is there, but tables of Sluice are not: `Database.migrate` makes them, the processor fills them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A batch as the read models hold it (None: unknown; a deleted one has `deleted` set and no uploads), and the
    lane's position in the same transaction."""

    batch: Batch | None
    uploads: dict[str, Upload]
    lane: Lane


def batch_from_row(row: asyncpg.Record) -> Batch:
    """The state a row of `upload_batches` holds; the row has the columns BATCH_COLUMNS."""
    return Batch(**{field: row[column] for field, column in zip(BATCH_FIELDS, BATCH_COLUMN_NAMES, strict=True)})


def upload_from_row(row: asyncpg.Record) -> Upload:
    """The state a row of `uploads` holds; the row has the columns UPLOAD_COLUMNS."""
    return Upload(**{field: row[column] for field, column in zip(UPLOAD_FIELDS, UPLOAD_COLUMN_NAMES, strict=True)})


def batch_from_tombstone(row: asyncpg.Record) -> Batch:
    """What is left of a deleted batch: who made it and by which request."""
    return Batch(
        id=row["id"],
        partition=row["partition"],
        user_id=row["user_id"],
        name=None,
        metadata={},
        expected_uploads=None,
        files_max=0,
        batch_bytes_max=0,
        file_bytes_max=0,
        request_key_hash=row["request_key_hash"],
        request_body_hash=row["request_body_hash"],
        created_ms=row["created_ms"],
        created_offset=row["created_offset"],
        updated_ms=row["deleted_ms"],
        offset=row["deleted_offset"],
        last_queued_ms=row["created_ms"],
        deleted=True,
    )


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Turn every error that means "Postgres, or what we need of it, is not there now" into DatabaseUnavailable.

    Who is cancelled meanwhile is cancelled: a connection that a silent Postgres does not let us give back fails on the
    way out, and that must not be taken for the answer.
    """
    before = _times_cancelled()
    try:
        with _translated():
            yield
    except DatabaseUnavailable as error:
        if _times_cancelled() > before:
            raise asyncio.CancelledError from error
        raise


def _times_cancelled() -> int:
    """How often the task at work was asked to end, and has not."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _REFUSED as error:
        raise DatabaseUnavailable(
            f"Postgres refuses SLUICE_DATABASE_URL: {error}", told="the database refuses this service"
        ) from error
    except _GONE as error:
        raise ReadModelsGone(
            f"the read models are gone from Postgres ({error}); the processor makes them anew from the log",
            told="the read models are gone from Postgres; the processor makes them anew from the log",
        ) from error
    except asyncpg.DiskFullError as error:
        raise DatabaseUnavailable(
            f"Postgres writes nothing more, since its disk is full: make room there ({error})",
            told="the database's disk is full",
        ) from error
    except _UNAVAILABLE as error:
        why = str(error) or type(error).__name__
        raise DatabaseUnavailable(
            f"the database cannot be reached: {why}", told="the database cannot be reached"
        ) from error


def _uuid_bytes(text: str) -> bytes:
    """What `UUID(text).bytes` is, four times as fast; ids were checked when they were decoded."""
    return bytes.fromhex(text.replace("-", ""))


def _uuid_text(raw: bytes) -> str:
    digits = bytes(raw).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


async def prepare_connection(connection: Connection) -> None:
    """Ids as text, JSON as Python values."""
    await connection.set_type_codec(
        "uuid",
        schema="pg_catalog",
        format="binary",
        encoder=_uuid_bytes,
        decoder=_uuid_text,
    )
    await connection.set_type_codec(
        "json",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(),
        decoder=lambda raw: json.loads(bytes(raw)),
    )


async def load_lanes(connection: Any, generation: str) -> dict[int, Lane]:
    """The positions of one generation, by partition."""
    rows = await connection.fetch(f"SELECT partition, log_id, next_offset, epoch, time_ms FROM {generation}.positions")  # noqa: S608  # the schema's name is ours
    return {row["partition"]: Lane(**dict(row)) for row in rows}


async def load_batches(connection: Any, generation: str, ids: Sequence[str]) -> dict[str, Batch]:
    """The batches of these ids that exist, the deleted ones too."""
    rows = await connection.fetch(
        f"SELECT {BATCH_COLUMNS} FROM {generation}.upload_batches WHERE id = ANY($1)",  # noqa: S608  # names are ours
        ids,
    )
    tombstones = await connection.fetch(
        f"SELECT {_TOMBSTONE_COLUMNS} FROM {generation}.deleted_batches WHERE id = ANY($1)",  # noqa: S608  # ours
        ids,
    )
    return {
        **{row["id"]: batch_from_row(row) for row in rows},
        **{row["id"]: batch_from_tombstone(row) for row in tombstones},
    }


class Database:
    """A pool of connections to the database Sluice's read models live in."""

    def __init__(self, url: str, *, pool_max: int, sessions: str) -> None:
        self._url = url
        self._sessions = sessions
        self._pool: asyncpg.Pool = asyncpg.create_pool(
            url,
            min_size=0,  # a floor is kept up in the background, which logs a traceback a second while Postgres is away
            max_size=pool_max,
            timeout=5,
            command_timeout=10,
            init=prepare_connection,
            server_settings={
                "application_name": sessions,
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
            },
        )
        self._generation: str | None = None

    @classmethod
    async def open(cls, url: str, *, pool_max: int = 10, sessions: str = "sluice") -> Self:
        """Connect; raises DatabaseUnavailable, or StartError where the address or the server's version is wrong.

        `sessions`: the `application_name` under which Postgres shows them.
        """
        try:
            database = cls(url, pool_max=pool_max, sessions=sessions)
            with reaching():
                await database._pool
                await database._check_version()
        except DatabaseUnavailable as error:
            refused = error.__cause__
            if isinstance(refused, asyncpg.exceptions.ClientConfigurationError):
                raise StartError(_unusable(str(refused).partition("\n")[0])) from error
            if isinstance(refused, _REFUSED):
                raise StartError(
                    f"Postgres refused SLUICE_DATABASE_URL: {refused}; check user, password and name"
                ) from error
            raise
        except (ValueError, OverflowError) as error:  # its text may be a part of the password
            raise StartError(_unusable("its host or its port cannot be read (a port is 1 to 65535)")) from error
        return database

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self._pool.close(), 5)
        except TimeoutError:
            self._pool.terminate()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection of the pool; raises DatabaseUnavailable, also for what happens inside."""
        with reaching():
            async with self._pool.acquire(timeout=5) as connection:
                yield connection

    async def connect(self, **server_settings: str) -> Connection:
        """A connection outside the pool, for a lock or for LISTEN."""
        with reaching():
            connection: Connection = await asyncpg.connect(
                self._url,
                timeout=5,
                command_timeout=10,
                server_settings={"application_name": self._sessions, **server_settings},
            )
        async with _terminated_on_error(connection):
            with reaching():
                await prepare_connection(connection)
        return connection

    async def _check_version(self) -> None:
        async with self._pool.acquire() as connection:
            version = connection.get_server_version()
        if version.major < SERVER_VERSION_MIN:
            raise StartError(
                f"this is Postgres {version.major}.{version.minor}; Sluice needs {SERVER_VERSION_MIN} or newer"
            )

    async def migrate(self) -> None:
        """Ensure the tables, once for all services that start at the same time.

        Raises StartError where the tables are of a Sluice that is too new, or a migration changed after it was applied.
        """
        async with self.connection() as connection:
            await connection.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
            try:
                async with connection.transaction():
                    await apply_migrations(connection)
                    await ensure_generation(connection)
            except asyncpg.LockNotAvailableError as error:
                raise DatabaseUnavailable(
                    "the read models lack a column, and somebody reads their tables in a long transaction"
                ) from error
            finally:
                await connection.execute("SELECT pg_advisory_unlock($1)", _MIGRATION_LOCK)

    async def generation(self, *, fresh: bool = False) -> str:
        """The schema of the live generation, such as gen_1."""
        if self._generation is None or fresh:
            async with self.connection() as connection:
                self._generation = await _live_generation(connection)
        return self._generation

    async def read(self, query: str, *args: object) -> list[asyncpg.Record]:
        """The rows of a SELECT that names its tables as `{generation}.uploads`, all of the live generation.

        The statement itself returns which generation is live beside the rows; if it is another one than was asked,
        or its schema is gone, the query is run again.
        """
        for attempt in range(_GENERATION_ATTEMPTS_MAX):
            generation = await self.generation(fresh=attempt > 0)
            checked = (
                "SELECT live.number AS live_generation, found.* FROM sluice_ops.live_generation AS live "  # noqa: S608  # names are ours
                "LEFT JOIN LATERAL (SELECT true AS is_row, wanted.* FROM "
                f"({query.replace('{generation}', generation)}) AS wanted) AS found ON true"
            )
            try:
                async with self.connection() as connection:
                    rows = await connection.fetch(checked, *args)
            except ReadModelsGone:
                if attempt == _GENERATION_ATTEMPTS_MAX - 1:
                    raise
                continue
            if rows and schema_of(rows[0]["live_generation"]) == generation:
                return [row for row in rows if row["is_row"]]
        raise DatabaseUnavailable("the read models were switched again and again while they were read; try again")

    async def positions(self) -> dict[int, Lane]:
        """What the read models include, by partition."""
        rows = await self.read("SELECT partition, log_id, next_offset, epoch, time_ms FROM {generation}.positions")
        return {
            row["partition"]: Lane(
                partition=row["partition"],
                log_id=row["log_id"],
                next_offset=row["next_offset"],
                epoch=row["epoch"],
                time_ms=row["time_ms"],
            )
            for row in rows
        }

    async def snapshot(self, batch_id: str) -> Snapshot:
        """A batch, its uploads and the lane's position, all as of one moment; asked again where another generation
        became live in that moment."""
        for _ in range(_GENERATION_ATTEMPTS_MAX - 1):
            with contextlib.suppress(ReadModelsGone):
                return await self._snapshot(batch_id)
        return await self._snapshot(batch_id)

    async def _snapshot(self, batch_id: str) -> Snapshot:
        partition = partition_of(batch_id)
        async with self.connection() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            generation = self._generation = await _live_generation(connection)
            lanes = await load_lanes(connection, generation)
            batch = (await load_batches(connection, generation, [batch_id])).get(batch_id)
            rows = await connection.fetch(
                f"SELECT {UPLOAD_COLUMNS} FROM {generation}.uploads WHERE batch_id = $1 ORDER BY created_offset",  # noqa: S608  # ours
                batch_id,
            )
        lane = lanes.get(partition, Lane(partition))
        return Snapshot(batch, {row["id"]: upload_from_row(row) for row in rows}, lane)

    async def listen(self, on_projected: Callable[[int, int], None], lost: asyncio.Event) -> Connection:
        """Call `on_projected(partition, next_offset)` on each commit of the projection, until the connection is lost
        (then `lost` is set). The caller closes the connection."""
        connection = await self.connect()

        def heard(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            partition, _, next_offset = str(payload).partition(" ")
            on_projected(int(partition), int(next_offset))

        async with _terminated_on_error(connection):
            connection.add_termination_listener(lambda _connection: lost.set())
            with reaching():
                await connection.add_listener(PROJECTED_CHANNEL, heard)
        return connection


def _unusable(why: str) -> str:
    return f"SLUICE_DATABASE_URL cannot be used: {why}; it looks like postgresql://user:password@host:port/name"


@contextlib.asynccontextmanager
async def _terminated_on_error(connection: Connection) -> AsyncIterator[None]:
    """Leave no open connection behind where the caller never gets to see it."""
    try:
        yield
    except BaseException:
        connection.terminate()
        raise


async def _live_generation(connection: Any) -> str:
    number = await connection.fetchval("SELECT number FROM sluice_ops.live_generation")
    if number is None:
        raise ReadModelsGone("nothing says which generation of the read models is live")
    return schema_of(number)


def schema_of(generation: int) -> str:
    """The schema's name of a generation."""
    return f"gen_{generation}"
