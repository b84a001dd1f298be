"""Who is told what: batches and users that are watched, the clients that do, and what waits for each client.

Pure: no socket, no clock (times are passed in), nothing to await; a client's `wake` says that something waits for it.
Subscriptions are indexed by batch and user and never scanned, and a frame is encoded by its maker once, so telling one
more client costs one append. Facts are never dropped: a client whose queue is full is closed, with its last position.
Percentages are: of each upload only the latest waits, at most one per `progress_pause_s`, and a fact about the upload
overtakes it. What was told recently is kept, within `history_bytes_max`, for clients that come back.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

TOO_SLOW = 4008
PACED_UPLOADS_MAX = 1_000
_REASON_BYTES_MAX = 123
"""What a WebSocket close frame has room for (RFC 6455, section 5.5)."""


class TooManyConnectionsError(Exception):
    """One more connection than the settings allow; the message says which limit."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message, encoded. `position`: where the log is after it; None for what is no fact.

    `partition` and `offset`: the fact's own; `batch_id`: what it is about.
    """

    text: str
    size_bytes: int
    position: str | None = None
    partition: int = 0
    offset: int = -1
    batch_id: str = ""

    @classmethod
    def of(
        cls, text: str, *, position: str | None = None, partition: int = 0, offset: int = -1, batch_id: str = ""
    ) -> Self:
        return cls(text, len(text.encode()), position, partition, offset, batch_id)


@dataclass(frozen=True, slots=True)
class Close:
    """That a connection must end: the WebSocket close code, and why. `with_position`: its client is told where it goes
    on, which is known only when nothing is sent any more."""

    code: int
    text: str
    with_position: bool = False

    def reason(self, position: str | None) -> str:
        """What a close frame has room for, 123 bytes, to a client that was sent all up to this position."""
        text = self.text
        if self.with_position and position is not None:
            whole = f"{text}, go on with since={position}"
            fits = len(whole.encode()) <= _REASON_BYTES_MAX
            text = whole if fits else f"{text}, go on with the last position you have"
        return text.encode()[:_REASON_BYTES_MAX].decode(errors="ignore")


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
        "follows_user",
        "position",
        "queued_bytes",
        "user_id",
    )

    def __init__(self, *, limits: HubLimits, wake: Callable[[], None]) -> None:
        self.user_id: str | None = None
        self.batches: dict[str, int] = {}
        """Those it follows by themselves, and the offset after which it is told every fact of each."""
        self.follows_user: dict[int, int] | None = None
        """The same of all its user's batches, by partition, if it follows these."""
        self.close: Close | None = None
        self.position: str | None = None
        """That of the last message sent which has one: where a client that is closed goes on from."""
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
        if not self._queue and self._percentages:
            taken += self._percentages.values()
            self._percentages.clear()
        return taken

    def sent(self, frames: Sequence[Frame]) -> None:
        """These are on their way to the client: it misses none of them, whatever happens now."""
        self.position = next((frame.position for frame in reversed(frames) if frame.position), self.position)

    def told_after(self, batch_id: str, partition: int) -> int | None:
        """The offset after which it is told every fact of this batch, by what it follows already; None: it is not."""
        after = self.batches.get(batch_id)
        if self.follows_user is None:
            return after
        of_user = self.follows_user.get(partition, -1)
        return of_user if after is None else min(after, of_user)

    def untold(self, frames: Iterable[Frame]) -> list[Frame]:
        """Those of these facts that it is not told by what it follows already."""
        found = []
        for frame in frames:
            after = self.told_after(frame.batch_id, frame.partition)
            if after is None or frame.offset <= after:
                found.append(frame)
        return found

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
        self.end(Close(TOO_SLOW, "too slow", with_position=True))

    def end(self, close: Close) -> None:
        """Have the connection closed; the first reason given stays."""
        if self.close is None:
            self.close = close
            self._queue.clear()
            self._percentages.clear()
            self.queued_bytes = 0
            self._wake()


@dataclass(slots=True)
class _Percentage:
    """The pace of one upload: when it was last told, and what waits until it may be told again."""

    batch_id: str
    told_s: float
    waiting: Frame | None = None


@dataclass(slots=True, eq=False)
class _Topic:
    """What clients follow: a batch, or a user's batches. `recent` holds every effective fact after the offsets `floor`
    (by partition); the older ones are gone. `told`: the newest offsets there were."""

    floor: dict[int, int]
    told: dict[int, int]
    clients: set[Client] = field(default_factory=set)
    recent: deque[Frame] = field(default_factory=deque)
    percentages: dict[str, _Percentage] = field(default_factory=dict)

    def missed(self, after: Mapping[int, int]) -> list[Frame] | None:
        """The facts after these offsets; None where that is not all at hand."""
        if any(after.get(partition, -1) < floor for partition, floor in self.floor.items()):
            return None
        return [frame for frame in self.recent if frame.offset > after[frame.partition]]


