"""The lane's lock: keeps two replicas from doing the same work. It is not the fence; LaneClaimed in the log is.

A Postgres advisory lock on a connection of its own, asked each second under a short `idle_session_timeout`: a holder
that is paused or hung loses it without anybody's help.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from services.database import Connection, Database, DatabaseUnavailable, reaching
from services.observability import logger

_log = logger("lock")

_LOCK_CLASS = 0x51CE
PIN_INTERVAL_S = 1.0
TRY_INTERVAL_S = 0.5
IDLE_TIMEOUT_MS = 3_000


class LaneLock:
    """The lock of one partition. `held` is what was known at the last pin; `on_change` is called when that changes.
    `problem` says why the database could not be asked for it, None where it could."""

    def __init__(self, database: Database, *, partition: int) -> None:
        self.held = False
        self.on_change: Callable[[], None] = lambda: None
        self.problem: str | None = None
        self._database = database
        self._partition = partition
        self._connection: Connection | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, database: Database, *, partition: int) -> AsyncIterator["LaneLock"]:
        """The lock, not taken yet; given back when the block is left."""
        lock = cls(database, partition=partition)
        try:
            yield lock
        finally:
            await lock._give_back()

    async def take(self) -> bool:
        """Wait until the lane is free and it is ours; True then."""
        said: str | None = None
        while not await self._try():
            reason = self.problem or "another processor holds the lane"
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

    async def _try(self) -> bool:
        try:
            if self._connection is None:
                self._connection = await self._database.connect(
                    idle_session_timeout=str(IDLE_TIMEOUT_MS),
                    idle_in_transaction_session_timeout=str(IDLE_TIMEOUT_MS),
                    lock_timeout=str(IDLE_TIMEOUT_MS),
                )
            with reaching():
                taken = await self._connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, $2)", _LOCK_CLASS, self._partition
                )
        except DatabaseUnavailable as error:
            self._drop(str(error))
            return False
        self.problem = None
        self._change(held=bool(taken))
        return self.held

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

    async def _give_back(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(DatabaseUnavailable), reaching():
                await self._connection.close(timeout=2)
        self._drop()
