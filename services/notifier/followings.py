"""The users that clients follow: the tail is told to miss none of their facts, and what they have now is listed.

A user is followed from the first user-wide subscription until a while after the last one ended, so that a client whose
connection broke finds what it missed. Who follows is sent away, with the last position it was told, when the tail
cannot go on following; everybody else goes on.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from schemas.batch import Batch
from schemas.errors import Code, RequestError
from schemas.position import Position
from services.database import BATCH_COLUMNS, Database, DatabaseUnavailable, batch_from_row
from services.lifecycle import cancelled
from services.notifier.hub import Close, Hub
from services.tail import Tail

LINGER_S = 30.0
NEWEST_MAX = 100
UNFINISHED_SHOWN_MAX = 1_000
"""How many unfinished batches a list shows, and how many are in memory from the beginning; others are when named."""
UNFINISHED_MAX = 100_000
"""How many are followed: their ids are kept."""
LOADS_AT_ONCE = 8
REACHED_TIMEOUT_S = 5.0
RESTARTING = 1012


@dataclass(slots=True, eq=False)
class _Following:
    """`ready`: when nothing is missed any more; `asking`: how many need it just now; `lost`: why it had to end."""

    ready: asyncio.Future[None]
    asking: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.TimerHandle | None = None
    lost: str | None = None

    def check(self) -> None:
        """Raises DatabaseUnavailable where it had to end."""
        if self.lost is not None:
            raise DatabaseUnavailable(self.lost)


class Followings:
    """See the module's text. Open it with `Followings.open`."""

    def __init__(self, *, tail: Tail, hub: Hub, database: Database, linger_s: float) -> None:
        self.linger_s = linger_s
        self._tail = tail
        self._hub = hub
        self._database = database
        self._followings: dict[str, _Following] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, *, tail: Tail, hub: Hub, database: Database, linger_s: float = LINGER_S) -> AsyncIterator[Self]:
        followings = cls(tail=tail, hub=hub, database=database, linger_s=linger_s)
        try:
            yield followings
        finally:
            await cancelled(*followings._tasks)

    @property
    def users(self) -> frozenset[str]:
        """Those who are followed just now, or begin to be."""
        return frozenset(self._followings)

    @contextlib.asynccontextmanager
    async def find(self, user_id: str) -> AsyncIterator[None]:
        """Follow this user at least as long as the block lasts, and keep its batches in memory meanwhile.

        Raises DatabaseUnavailable, and RequestError for a user with too many unfinished batches.
        """
        following = self._following(user_id)
        try:
            with self._tail.keeping(user_id):
                await asyncio.shield(following.ready)
                yield
        finally:
            following.asking -= 1
            self.left(user_id)

    async def batches(self, user_id: str) -> tuple[list[Batch], bool]:
        """The newest batches of a user who is found, and the newest of the unfinished ones, newest first, as they are
        at the tail's position; whether there are more. The states are live. Raises DatabaseUnavailable."""
        rows = await self._rows(user_id, "true", NEWEST_MAX + 1)
        rows += await self._rows(user_id, "status IN ('pending', 'processing')", UNFINISHED_SHOWN_MAX + 1)
        await self._reach_read_models()
        if not self._hub.watches_user(user_id):
            raise DatabaseUnavailable("following all batches was broken off just now; subscribe again")
        known = {row["id"]: batch_from_row(row) for row in rows}
        known.update({batch.id: batch for batch in self._tail.held_of(user_id)})
        newest = sorted(
            (batch for batch in known.values() if not batch.deleted),
            key=lambda batch: (batch.created_ms, batch.created_offset, batch.id),
            reverse=True,
        )
        unfinished = [batch for batch in newest if not batch.ended][:UNFINISHED_SHOWN_MAX]
        wanted = {batch.id for batch in (*newest[:NEWEST_MAX], *unfinished)}
        return [batch for batch in newest if batch.id in wanted], len(newest) > len(wanted)

    def left(self, user_id: str) -> None:
        """A client left: if it was the user's last one, follow no more in a while."""
        following = self._followings.get(user_id)
        if following is None or following.asking or not self._hub.watches_user(user_id):
            return
        if self._hub.user_watched_by(user_id):
            return
        if following.leaving is not None:
            following.leaving.cancel()
        following.leaving = asyncio.get_running_loop().call_later(self.linger_s, self._end_unless_used, user_id)

    def _following(self, user_id: str) -> _Following:
        following = self._followings.get(user_id)
        if following is None:
            following = self._followings[user_id] = _Following(asyncio.get_running_loop().create_future())
            task = asyncio.create_task(self._follow(user_id, following), name="follow")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        following.asking += 1
        return following

    async def _follow(self, user_id: str, following: _Following) -> None:
        try:
            touched = self._tail.follow(user_id, functools.partial(self._lose, user_id, following))
            with self._tail.keeping(user_id):
                unfinished = await self._unfinished(user_id)
                awake = self._tail.let_sleep(user_id, unfinished[UNFINISHED_SHOWN_MAX:])
                await self._load({*touched, *unfinished[:UNFINISHED_SHOWN_MAX], *awake})
                # What had ended there was not asked for: its end must not come from here, but from the past.
                await self._reach_read_models()
            following.check()
            self._hub.watch_user(user_id, floor=dict(self._tail.position().offsets))
            following.ready.set_result(None)
            self.left(user_id)  # who asked may have gone meanwhile
            await following.over.wait()
        except Exception as error:  # noqa: BLE001  # it belongs to those who asked for the user
            following.ready.set_exception(error)
            following.ready.exception()
        finally:
            if self._followings.get(user_id) is following:
                del self._followings[user_id]
                self._tail.unfollow(user_id)

    async def _rows(self, user_id: str, condition: str, limit: int) -> list[Any]:
        """The newest of the user's batches of which this is true."""
        return await self._database.read(
            f"SELECT {BATCH_COLUMNS} FROM {{generation}}.upload_batches WHERE user_id = $1 AND {condition} "  # noqa: S608  # ours
            "ORDER BY created_ms DESC, created_offset DESC, id DESC LIMIT $2",
            user_id,
            limit,
        )

    async def _unfinished(self, user_id: str) -> list[str]:
        """The ids of the user's unfinished batches, newest first."""
        rows = await self._database.read(
            "SELECT id FROM {generation}.upload_batches WHERE user_id = $1 AND status IN ('pending', 'processing') "
            "ORDER BY created_ms DESC, created_offset DESC, id DESC LIMIT $2",
            user_id,
            UNFINISHED_MAX + 1,
        )
        if len(rows) > UNFINISHED_MAX:
            raise RequestError(
                Code.INVALID_REQUEST,
                f"More than {UNFINISHED_MAX:,} batches are unfinished: follow those that matter one by one",
            )
        return [row["id"] for row in rows]

    async def _load(self, batch_ids: Iterable[str]) -> None:
        """Bring these batches into memory, where they stay as long as they are unfinished."""
        turns = asyncio.Semaphore(LOADS_AT_ONCE)

        async def load(batch_id: str) -> None:
            async with turns, self._tail.hold(batch_id):
                pass

        await asyncio.gather(*map(load, batch_ids))

    async def _reach_read_models(self) -> None:
        """What was read from Postgres must not be newer than the tail."""
        lanes = await self._database.positions()
        position = Position.of(
            self._tail.log_id, {number: lane.next_offset - 1 for number, lane in lanes.items() if lane.next_offset}
        )
        if not await self._tail.reached(position, REACHED_TIMEOUT_S):
            raise DatabaseUnavailable("the log is read more slowly than the read models are written; try again")

    def _end_unless_used(self, user_id: str) -> None:
        following = self._followings.get(user_id)
        if following is not None and not following.asking and not self._hub.user_watched_by(user_id):
            self._end(user_id, following)

    def _end(self, user_id: str, following: _Following) -> None:
        del self._followings[user_id]
        self._tail.unfollow(user_id)
        self._hub.forget_user(user_id)
        if following.leaving is not None:
            following.leaving.cancel()
        following.over.set()

    def _lose(self, user_id: str, following: _Following, reason: str) -> None:
        """The tail cannot go on: send those who follow away with where they are."""
        following.lost = reason
        if not self._hub.watches_user(user_id):
            return  # it was just beginning; whoever asked is told
        del self._followings[user_id]
        for client in self._hub.forget_user(user_id):
            client.end(Close(RESTARTING, "facts of your batches cannot be told now", with_position=True))
        if following.leaving is not None:
            following.leaving.cancel()
        following.over.set()
