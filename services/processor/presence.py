"""How this processor is, told to everybody: a row of `sluice_ops.processors`, written about once a second.

Readers are the api's status, people, and standbys, who leave the lane of a holder alone that was heard a moment ago. A
row that cannot be written is no failure of the lane. It goes when the lane is given back, and rows of processors that
are long gone go when another one tells of itself; times are Postgres' own, so clocks need not agree.
"""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.database import Database, DatabaseUnavailable
from services.lifecycle import cancelled
from services.observability import logger

_log = logger("presence")

HEARTBEAT_S = 1.0
LEAVE_TIMEOUT_S = 1.0
FORGOTTEN_AFTER_S = 600


@dataclass(frozen=True, slots=True)
class Worker:
    """Who works: `worker_id` as it stands in claims; `machine` tells whether another one's `pid` can be looked up."""

    worker_id: str
    machine: str
    pid: int

    @staticmethod
    @functools.cache
    def this_process() -> "Worker":
        """The same one whenever it is asked for, and no other process has its name: containers may share a host's name,
        and number their processes alike."""
        host, pid = socket.gethostname(), os.getpid()
        try:
            space = str(Path("/proc/self/ns/pid").readlink())
        except OSError:
            space = ""
        return Worker(f"{host}-{pid}-{os.urandom(2).hex()}", f"{host} {space}".strip(), pid)

    def knows_ended(self, *, machine: str, pid: int) -> bool:
        """Whether that process is surely gone: it was one of this machine's, and is no more."""
        return machine == self.machine and not psutil.pid_exists(pid)


@dataclass(frozen=True, slots=True)
class InWork:
    """The file in work; `seconds`: for how long."""

    upload_id: str
    attempt: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Condition:
    """How a processor is. `degraded`: parts that are missing though the lane goes on; `problems`: what stops it."""

    state: str
    epoch: int | None
    in_work: InWork | None
    degraded: Sequence[str]
    problems: Sequence[str]


class Presence:
    """The row of this processor; `wake` has it written now."""

    def __init__(self, database: Database, worker: Worker, *, partition: int, look: Callable[[], Condition]) -> None:
        self._database = database
        self._worker = worker
        self._partition = partition
        self._look = look
        self._changed = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, database: Database, worker: Worker, *, partition: int, look: Callable[[], Condition]
    ) -> AsyncIterator["Presence"]:
        """Tell until the block is left, or until `leave`. `look` says how the processor is."""
        presence = cls(database, worker, partition=partition, look=look)
        presence._writing = asyncio.create_task(presence._keep_telling(), name="presence")
        try:
            yield presence
        finally:
            await presence.leave()

    def wake(self) -> None:
        """Something changed that others should hear now."""
        self._changed.set()

    async def leave(self) -> None:
        """Take the row away: the lane is nobody's from now on, and whoever stands by need not wait. Twice is fine."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        await cancelled(writing)
        with contextlib.suppress(DatabaseUnavailable, TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_S), self._database.connection() as connection:
                await connection.execute(
                    "DELETE FROM sluice_ops.processors WHERE partition = $1 AND worker_id = $2",
                    self._partition,
                    self._worker.worker_id,
                )

    async def _keep_telling(self) -> None:
        failed = False
        while True:
            self._changed.clear()
            try:
                await self._tell(self._look())
                failed = False
            except DatabaseUnavailable as error:
                if not failed:
                    _log.info("presence_not_told", reason=str(error))
                failed = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S)

    async def _tell(self, condition: Condition) -> None:
        work = condition.in_work
        async with self._database.connection() as connection:
            await connection.execute(
                """
                INSERT INTO sluice_ops.processors AS known (
                    partition, worker_id, machine, pid, state, since, heartbeat,
                    epoch, upload_id, attempt, work_since, degraded, problems
                ) VALUES (
                    $1, $2, $3, $4, $5, now(), clock_timestamp(),
                    $6, $7, $8, clock_timestamp() - $9 * interval '1 second', $10, $11
                )
                ON CONFLICT (partition, worker_id) DO UPDATE SET
                    since = CASE WHEN known.state = excluded.state THEN known.since ELSE excluded.since END,
                    machine = excluded.machine, pid = excluded.pid, state = excluded.state,
                    heartbeat = excluded.heartbeat, epoch = excluded.epoch, upload_id = excluded.upload_id,
                    attempt = excluded.attempt, work_since = excluded.work_since,
                    degraded = excluded.degraded, problems = excluded.problems
                """,
                self._partition,
                self._worker.worker_id,
                self._worker.machine,
                self._worker.pid,
                condition.state,
                condition.epoch,
                None if work is None else work.upload_id,
                None if work is None else work.attempt,
                None if work is None else work.seconds,
                list(condition.degraded),
                list(condition.problems),
            )
            await connection.execute(
                "DELETE FROM sluice_ops.processors WHERE heartbeat < now() - $1 * interval '1 second'",
                FORGOTTEN_AFTER_S,
            )
