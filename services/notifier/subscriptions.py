"""How a client begins to follow a batch: with a snapshot, or where it left off, and then with every fact after that.

Whatever the skin, what is said goes into the client's queue, so answer, missed facts and live facts stay in order. The
step from the snapshot to the subscription awaits nothing: no fact can come between them.
"""

from dataclasses import dataclass

from schemas.batch import Batch
from schemas.errors import Code, RequestError
from schemas.ids import is_id
from schemas.position import InvalidPositionError, Position
from services.notifier import messages
from services.notifier.hub import Client, Frame, Hub
from services.notifier.watches import Watches
from services.tail import Tail

SINCE_TIMEOUT_S = 2.0
SUBSCRIPTIONS_MAX = 200


@dataclass(frozen=True, slots=True)
class Subscriptions:
    """Begins and ends what clients follow. The methods raise RequestError for what cannot be done."""

    tail: Tail
    hub: Hub
    watches: Watches

    async def begin(self, client: Client, wish: messages.Subscribe) -> None:
        """Answer the wish and follow it; raises also DatabaseUnavailable where the batch cannot be looked up."""
        if wish.batch_id is None:
            raise RequestError(
                Code.INVALID_REQUEST, "Subscribing to all batches of a user is not offered yet: name a batch_id"
            )
        if len(client.batches) >= SUBSCRIPTIONS_MAX and wish.batch_id not in client.batches:
            raise RequestError(Code.INVALID_REQUEST, f"A connection can follow {SUBSCRIPTIONS_MAX} batches at once")
        if not is_id(wish.batch_id):
            raise _no_batch(wish.batch_id)
        since = await self._reachable(wish.since)
        async with self.watches.find(wish.batch_id) as held:
            batch = held.batch if held is not None else None
            if batch is None or batch.deleted or batch.user_id != client.user_id:
                raise _no_batch(wish.batch_id)
            self._begin(client, batch, since)

    def end(self, client: Client, wish: messages.Unsubscribe) -> None:
        """Answer the wish and follow the batch no more, if it was followed."""
        if wish.batch_id is not None and self.hub.unsubscribe(client, wish.batch_id):
            self.watches.left(wish.batch_id)
        client.put(Frame.of(messages.unsubscribed(wish)))

    def end_all(self, client: Client) -> None:
        """Forget a client that is gone."""
        for batch_id in self.hub.disconnect(client):
            self.watches.left(batch_id)

    def _begin(self, client: Client, batch: Batch, since: Position | None) -> None:
        here = self.tail.position()
        missed = self._missed(client, batch, since)
        if since is None or missed is None:
            snapshot = messages.snapshot(batch, log_id=self.tail.log_id, position=here)
            client.put(Frame.of(snapshot, position=str(here)))
        else:
            begin = since if missed else here
            client.put(Frame.of(messages.resumed(batch_id=batch.id, position=begin), position=str(begin)))
            for frame in missed:
                client.put(frame)
        self.hub.subscribe(client, batch.id)

    async def _reachable(self, text: str | None) -> Position | None:
        """Where the client wants to go on, if this log can say; a place we have not read yet is waited for."""
        if text is None:
            return None
        try:
            since = Position.parse(text)
        except InvalidPositionError as error:
            raise RequestError(Code.INVALID_POSITION, f"since: {error}") from None
        here = self.tail.position()
        if since.log != here.log or dict(since.offsets).keys() != dict(here.offsets).keys():
            return None
        return since if await self.tail.reached(since, SINCE_TIMEOUT_S) else None

    def _missed(self, client: Client, batch: Batch, since: Position | None) -> list[Frame] | None:
        """What came after `since`, if all of it is at hand."""
        after = since.offset(batch.partition) if since is not None else None
        return None if after is None else self.hub.missed(client, batch.id, after=after)


def _no_batch(batch_id: str) -> RequestError:
    return RequestError(Code.NOT_FOUND, f"There is no batch {batch_id:.64}")
