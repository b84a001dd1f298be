"""How the api is, in sentences: what is away and why, looked at in the background and true again by itself.

Two questions, two answers. `problems` (for /readyz) is what this api cannot do without; `degraded` (for /v1/status)
also tells what users notice though every api is well: lanes that nobody works, read models that nobody moves. An api
whose processor is down takes files and answers questions all the same, so that is no reason to send nobody there.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from schemas.views import ProcessorView
from services.api import queries
from services.api.lanes import Lanes
from services.auth import Authenticator
from services.blobs import BlobStore, StorageUnavailable
from services.database import Database, DatabaseUnavailable, ReadModelsGone
from services.eventlog import LogRefused, LogUnavailable
from services.eventlog.topics import MENDED_BY
from services.observability import OLDEST_UNFINISHED, logger
from services.standstill import Standstill
from services.tail import Tail

_log = logger("api")

LOOK_INTERVAL_S = 1.0
LOOK_TIMEOUT_S = 2.0
LOOK_SHARE_MAX = 0.05
"""How much of the time may be spent on looking at the database, whoever asks how the service is, and how often."""
LOOK_AGE_S = 0.1
LOOK_PAUSE_MAX_S = 2.0
TOPIC_LOOK_INTERVAL_S = 60.0
STALLED_AFTER_S = 5.0


class Health:
    """See the module's text. `watch` must run for it to be true. `lag_max_s`: a tail further behind is a problem;
    `topic_complaint`: what is wrong with the settings of the log's topic, None where nothing is."""

    def __init__(
        self,
        *,
        tail: Tail,
        authenticator: Authenticator,
        blobs: BlobStore,
        database: Database,
        partitions: int,
        topic_complaint: Callable[[], Awaitable[str | None]],
        lag_max_s: float,
    ) -> None:
        self._tail = tail
        self._authenticator = authenticator
        self._blobs = blobs
        self._database = database
        self._topic_complaint = topic_complaint
        self._lag_max_s = lag_max_s
        self._blob_problem: str | None = None
        self._topic_problem: str | None = None
        self._gone: str | None = None
        self._projection = Standstill()
        self._lanes = Lanes(partitions, now_s=time.monotonic())
        self._oldest_ms: int | None = None
        self._looking = asyncio.Lock()
        self._look_again_at_s = 0.0

    def problems(self) -> list[str]:
        """Why this api cannot do all it should; empty when it can."""
        log_problem = self._tail.log_problem
        found = [f"the log cannot be read: {each}" if each == log_problem else each for each in self._tail.problems()]
        found += self._authenticator.problems()
        if (lag_s := self._tail.behind_s(self._lag_max_s)) is not None:
            found.append(f"the log was last read to its end {lag_s:.0f} s ago, so nothing is written")
        if self._gone is not None and self._tail.database_problem is None:
            found.append(self._gone)
        return found + [each for each in (self._topic_problem, self._blob_problem) if each is not None]

    def degraded(self) -> list[str]:
        """Why the service as a whole does not do all it should, as far as it is seen from here."""
        found = self.problems()
        waiting = self._tail.unprojected()
        if self._tail.full:
            found.append(f"{waiting} facts wait for the read models, so nothing more is written until these move")
        found += (unworked := self._lanes.degraded(now_s=time.monotonic()))
        if not found and not unworked and (still_s := self._look_at_projection()) > STALLED_AFTER_S:
            found.append(f"the read models stand still: for {still_s:.0f} s, {waiting} facts have waited for them")
        return found

    @property
    def processors(self) -> Sequence[ProcessorView]:
        """Who works the lanes, or stands by, as last seen."""
        return self._lanes.processors

    def oldest_unfinished_s(self) -> float | None:
        """The age of the oldest unfinished step, as last seen; None where there is none."""
        known = [each for each in (self._oldest_ms, self._tail.oldest_unprojected_ms()) if each is not None]
        return max(0.0, round(time.time() - min(known) / 1000, 3)) if known else None

    async def look_again(self) -> None:
        """Look at what the database tells, unless that was done a moment ago; never for long."""
        if time.monotonic() < self._look_again_at_s:
            return
        async with self._looking:
            if time.monotonic() < self._look_again_at_s:
                return
            await self._look_at_database()

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        topic_at_s = time.monotonic() + TOPIC_LOOK_INTERVAL_S
        while True:
            await self._look_at_blobs()
            await self.look_again()
            self._look_at_projection()
            if time.monotonic() >= topic_at_s:
                await self._look_at_topic()
                topic_at_s = time.monotonic() + TOPIC_LOOK_INTERVAL_S
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _look_at_projection(self) -> float:
        return self._projection.look(
            self._tail.projected(), waiting=self._tail.unprojected() > 0, now_s=time.monotonic()
        )

    async def _look_at_database(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                found = await queries.processors(self._database)
                self._oldest_ms = await queries.oldest_unfinished_ms(self._database)
            self._lanes.see(found, now_s=time.monotonic())
            self._gone = None
        except (DatabaseUnavailable, TimeoutError) as error:
            self._lanes.see_nothing(now_s=time.monotonic())
            self._gone = error.told if isinstance(error, ReadModelsGone) else None
        ended = time.monotonic()
        pause_s = (ended - began) / LOOK_SHARE_MAX
        self._look_again_at_s = ended + min(max(pause_s, LOOK_AGE_S), LOOK_PAUSE_MAX_S)
        OLDEST_UNFINISHED.set(self.oldest_unfinished_s() or 0.0)

    async def _look_at_topic(self) -> None:
        try:
            problem = await self._topic_complaint()
        except (LogUnavailable, LogRefused):
            return  # the tail meets that, too, and says so
        if problem is not None and self._topic_problem is None:
            _log.warning("topic_settings_wrong", reason=problem)
        # The command that mends it names Kafka's address, which is no business of who asks for our health.
        what = None if problem is None else problem.partition(MENDED_BY)[0]
        self._topic_problem = None if what is None else f"{what}: `sluice doctor` names the command that mends it"

    async def _look_at_blobs(self) -> None:
        try:
            await self._blobs.check()
        except StorageUnavailable as error:
            if self._blob_problem is None:
                _log.warning("part_lost", part="blobs", reason=str(error))
            self._blob_problem = error.told
            return
        if self._blob_problem is not None:
            _log.info("part_back", part="blobs")
        self._blob_problem = None
