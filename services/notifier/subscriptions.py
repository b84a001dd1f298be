"""How a client begins to follow a batch, or all of its user's: with a snapshot, or where it left off, and then with
every fact after that.

Whatever the skin, what is said goes into the client's queue, so answer, missed facts and live facts stay in order. What
was missed comes from the hub, and what the hub has let go of from the history. The last step, from the snapshot or the
newest missed fact to the subscription, awaits nothing: no fact can come between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from schemas.batch import Batch
from schemas.errors import Code, RequestError
from schemas.ids import is_id
from schemas.position import InvalidPositionError, Position
from services.database import DatabaseUnavailable
from services.eventlog import LogIdentity
from services.faults import reach
from services.notifier import messages
from services.notifier.followings import Followings
from services.notifier.hub import Client, Frame, Hub
from services.notifier.replays import Replays
from services.notifier.watches import Watches
from services.tail import Held, Tail

SINCE_TIMEOUT_S = 2.0
SUBSCRIPTIONS_MAX = 200
REPLAYS_MAX = 5
"""How often the history is read on because the hub let go of facts that came meanwhile."""


@dataclass(frozen=True, slots=True)
class Subscriptions:
    """Begins and ends what clients follow. The methods raise RequestError for what cannot be done."""

    tail: Tail
    identity: LogIdentity
    hub: Hub
    watches: Watches
    followings: Followings
    replays: Replays

    async def begin(self, client: Client, wish: messages.Subscribe) -> None:
        """Answer the wish and follow it; raises also DatabaseUnavailable where something must be looked up."""
        if wish.batch_id is None:
            await self._begin_user(client, await self._reachable(wish.since))
            return
        if len(client.batches) >= SUBSCRIPTIONS_MAX and wish.batch_id not in client.batches:
            raise RequestError(Code.INVALID_REQUEST, f"A connection can follow {SUBSCRIPTIONS_MAX} batches at once")
        if not is_id(wish.batch_id):
            raise _no_batch(wish.batch_id)
        await self._begin_batch(client, wish.batch_id, await self._reachable(wish.since))

    def end(self, client: Client, wish: messages.Unsubscribe) -> None:
        """Answer the wish and follow no more, if it was followed."""
        assert client.user_id is not None
        if wish.batch_id is None:
            if self.hub.unsubscribe_user(client):
                self.followings.left(client.user_id)
        elif self.hub.unsubscribe(client, wish.batch_id):
            self.watches.left(wish.batch_id)
        client.put(Frame.of(messages.unsubscribed(wish)))

    def end_all(self, client: Client) -> None:
        """Forget a client that is gone."""
        for batch_id in self.hub.disconnect(client):
            self.watches.left(batch_id)
        if client.user_id is not None:
            self.followings.left(client.user_id)

    # One batch

    async def _begin_batch(self, client: Client, batch_id: str, since: Position | None) -> None:
        async with self.watches.find(batch_id) as held:
            batch = self._visible(client, held, batch_id)
            missed = None if since is None else await self._missed(client, batch, since)
            batch = self._visible(client, held, batch_id)
            here = self.tail.position()
            if since is None or missed is None:
                snapshot = messages.snapshot(batch, log_id=self.tail.log_id, position=here)
                client.put(Frame.of(snapshot, position=str(here)))
                reach("notifier.after_snapshot")
            else:
                begin = since if missed else here
                client.put(Frame.of(messages.resumed(batch_id=batch_id, position=begin), position=str(begin)))
                self._tell_missed(client, missed, since)
                here = since
            after = here.offset(batch.partition)
            self.hub.subscribe(client, batch_id, after=-1 if after is None else after)

    async def _missed(self, client: Client, batch: Batch, since: Position) -> list[Frame] | None:
        """What came after `since`, if that is not too much. Awaits nothing after it looked for the newest."""
        replayed: list[Frame] = []
        for _ in range(REPLAYS_MAX):
            after = since.offset(batch.partition)
            assert after is not None
            if not self.hub.watches(batch.id):
                return None
            if (newest := self.hub.missed(client, batch.id, after=after)) is not None:
                return self._if_it_fits([*client.untold(replayed), *newest])
            upto = since.at(batch.partition, self.tail.position().offset(batch.partition) or 0)
            older = await self.replays.of_batch(batch.id, since=since, upto=upto, bytes_max=self.hub.replay_bytes_max)
            if older is None:
                return None
            replayed, since = [*replayed, *older], upto
        return None

    def _visible(self, client: Client, held: Held | None, batch_id: str) -> Batch:
        """The batch as it is now: deleted or read anew, perhaps, since it was found."""
        batch = held.batch if held is not None else None
        if batch is None or batch.deleted or batch.user_id != client.user_id:
            raise _no_batch(batch_id)
        return batch

    # All batches of the user

    async def _begin_user(self, client: Client, since: Position | None) -> None:
        assert client.user_id is not None
        async with self.followings.find(client.user_id):
            missed = None if since is None else await self._missed_of_user(client, client.user_id, since)
            if since is None or missed is None:
                batches, truncated = await self.followings.batches(client.user_id)
                here = self.tail.position()
                client.put(self._snapshot_of_user(batches, here, truncated=truncated))
            else:
                begin = since if missed else self.tail.position()
                client.put(Frame.of(messages.user_resumed(position=begin), position=str(begin)))
                self._tell_missed(client, missed, since)
                here = since
            self.hub.subscribe_user(client, after=dict(here.offsets))

    def _snapshot_of_user(self, batches: Sequence[Batch], here: Position, *, truncated: bool) -> Frame:
        """These batches as they are here: all, the unfinished ones, or as many of these, newest first, as are not too
        much for one message."""
        shown = batches
        while True:
            is_part = truncated or len(shown) < len(batches)
            text = messages.user_snapshot(shown, truncated=is_part, log_id=self.tail.log_id, position=here)
            frame = Frame.of(text, position=str(here))
            if frame.size_bytes <= self.hub.replay_bytes_max or not shown:
                return frame
            unfinished = [batch for batch in shown if not batch.ended]
            shown = unfinished if len(unfinished) < len(shown) else shown[: len(shown) // 2]

    async def _missed_of_user(self, client: Client, user_id: str, since: Position) -> list[Frame] | None:
        """As `_missed`, of all its user's batches."""
        replayed: list[Frame] = []
        for _ in range(REPLAYS_MAX):
            self._check_followed(user_id)
            if (newest := self.hub.missed_of_user(client, after=dict(since.offsets))) is not None:
                return self._if_it_fits([*client.untold(replayed), *newest])
            upto = self.tail.position()
            older = await self.replays.of_user(user_id, since=since, upto=upto, bytes_max=self.hub.replay_bytes_max)
            if older is None:
                self._check_followed(user_id)
                return None
            replayed, since = [*replayed, *older], upto
        return None

    def _check_followed(self, user_id: str) -> None:
        if not self.hub.watches_user(user_id):
            raise DatabaseUnavailable("following all batches was broken off just now; subscribe again")

    # Positions

    async def _reachable(self, text: str | None) -> Position | None:
        """Where the client wants to go on, if this log can say; a place we have not read yet is waited for."""
        if text is None:
            return None
        try:
            since = self.identity.here(Position.parse(text))
        except InvalidPositionError as error:
            raise RequestError(Code.INVALID_POSITION, f"since: {error}") from None
        here = self.tail.position()
        if since.log != here.log or dict(since.offsets).keys() != dict(here.offsets).keys():
            return None
        return since if await self.tail.reached(since, SINCE_TIMEOUT_S) else None

    def _if_it_fits(self, missed: list[Frame]) -> list[Frame] | None:
        """A client that was told more than may wait for it would be closed as too slow, again and again."""
        return missed if sum(frame.size_bytes for frame in missed) <= self.hub.replay_bytes_max else None

    def _tell_missed(self, client: Client, missed: Sequence[Frame], since: Position) -> None:
        for frame in missed:
            client.put(_not_before(frame, since))
        reach("notifier.after_replay")


def _not_before(frame: Frame, since: Position) -> Frame:
    """The frame with a position that includes what its client has seen: this notifier may have read the partitions
    in another order than the one that the client was told by before."""
    assert frame.position is not None
    position = Position.parse(frame.position)
    if position.includes(since):
        return frame
    seen = dict(since.offsets)
    merged = str(Position.of(position.log, {n: max(offset, seen.get(n, -1)) for n, offset in position.offsets}))
    return replace(frame, text=frame.text.replace(frame.position, merged, 1), position=merged)


def _no_batch(batch_id: str) -> RequestError:
    return RequestError(Code.NOT_FOUND, f"There is no batch {batch_id:.64}")
