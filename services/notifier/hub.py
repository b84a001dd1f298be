"""Who is told what: batches being watched, the clients that watch them, and what waits for each client.

Pure: no socket, no clock (times are passed in), nothing to await; a client's `wake` says that something waits for it.
Subscriptions are indexed by batch and never scanned, and a frame is encoded by its maker once, so telling one more
client costs one append. Facts are never dropped: a client whose queue is full is closed, with its last position.
Percentages are: of each upload only the latest waits, at most one per `progress_pause_s`, and a fact about the upload
overtakes it. What was told recently is kept, within `history_bytes_max`, for clients that come back.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

TOO_SLOW = 4008
_REASON_BYTES_MAX = 123
"""What a WebSocket close frame has room for (RFC 6455, section 5.5)."""


class TooManyConnectionsError(Exception):
    """One more connection than the settings allow; the message says which limit."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message, encoded. `position`: where the log is after it; None for what is no fact.

    `offset`: the fact's own, in the partition of its batch.
    """

    text: str
    size_bytes: int
    position: str | None = None
    offset: int = -1

    @classmethod
    def of(cls, text: str, *, position: str | None = None, offset: int = -1) -> Self:
        return cls(text, len(text.encode()), position, offset)


@dataclass(frozen=True, slots=True)
class Close:
    """That a connection must end: the WebSocket close code, and a reason of at most 123 bytes."""

    code: int
    reason: str

    @classmethod
    def of(cls, code: int, reason: str) -> Self:
        """With as much of the reason as there is room for."""
        return cls(code, reason.encode()[:_REASON_BYTES_MAX].decode(errors="ignore"))


@dataclass(frozen=True, slots=True)
class HubLimits:
    """`client_*`: what may wait for one client; `progress_pause_s`: least time between two percentages of an upload."""

    clients_max: int
    clients_per_user_max: int
    client_bytes_max: int
    client_frames_max: int
    history_bytes_max: int
    progress_pause_s: float = 0.1


class Client:
    """One connection and what waits for it. `close` is set once it has to end, and nothing waits any more then."""

    __slots__ = (
        "_limits",
        "_percentages",
        "_queue",
        "_wake",
        "batches",
        "close",
        "position",
        "queued_bytes",
        "user_id",
    )

    def __init__(self, *, limits: HubLimits, wake: Callable[[], None]) -> None:
        self.user_id: str | None = None
        self.batches: set[str] = set()
        self.close: Close | None = None
        self.position: str | None = None
        """That of the last message taken which has one: where a client that is closed goes on from."""
        self.queued_bytes = 0
        self._queue: deque[Frame] = deque()
        self._percentages: dict[str, Frame] = {}
        self._limits = limits
        self._wake = wake

    @property
    def waiting(self) -> bool:
        return bool(self._queue or self._percentages)

    def put(self, frame: Frame) -> None:
        """Queue a frame that must arrive; a client that has no room for it is closed as too slow."""
        if self.close is not None:
            return
        self._queue.append(frame)
        self.queued_bytes += frame.size_bytes
        if self.queued_bytes > self._limits.client_bytes_max or len(self._queue) > self._limits.client_frames_max:
            self.end_too_slow()
        else:
            self._wake()

    def put_percentage(self, upload_id: str, frame: Frame) -> None:
        """Queue a frame that the next one of this upload replaces."""
        if self.close is None:
            self._percentages[upload_id] = frame
            self._wake()

    def forget_percentage(self, upload_id: str) -> None:
        self._percentages.pop(upload_id, None)

    def take(self, *, bytes_max: int) -> list[Frame]:
        """The next frames to send, facts first, up to about `bytes_max` together (but at least one)."""
        taken = self._take_facts(bytes_max)
        self.position = next((frame.position for frame in reversed(taken) if frame.position), self.position)
        if not self._queue and self._percentages:
            taken += self._percentages.values()
            self._percentages.clear()
        return taken

    def _take_facts(self, bytes_max: int) -> list[Frame]:
        if self.queued_bytes <= bytes_max:
            taken, self.queued_bytes = list(self._queue), 0
            self._queue.clear()
            return taken
        taken = [self._queue.popleft()]
        room_bytes = bytes_max - taken[0].size_bytes
        while self._queue and self._queue[0].size_bytes <= room_bytes:
            taken.append(self._queue.popleft())
            room_bytes -= taken[-1].size_bytes
        self.queued_bytes -= bytes_max - room_bytes
        return taken

    def end_too_slow(self) -> None:
        """Have the connection closed because its client does not keep up."""
        self.end(Close(TOO_SLOW, _too_slow(self.position)))

    def end(self, close: Close) -> None:
        """Have the connection closed; the first reason given stays."""
        if self.close is None:
            self.close = close
            self._queue.clear()
            self._percentages.clear()
            self.queued_bytes = 0
            self._wake()


def _too_slow(position: str | None) -> str:
    reason = f"too slow, go on with since={position}" if position else "too slow"
    return reason if len(reason) <= _REASON_BYTES_MAX else "too slow, go on with the last position you have"


@dataclass(slots=True)
class _Percentage:
    """The pace of one upload: when it was last told, and what waits until it may be told again."""

    told_s: float
    waiting: Frame | None = None


@dataclass(slots=True, eq=False)
class _Watched:
    """A batch that is watched. `recent` holds every effective fact after offset `floor`; the older ones are gone."""

    floor: int
    clients: set[Client] = field(default_factory=set)
    recent: deque[Frame] = field(default_factory=deque)
    percentages: dict[str, _Percentage] = field(default_factory=dict)


class Hub:
    """The fan-out of one notifier.

    A batch is watched from `watch` to `forget`; in between clients come and go, and `tell` is given each of its
    effective facts once, in log order.
    """

    def __init__(self, limits: HubLimits) -> None:
        self._limits = limits
        self._clients: set[Client] = set()
        self._of_user: dict[str, int] = {}
        self._watched: dict[str, _Watched] = {}
        self._history: deque[_Watched] = deque()
        """One entry for each frame in a `recent`, oldest first: who gives up a frame next."""
        self._history_bytes = 0
        self._paced: set[tuple[str, str]] = set()
        """Batch and upload of each percentage that waits for its time."""

    def connect(self, *, wake: Callable[[], None]) -> Client:
        """Take one more client, whose user is not known yet. Raises TooManyConnectionsError."""
        if len(self._clients) >= self._limits.clients_max:
            raise TooManyConnectionsError(f"{self._limits.clients_max} connections are open, no more are taken")
        client = Client(limits=self._limits, wake=wake)
        self._clients.add(client)
        return client

    def identify(self, client: Client, user_id: str) -> None:
        """Say who the client is. Raises TooManyConnectionsError."""
        assert client.user_id is None, f"the client is {client.user_id} already"
        if self._of_user.get(user_id, 0) >= self._limits.clients_per_user_max:
            raise TooManyConnectionsError(f"this user has {self._limits.clients_per_user_max} connections open")
        client.user_id = user_id
        self._of_user[user_id] = self._of_user.get(user_id, 0) + 1

    def disconnect(self, client: Client) -> list[str]:
        """Forget a client; the batches that nobody watches any more."""
        self._clients.remove(client)
        if client.user_id is not None:
            self._of_user[client.user_id] -= 1
            if not self._of_user[client.user_id]:
                del self._of_user[client.user_id]
        return [batch_id for batch_id in list(client.batches) if self.unsubscribe(client, batch_id)]

    def watch(self, batch_id: str, *, floor: int) -> None:
        """Begin to keep what is told of this batch. `floor`: the offset of its newest effective fact."""
        assert batch_id not in self._watched, f"batch {batch_id} is watched already"
        self._watched[batch_id] = _Watched(floor)

    def watches(self, batch_id: str) -> bool:
        return batch_id in self._watched

    def watched_by(self, batch_id: str) -> int:
        """How many clients watch it."""
        return len(self._watched[batch_id].clients)

    def forget(self, batch_id: str) -> None:
        """End the watch and with it the subscriptions that are left; what was kept ages out of the history."""
        watched = self._watched.pop(batch_id)
        for client in watched.clients:
            client.batches.discard(batch_id)
        self._paced -= {(batch_id, upload_id) for upload_id in watched.percentages}

    def subscribe(self, client: Client, batch_id: str) -> None:
        """Tell this client every fact of this watched batch from now on, once however often it asks."""
        self._watched[batch_id].clients.add(client)
        client.batches.add(batch_id)

    def unsubscribe(self, client: Client, batch_id: str) -> bool:
        """Tell it no more; whether that was the batch's last client."""
        client.batches.discard(batch_id)
        watched = self._watched.get(batch_id)
        if watched is None or client not in watched.clients:
            return False
        watched.clients.remove(client)
        return not watched.clients

    def missed(self, client: Client, batch_id: str, *, after: int) -> list[Frame] | None:
        """What this client has not been told of a watched batch since offset `after`; None where that is not all
        at hand. One that is subscribed already has been told all."""
        if batch_id in client.batches:
            return []
        watched = self._watched[batch_id]
        if after < watched.floor:
            return None
        return [frame for frame in watched.recent if frame.offset > after]

    def tell(self, batch_id: str, frame: Frame, *, upload_id: str | None) -> None:
        """Queue an effective fact for all who watch its batch. `upload_id`: the upload it is about, None for all."""
        watched = self._watched[batch_id]
        for outdated_id in [upload_id] if upload_id else watched.percentages:
            self._outdate(watched, batch_id, outdated_id)
        for client in watched.clients:
            client.put(frame)
        self._remember(watched, frame)

    def tell_percentage(self, batch_id: str, upload_id: str, frame: Frame, *, now_s: float) -> None:
        """Queue how far an upload is, or let it wait (see `tell_due`) where the last one is not long enough ago."""
        watched = self._watched[batch_id]
        pace = watched.percentages.get(upload_id)
        if pace is not None and now_s < pace.told_s + self._limits.progress_pause_s:
            pace.waiting = frame
            self._paced.add((batch_id, upload_id))
            return
        watched.percentages[upload_id] = _Percentage(told_s=now_s)
        self._paced.discard((batch_id, upload_id))
        for client in watched.clients:
            client.put_percentage(upload_id, frame)

    def tell_due(self, *, now_s: float) -> bool:
        """Queue the percentages whose time has come; whether others still wait for theirs."""
        for batch_id, upload_id in list(self._paced):
            pace = self._watched[batch_id].percentages[upload_id]
            assert pace.waiting is not None
            if now_s >= pace.told_s + self._limits.progress_pause_s:
                self.tell_percentage(batch_id, upload_id, pace.waiting, now_s=now_s)
        return bool(self._paced)

    def _outdate(self, watched: _Watched, batch_id: str, upload_id: str) -> None:
        """A fact overtook the percentages of this upload; its pace goes on."""
        pace = watched.percentages.get(upload_id)
        if pace is None:
            return
        pace.waiting = None
        self._paced.discard((batch_id, upload_id))
        for client in watched.clients:
            client.forget_percentage(upload_id)

    def _remember(self, watched: _Watched, frame: Frame) -> None:
        watched.recent.append(frame)
        self._history.append(watched)
        self._history_bytes += frame.size_bytes
        while self._history_bytes > self._limits.history_bytes_max:
            oldest = self._history.popleft()
            dropped = oldest.recent.popleft()
            oldest.floor = dropped.offset
            self._history_bytes -= dropped.size_bytes
