"""How the api is, in sentences: what is away and why, looked at in the background and true again by itself.

Two questions, two answers. `problems` (for /readyz) is what this api cannot do without; `degraded` (for /v1/status)
also tells what users notice though every api is well: read models that nobody moves. An api whose processor is down
takes files and answers questions all the same, so that is no reason to send nobody there.
"""

import asyncio
import time

from schemas.position import Position
from services.auth import Authenticator
from services.blobs import BlobStore, StorageUnavailable
from services.observability import logger
from services.tail import Tail

_log = logger("api")

LOOK_INTERVAL_S = 1.0
STALLED_AFTER_S = 5.0


class Health:
    """See the module's text. `watch` must run for it to be true. `lag_max_s`: a tail further behind is a problem."""

    def __init__(self, *, tail: Tail, authenticator: Authenticator, blobs: BlobStore, lag_max_s: float) -> None:
        self._tail = tail
        self._authenticator = authenticator
        self._blobs = blobs
        self._lag_max_s = lag_max_s
        self._blob_problem: str | None = None
        self._projection = Standstill()

    def problems(self) -> list[str]:
        """Why this api cannot do all it should; empty when it can."""
        log_problem = self._tail.log_problem
        found = [f"the log cannot be read: {each}" if each == log_problem else each for each in self._tail.problems()]
        found += self._authenticator.problems()
        if log_problem is None and (lag_s := self._tail.lag_s()) > self._lag_max_s:
            found.append(f"the log was last read to its end {lag_s:.0f} s ago, so nothing is written")
        if self._blob_problem is not None:
            found.append(self._blob_problem)
        return found

    def degraded(self) -> list[str]:
        """Why the service as a whole does not do all it should, as far as it is seen from here."""
        found = self.problems()
        waiting = self._tail.unprojected()
        if self._tail.full:
            found.append(f"{waiting} facts wait for the read models, so nothing more is written until these move")
        elif not found and (still_s := self._look_at_projection()) > STALLED_AFTER_S:
            found.append(
                f"no processor works: for {still_s:.0f} s, {waiting} facts have waited for the read models; files are "
                "taken, and worked once it is back"
            )
        return found

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self._look_at_blobs()
            self._look_at_projection()
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _look_at_projection(self) -> float:
        return self._projection.look(
            self._tail.projected(), waiting=self._tail.unprojected() > 0, now_s=time.monotonic()
        )

    async def _look_at_blobs(self) -> None:
        try:
            await self._blobs.check()
        except StorageUnavailable as error:
            if self._blob_problem is None:
                _log.warning("part_lost", part="blobs", reason=str(error))
            self._blob_problem = str(error)
            return
        if self._blob_problem is not None:
            _log.info("part_back", part="blobs")
        self._blob_problem = None


class Standstill:
    """For how long the read models have stood still while facts waited for them."""

    def __init__(self) -> None:
        self._seen: Position | None = None
        self._since_s: float | None = None

    def look(self, projected: Position, *, waiting: bool, now_s: float) -> float:
        """Seconds since they last moved or had nothing to do, as of the looks so far."""
        if not waiting:
            self._since_s = None
        elif self._since_s is None or projected != self._seen:
            self._since_s = now_s
        self._seen = projected
        return 0.0 if self._since_s is None else now_s - self._since_s
