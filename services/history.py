"""A batch's past: its facts in log order with what each did, and the batch as it was at any of them.

`Past` knows what the read models know: their index `batch_events` says where a batch's facts are, when each was
appended and why it was ignored; Kafka has the facts. That suffices to fold exactly as everybody did: an ignored fact
does nothing, and an effective one of a worker names the epoch it was effective under. `History` adds what the tail has
beyond the read models, and who may see it.
"""

import contextlib
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from schemas.batch import Batch, Changed, Ignored, Upload
from schemas.errors import Code, RequestError
from schemas.events import Fact, decode
from schemas.ids import is_id, partition_of
from schemas.position import Position
from services.database import Database
from services.eventlog import Log, LogUnavailable, records_at
from services.folding import Held
from services.tail import Tail

SILENCE_MAX_S = 10.0
END_TIMEOUT_S = 2.0
OFFSET_MAX = 2**62
"""Above every offset, and still a bigint of Postgres when one is added."""


@dataclass(frozen=True, slots=True)
class PastFact:
    """A fact as it stands in a batch's history. `ignored`: why it had no effect, None where it had; `time_ms`: when it
    was appended, the running maximum of its partition."""

    fact: Fact
    time_ms: int
    ignored: Ignored | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the index says of one fact."""

    offset: int
    time_ms: int
    ignored: Ignored | None


class Past:
    """What the read models know of the past. The methods raise DatabaseUnavailable, LogUnavailable, LogRefused."""

    def __init__(self, *, log: Log, log_id: str, database: Database) -> None:
        self._log = log
        self._log_id = log_id
        self._database = database

    async def entries(self, batch_id: str, *, after: int, before: int = OFFSET_MAX, limit: int) -> list[_Entry]:
        """The index of a batch's facts between two offsets (both excluded), at most `limit` of them."""
        rows = await self._database.read(
            "SELECT record_offset, time_ms, ignored FROM {generation}.batch_events "
            "WHERE batch_id = $1 AND record_offset > $2 AND record_offset < $3 ORDER BY record_offset LIMIT $4",
            batch_id,
            after,
            before,
            limit,
        )
        return [
            _Entry(row["record_offset"], row["time_ms"], Ignored(row["ignored"]) if row["ignored"] else None)
            for row in rows
        ]

    async def facts(self, partition: int, entries: Sequence[_Entry]) -> AsyncGenerator[PastFact]:
        """The facts of these entries, in order."""
        by_offset = {entry.offset: entry for entry in entries}
        places = [(partition, offset) for offset in by_offset]
        async with contextlib.aclosing(records_at(self._log, places, silence_max_s=SILENCE_MAX_S)) as records:
            async for record in records:
                fact, entry = decode(record), by_offset[record.offset]
                assert isinstance(fact, Fact), "what cannot be decoded has no place in the index"
                yield PastFact(fact, entry.time_ms, entry.ignored)

    async def before(self, batch_id: str, offset: int) -> Held:
        """The batch as it was before this offset, which the read models must include."""
        held = Held(batch_id, None, {}, folded_to=0)
        entries = await self.entries(batch_id, after=-1, before=offset, limit=OFFSET_MAX)
        effective = [entry for entry in entries if entry.ignored is None]
        async with contextlib.aclosing(self.facts(partition_of(batch_id), effective)) as facts:
            async for past in facts:
                refold(held, past, log_id=self._log_id)
        held.folded_to = offset
        return held


