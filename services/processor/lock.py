"""The lane's lock: keeps two replicas from doing the same work. It is not the fence; LaneClaimed in the log is.

A Postgres advisory lock on a connection of its own, asked each second under a short `idle_session_timeout`: a holder
that is paused or hung loses it without anybody's help. Who loses it for a moment takes it again at once. Anybody else
first gives the last holder time to come back, unless that one gave the lane back or is known to have ended: a lane
that changes hands costs the file in work an attempt. Whoever takes it ends what transactions others left open at it:
Postgres does so by itself, but not where a client was paused between two messages of one command.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from services.database import SILENT_S, Connection, Database, DatabaseUnavailable, ReadModelsGone, reaching
from services.observability import logger
from services.processor.presence import Worker

_log = logger("lock")

_LOCK_CLASS = 0x51CE
PIN_INTERVAL_S = 1.0
TRY_INTERVAL_S = 0.25
IDLE_TIMEOUT_MS = 3_000
COMING_BACK_S = 5.0
"""How long others wait after a holder was last heard, and after they found Postgres themselves (it may have been away
for both)."""


def sessions_of(partition: int, worker: Worker) -> str:
    """What a processor's sessions in Postgres are named, so that the next holder of its lane knows them."""
    return f"sluice-lane-{partition} {worker.worker_id}"


class LaneLock:
    """The lock of one partition. `held` is what was known at the last pin; `on_change` is called when that changes.
    `problem` says why the database could not be asked for it, None where it could."""

    def __init__(self, database: Database, worker: Worker, *, partition: int) -> None:
        self.held = False
        self.on_change: Callable[[], None] = lambda: None
        self.problem: str | None = None
        self._database = database
        self._worker = worker
        self._partition = partition
        self._connection: Connection | None = None
        self._connected_at_s = 0.0
        self._standing_by_for = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, database: Database, worker: Worker, *, partition: int) -> AsyncIterator["LaneLock"]:
        """The lock, not taken yet; given back when the block is left."""
        lock = cls(database, worker, partition=partition)
        try:
            yield lock
        finally:
            await lock.give_back()

    async def take(self) -> bool:
        """Wait until the lane is free and it is ours; True then."""
        said: str | None = None
        while not await self._try():
            reason = self.problem or self._standing_by_for
            if reason != said:
                _log.info("standing_by", partition=self._partition, reason=reason)
                said = reason
            await asyncio.sleep(TRY_INTERVAL_S)
        return True

    async def keep(self) -> None:
        """Pin the lock each second; when it is lost, take it again. Never returns."""
        while True:
            if await self._pinned():
                await asyncio.sleep(PIN_INTERVAL_S)
                continue
            _log.warning("lane_lock_lost", partition=self._partition)
            self._change(held=False)
            await self.take()
            _log.info("lane_lock_back", partition=self._partition)

    async def give_back(self) -> None:
        """Let others have it; nothing may be pinned or taken any more."""
        if self._connection is not None:
            with contextlib.suppress(DatabaseUnavailable), reaching():
                await self._connection.close(timeout=2)
        self._drop()
        self.held = False

    async def _try(self) -> bool:
        try:
            with reaching():
                async with asyncio.timeout(IDLE_TIMEOUT_MS / 1000):  # a paused Postgres refuses nothing
                    taken = await self._ask()
        except DatabaseUnavailable as error:
            self._drop(str(error))
            return False
        self.problem = None
        self._change(held=taken)
        return self.held

    async def _ask(self) -> bool:
        """Whether it is ours now; where not, `_standing_by_for` says why."""
        connection = await self._connected()
        if holder := await self._may_come_back(connection):
            self._standing_by_for = f"the lane is {holder}'s, who was heard a moment ago"
            return False
        self._standing_by_for = "another processor holds the lane"
        taken = await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", _LOCK_CLASS, self._partition)
        if taken:
            await self._end_left_open(connection)
        return bool(taken)

    async def _end_left_open(self, connection: Connection) -> None:
        ended = await connection.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() "
            "AND usename = current_user AND application_name LIKE $1 || ' %' "
            "AND application_name <> current_setting('application_name') "
            "AND xact_start < clock_timestamp() - $2 * interval '1 millisecond'",
            f"sluice-lane-{self._partition}",
            IDLE_TIMEOUT_MS,
        )
        if ended:
            _log.warning("transactions_ended", partition=self._partition, left_open=ended)

    async def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = await self._database.connect(
                idle_session_timeout=str(IDLE_TIMEOUT_MS),
                idle_in_transaction_session_timeout=str(IDLE_TIMEOUT_MS),
                lock_timeout=str(IDLE_TIMEOUT_MS),
            )
            self._connected_at_s = time.monotonic()
        return self._connection

    async def _may_come_back(self, connection: Connection) -> str | None:
        """The other worker who held the lane last and is given time, if there is one."""
        just_connected = time.monotonic() - self._connected_at_s < COMING_BACK_S
        try:
            with reaching():
                rows = await connection.fetch(
                    f"SELECT worker_id, machine, pid, {SILENT_S} < $3 AS heard "  # noqa: S608  # ours
                    "FROM sluice_ops.processors "
                    "WHERE partition = $1 AND worker_id <> $2 AND state <> 'standing by' ORDER BY heartbeat DESC",
                    self._partition,
                    self._worker.worker_id,
                    COMING_BACK_S,
                )
        except ReadModelsGone:
            return None
        for row in rows:
            ended = self._worker.knows_ended(machine=row["machine"], pid=row["pid"])
            if (row["heard"] or just_connected) and not ended:
                return str(row["worker_id"])
        return None

    async def _pinned(self) -> bool:
        try:
            with reaching():
                assert self._connection is not None
                await asyncio.wait_for(self._connection.execute("SELECT 1"), IDLE_TIMEOUT_MS / 1000)
        except DatabaseUnavailable as error:
            self._drop(str(error))
            return False
        return True

    def _change(self, *, held: bool) -> None:
        if held != self.held:
            self.held = held
            self.on_change()

    def _drop(self, problem: str | None = None) -> None:
        self.problem = problem
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