class Hub:
    """The fan-out of one notifier.

    A batch is watched from `watch` to `forget`, a user from `watch_user` to `forget_user`; in between clients come and
    go, and `tell` is given each of their effective facts once, in log order.
    """

    def __init__(self, limits: HubLimits) -> None:
        self._limits = limits
        self._clients: set[Client] = set()
        self._of_user: dict[str, int] = {}
        self._watched: dict[str, _Topic] = {}
        self._users: dict[str, _Topic] = {}
        self._history: deque[_Topic] = deque()
        """One entry for each frame in a `recent`, oldest first: who gives up a frame next."""
        self._history_bytes = 0
        self._paced: set[tuple[_Topic, str]] = set()
        """Topic and upload of each percentage that waits for its time."""

    @property
    def replay_bytes_max(self) -> int:
        """How much a client may be told at once of what it missed: half of what may wait for it."""
        return self._limits.client_bytes_max // 2

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
            self.unsubscribe_user(client)
            self._of_user[client.user_id] -= 1
            if not self._of_user[client.user_id]:
                del self._of_user[client.user_id]
        return [batch_id for batch_id in list(client.batches) if self.unsubscribe(client, batch_id)]

    # Batches

    def watch(self, batch_id: str, *, floor: int, partition: int = 0) -> None:
        """Begin to keep what is told of this batch. `floor`: the offset of its newest effective fact."""
        assert batch_id not in self._watched, f"batch {batch_id} is watched already"
        self._watched[batch_id] = _Topic({partition: floor}, {partition: floor})

    def watches(self, batch_id: str) -> bool:
        return batch_id in self._watched

    def watched_by(self, batch_id: str) -> int:
        """How many clients watch it."""
        return len(self._watched[batch_id].clients)

    def forget(self, batch_id: str) -> None:
        """End the watch and with it the subscriptions that are left; what was kept ages out of the history."""
        topic = self._watched.pop(batch_id)
        for client in topic.clients:
            client.batches.pop(batch_id, None)
        self._forget_percentages(topic)

    def subscribe(self, client: Client, batch_id: str, *, after: int) -> None:
        """Tell this client every fact of this watched batch from now on, once however often it asks. `after`: it was
        told those after this offset already, or a snapshot of that place."""
        self._watched[batch_id].clients.add(client)
        client.batches[batch_id] = min(after, client.batches.get(batch_id, after))

    def unsubscribe(self, client: Client, batch_id: str) -> bool:
        """Tell it no more; whether that was the batch's last client."""
        client.batches.pop(batch_id, None)
        topic = self._watched.get(batch_id)
        if topic is None or client not in topic.clients:
            return False
        topic.clients.remove(client)
        return not topic.clients

    def missed(self, client: Client, batch_id: str, *, after: int) -> list[Frame] | None:
        """What this client has not been told of a watched batch since offset `after`, by what it follows already; None
        where that is not all at hand."""
        topic = self._watched[batch_id]
        (partition,) = topic.floor
        told_after = client.told_after(batch_id, partition)
        if told_after is not None and after >= told_after:
            return []
        missed = topic.missed({partition: after})
        return None if missed is None else client.untold(missed)

    # Users

    def watch_user(self, user_id: str, *, floor: Mapping[int, int]) -> None:
        """Begin to keep what is told of this user's batches. `floor`: the offset up to which the log was read, for
        each partition; facts up to there are not told any more."""
        assert user_id not in self._users, f"{user_id} is watched already"
        self._users[user_id] = _Topic(dict(floor), dict(floor))

    def watches_user(self, user_id: str) -> bool:
        return user_id in self._users

    def user_watched_by(self, user_id: str) -> int:
        """How many clients follow all batches of the user."""
        return len(self._users[user_id].clients)

    def forget_user(self, user_id: str) -> set[Client]:
        """End the watch; the clients that were still subscribed."""
        topic = self._users.pop(user_id)
        for client in topic.clients:
            client.follows_user = None
        self._forget_percentages(topic)
        return topic.clients

    def subscribe_user(self, client: Client, *, after: Mapping[int, int]) -> None:
        """Tell this client every fact of its user's batches from now on; `after`: as for `subscribe`, by partition."""
        assert client.user_id is not None
        self._users[client.user_id].clients.add(client)
        known = client.follows_user or {}
        client.follows_user = {number: min(offset, known.get(number, offset)) for number, offset in after.items()}

    def unsubscribe_user(self, client: Client) -> bool:
        """Tell it no more; whether that was the user's last client."""
        client.follows_user = None
        topic = self._users.get(client.user_id or "")
        if topic is None or client not in topic.clients:
            return False
        topic.clients.remove(client)
        return not topic.clients

    def missed_of_user(self, client: Client, *, after: Mapping[int, int]) -> list[Frame] | None:
        """As `missed`, of all its user's batches."""
        assert client.user_id is not None
        follows = client.follows_user
        if follows is not None and all(after.get(number, -1) >= offset for number, offset in follows.items()):
            return []
        missed = self._users[client.user_id].missed(after)
        return None if missed is None else client.untold(missed)

    # Facts and percentages

    def tell(self, batch_id: str, frame: Frame, *, upload_id: str | None, user_id: str | None = None) -> None:
        """Queue an effective fact for all who watch its batch, or all batches of its user. `upload_id`: the upload it
        is about, None for all."""
        batch, user = self._topics(batch_id, user_id)
        if batch is not None:
            self._tell(batch, frame, batch_id, upload_id, told=())
        if user is not None and frame.offset > user.told.get(frame.partition, -1):
            self._tell(user, frame, batch_id, upload_id, told=batch.clients if batch is not None else ())

    def _tell(
        self, topic: _Topic, frame: Frame, batch_id: str, upload_id: str | None, *, told: Collection[Client]
    ) -> None:
        outdated = (
            [upload_id] if upload_id else [u for u, pace in topic.percentages.items() if pace.batch_id == batch_id]
        )
        for outdated_id in outdated:
            self._outdate(topic, outdated_id)
        for client in topic.clients:
            if client not in told:
                client.put(frame)
        topic.told[frame.partition] = frame.offset
        self._remember(topic, frame)

    def tell_percentage(
        self, batch_id: str, upload_id: str, frame: Frame, *, now_s: float, user_id: str | None = None
    ) -> None:
        """Queue how far an upload is, or let it wait (see `tell_due`) where the last one is not long enough ago."""
        for topic in self._topics(batch_id, user_id):
            if topic is not None:
                self._tell_percentage(topic, batch_id, upload_id, frame, now_s=now_s)

    def _tell_percentage(self, topic: _Topic, batch_id: str, upload_id: str, frame: Frame, *, now_s: float) -> None:
        pace = topic.percentages.get(upload_id)
        if pace is not None and now_s < pace.told_s + self._limits.progress_pause_s:
            pace.waiting = frame
            self._paced.add((topic, upload_id))
            return
        if len(topic.percentages) >= PACED_UPLOADS_MAX:
            self._prune(topic, now_s)
        topic.percentages[upload_id] = _Percentage(batch_id, told_s=now_s)
        self._paced.discard((topic, upload_id))
        batch = self._watched.get(batch_id)
        for client in topic.clients:
            if topic is batch or batch is None or client not in batch.clients:
                client.put_percentage(upload_id, frame)

    def tell_due(self, *, now_s: float) -> bool:
        """Queue the percentages whose time has come; whether others still wait for theirs."""
        for topic, upload_id in list(self._paced):
            pace = topic.percentages[upload_id]
            assert pace.waiting is not None
            if now_s >= pace.told_s + self._limits.progress_pause_s:
                self._tell_percentage(topic, pace.batch_id, upload_id, pace.waiting, now_s=now_s)
        return bool(self._paced)

    def _topics(self, batch_id: str, user_id: str | None) -> tuple[_Topic | None, _Topic | None]:
        return self._watched.get(batch_id), self._users.get(user_id) if user_id is not None else None

    def _outdate(self, topic: _Topic, upload_id: str) -> None:
        """A fact overtook the percentages of this upload; its pace goes on."""
        pace = topic.percentages.get(upload_id)
        if pace is None:
            return
        pace.waiting = None
        self._paced.discard((topic, upload_id))
        for client in topic.clients:
            client.forget_percentage(upload_id)

    def _prune(self, topic: _Topic, now_s: float) -> None:
        """Forget the paces that hold nothing back any more: a user's uploads come and go without an end."""
        old_s = now_s - self._limits.progress_pause_s
        topic.percentages = {u: pace for u, pace in topic.percentages.items() if pace.waiting or pace.told_s > old_s}

    def _forget_percentages(self, topic: _Topic) -> None:
        self._paced -= {(topic, upload_id) for upload_id in topic.percentages}

    def _remember(self, topic: _Topic, frame: Frame) -> None:
        topic.recent.append(frame)
        self._history.append(topic)
        self._history_bytes += frame.size_bytes
        while self._history_bytes > self._limits.history_bytes_max:
            oldest = self._history.popleft()
            dropped = oldest.recent.popleft()
            oldest.floor[dropped.partition] = dropped.offset
            self._history_bytes -= dropped.size_bytes