class History:
    """The past of batches, up to where the tail has read. Besides what each method says, they raise
    DatabaseUnavailable, LogUnavailable and LogRefused."""

    def __init__(self, *, past: Past, tail: Tail) -> None:
        self._past = past
        self._tail = tail

    async def events(self, batch_id: str, *, user_id: str, after: int | None = None, limit: int) -> list[PastFact]:
        """The batch's next facts after an offset of its partition (None: from its first one), ignored ones included.

        Fewer than `limit` are the last ones there are. Raises RequestError(NOT_FOUND) for a batch that is unknown,
        deleted or another user's.
        """
        async with self._present(batch_id, user_id):
            return [past async for past in self._facts(batch_id, after=-1 if after is None else after, limit=limit)]

    async def state_at(
        self, batch_id: str, *, user_id: str, at: Position | int
    ) -> tuple[Batch, dict[str, Upload], Position]:
        """The batch and its uploads as they were at a position, or at a time in milliseconds since 1970 UTC (all
        facts up to and including it), and the position of the newest fact included. They are the caller's own.

        Raises RequestError: NOT_FOUND also where the batch did not exist yet, POSITION_OF_ANOTHER_LOG, and
        PROJECTION_BEHIND for a position that this service has not read yet.
        """
        if isinstance(at, Position):
            await self._check_reached(at)
        partition = partition_of(batch_id) if is_id(batch_id) else 0
        upto, upto_ms = (_offset_of(at, partition), OFFSET_MAX) if isinstance(at, Position) else (OFFSET_MAX, at)
        then = Held(batch_id, None, {}, folded_to=0)
        async with self._present(batch_id, user_id) as now:
            assert now.batch is not None
            if now.batch.offset <= upto and now.batch.updated_ms <= upto_ms:
                then = Held(batch_id, copy.copy(now.batch), {i: copy.copy(u) for i, u in now.uploads.items()}, 0)
            else:
                facts = self._facts(batch_id, before=upto + 1, upto_ms=upto_ms, effective=True)
                async with contextlib.aclosing(facts):
                    async for past in facts:
                        refold(then, past, log_id=self._tail.log_id)
        if then.batch is None:
            raise RequestError(Code.NOT_FOUND, f"the batch {batch_id} did not exist then")
        return then.batch, then.uploads, Position.of(self._tail.log_id, {partition: then.batch.offset})

    async def replayed(
        self, batch_id: str, *, after: int, upto: int, facts_max: int
    ) -> AsyncGenerator[tuple[PastFact, Batch]]:
        """The effective facts after one offset up to another, each with its batch right after it (live: copy what you
        keep); of a deleted batch, too. Raises RequestError(NOT_FOUND) for an unknown one, and TooMuchPastError where
        more than `facts_max` facts would have to be folded."""
        async with self._tail.hold(batch_id) as held:
            if held is None:
                raise _no_batch(batch_id)
            then = Held(batch_id, None, {}, folded_to=0)
            facts = self._facts(batch_id, before=upto + 1, effective=True, facts_max=facts_max)
            async with contextlib.aclosing(facts):
                async for past in facts:
                    refold(then, past, log_id=self._tail.log_id)
                    if past.fact.offset > after:
                        assert then.batch is not None
                        yield past, then.batch

    @contextlib.asynccontextmanager
    async def _present(self, batch_id: str, user_id: str) -> AsyncIterator[Held]:
        """The batch as it is now, if this user may see it: what nobody heard of is waited for up to the log's end."""
        if not is_id(batch_id):
            raise _no_batch(batch_id)
        async with self._tail.hold(batch_id) as first:
            if first is None and not await self._tail.reached_end(END_TIMEOUT_S):
                raise LogUnavailable(f"{batch_id} is not known here, and the log cannot be read to its end; ask again")
            async with self._tail.hold(batch_id) as held:
                if held is None or held.batch is None or held.batch.deleted or held.batch.user_id != user_id:
                    raise _no_batch(batch_id)
                yield held

    async def _facts(
        self,
        batch_id: str,
        *,
        after: int = -1,
        before: int = OFFSET_MAX,
        upto_ms: int = OFFSET_MAX,
        limit: int = OFFSET_MAX,
        effective: bool = False,
        facts_max: int = OFFSET_MAX - 1,
    ) -> AsyncGenerator[PastFact]:
        """A held batch's facts within these bounds: those in the index, and then what the tail has read so far beyond
        it. The tail is asked first, so that the two may overlap and nothing is between them."""
        self._tail.check_whole()
        kept = self._tail.unprojected_of(batch_id)
        recent = [PastFact(k.fact, k.time_ms, k.ignored) for k in kept if after < k.fact.offset < before]
        entries = await self._past.entries(batch_id, after=after, before=before, limit=min(limit, facts_max + 1))
        indexed_to = entries[-1].offset if entries else after
        beyond = [past for past in recent if past.fact.offset > indexed_to]
        if len(entries) + len(beyond) > facts_max:
            raise TooMuchPastError(f"the batch {batch_id} has more than {facts_max} facts")
        wanted = [entry for entry in entries if entry.time_ms <= upto_ms and not (effective and entry.ignored)]
        async with contextlib.aclosing(self._past.facts(partition_of(batch_id), wanted)) as facts:
            async for past in facts:
                yield past
        for past in beyond[: limit - len(entries)]:
            if past.time_ms <= upto_ms and not (effective and past.ignored):
                yield past

    async def _check_reached(self, at: Position) -> None:
        here = self._tail.position()
        if at.log != here.log:
            raise RequestError(
                Code.POSITION_OF_ANOTHER_LOG, f"the position is of the log {at.log}, this is the log {here.log}"
            )
        if not here.includes(at) and not await self._tail.reached(at, END_TIMEOUT_S):
            raise RequestError(
                Code.PROJECTION_BEHIND, f"the log was read up to {self._tail.position()}, not yet to {at}; ask again"
            )


class TooMuchPastError(Exception):
    """More facts would have to be read again than is worth it."""


def refold(held: Held, past: PastFact, *, log_id: str) -> None:
    """Fold an effective fact of the past: if it names an epoch, that was the lane's, or it would have been ignored."""
    assert past.ignored is None
    epoch: int | None = getattr(past.fact.event, "epoch", None)
    outcome = held.fold(past.fact, log_id=log_id, epoch=epoch, time_ms=past.time_ms)
    assert isinstance(outcome, Changed), f"{past.fact.partition}-{past.fact.offset} was effective, and is {outcome} now"


def _offset_of(at: Position, partition: int) -> int:
    offset = at.offset(partition)
    return -1 if offset is None else offset


def _no_batch(batch_id: str) -> RequestError:
    return RequestError(Code.NOT_FOUND, f"there is no batch {batch_id:.64}")
