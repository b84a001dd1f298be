"""What clients missed that is not kept in memory any more, read again from the history and encoded anew.

Frames come in log order within a partition, one partition after the other; each carries a position that includes all
frames before it and no other fact that was missed, so a client that is cut anywhere goes on there. What would be too
much, or cannot be read now, is None: a snapshot says it all in less.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from schemas.errors import RequestError
from schemas.ids import partition_of
from schemas.position import Position
from services.database import Database, DatabaseUnavailable
from services.eventlog import LogError
from services.history import History, TooMuchPastError
from services.notifier import messages
from services.notifier.hub import Frame
from services.observability import logger
from services.tail import Tail

_log = logger("notifier")

FACTS_MAX = 20_000
BATCHES_MAX = 500
AT_ONCE_MAX = 4


@dataclass(frozen=True, slots=True)
class Replays:
    """See the module's text. `since` and `upto` name every partition; facts after the one up to the other are told."""

    tail: Tail
    history: History
    database: Database
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE_MAX))

    async def of_batch(self, batch_id: str, *, since: Position, upto: Position, bytes_max: int) -> list[Frame] | None:
        """What was told of this batch. `upto` goes beyond `since` in its partition only."""
        return await self._of([batch_id], since, upto, bytes_max)

    async def of_user(self, user_id: str, *, since: Position, upto: Position, bytes_max: int) -> list[Frame] | None:
        """What was told of all batches of this user, who is followed."""
        try:
            batch_ids = await self._changed(user_id, since)
        except DatabaseUnavailable:
            return None
        return await self._of(batch_ids, since, upto, bytes_max) if len(batch_ids) <= BATCHES_MAX else None

    async def _of(
        self, batch_ids: Sequence[str], since: Position, upto: Position, bytes_max: int
    ) -> list[Frame] | None:
        frames: list[Frame] = []
        facts_left = FACTS_MAX
        try:
            async with self._turns:
                for batch_id in batch_ids:
                    told = await self._one(batch_id, since, upto, facts_max=facts_left)
                    facts_left -= len(told)
                    bytes_max -= sum(frame.size_bytes for frame in told)
                    if bytes_max < 0:
                        return None
                    frames += told
        except TooMuchPastError:
            return None
        except (DatabaseUnavailable, LogError, RequestError) as error:
            _log.warning("replay_not_possible", reason=str(error))
            return None
        return sorted(frames, key=lambda frame: (frame.partition, frame.offset))

    async def _one(self, batch_id: str, since: Position, upto: Position, *, facts_max: int) -> list[Frame]:
        partition = partition_of(batch_id)
        after, last = since.offset(partition), upto.offset(partition)
        assert after is not None
        assert last is not None
        frames = []
        async for past, batch in self.history.replayed(batch_id, after=after, upto=last, facts_max=facts_max):
            position = _between(since, upto, partition, past.fact.offset)
            text = messages.event(past.fact, time_ms=past.time_ms, position=position, batch=batch)
            frames.append(
                Frame.of(text, position=str(position), partition=partition, offset=past.fact.offset, batch_id=batch_id)
            )
        return frames

    async def _changed(self, user_id: str, since: Position) -> list[str]:
        """The user's batches with an effective fact after `since`, deleted ones too."""
        rows = await self.database.read(
            "SELECT batch.id FROM unnest($2::integer[], $3::bigint[]) AS since (partition, record_offset) JOIN ("
            "SELECT id, partition, last_offset FROM {generation}.upload_batches WHERE user_id = $1 UNION ALL "
            "SELECT id, partition, deleted_offset FROM {generation}.deleted_batches WHERE user_id = $1"
            ") AS batch ON batch.partition = since.partition AND batch.last_offset > since.record_offset LIMIT $4",
            user_id,
            *(list(column) for column in zip(*since.offsets, strict=True)),
            BATCHES_MAX + 1,
        )
        held = [batch for batch in self.tail.held_of(user_id) if batch.offset > (since.offset(batch.partition) or -1)]
        return sorted({*(row["id"] for row in rows), *(batch.id for batch in held)})


def _between(since: Position, upto: Position, partition: int, offset: int) -> Position:
    """Where a client is after this fact: through with the partitions before, not begun with those after."""
    return Position.of(
        since.log,
        {
            number: last if number < partition else before
            for (number, before), (_, last) in zip(since.offsets, upto.offsets, strict=True)
        }
        | {partition: offset},
    )
