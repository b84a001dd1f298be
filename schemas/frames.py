"""The messages of the progress protocol as shapes: what clients say and what they are told, over WebSocket.

A text frame holds one message, or several separated by newlines. Server-sent events carry the same messages, each
under its position as `id`. The shapes describe (`schemas.generate` makes the AsyncAPI document of them); the hot path
of the notifier writes its text directly, and a test holds it to these.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import Code
from schemas.events import EventView
from schemas.views import BatchCounts, BatchView

PositionText = Annotated[str, Field(description="a place in the log: the last record included, of each partition")]


class Frame(BaseModel):
    """One message; receivers pass over members they do not know."""

    model_config = ConfigDict(frozen=True)


class Auth(Frame):
    """The client's first message, within 5 s, unless it came with an `Authorization` header."""

    type: Literal["auth"]
    token: str


class SubscribeBatch(Frame):
    """Follow one batch; with `since`, every effective fact after that position."""

    type: Literal["subscribe"]
    batch_id: str
    since: PositionText | None = None


class SubscribeUser(Frame):
    """Follow all batches of the user."""

    type: Literal["subscribe"]
    user: Literal[True]
    since: PositionText | None = None


class Unsubscribe(Frame):
    """End one subscription: that of `batch_id`, or with `user` that of all batches."""

    type: Literal["unsubscribe"]
    batch_id: str | None = None
    user: Literal[True] | None = None


class Ping(Frame):
    type: Literal["ping"]


class Ready(Frame):
    """The token is good; `heartbeat_s` is the pause between the server's pings."""

    type: Literal["ready"]
    user_id: str
    heartbeat_s: float
    position: PositionText


class SubscribedBatch(Frame):
    """A snapshot at `position`; where `recovered`, none, and the facts after `since` follow."""

    type: Literal["subscribed"]
    batch_id: str
    position: PositionText
    batch: BatchView | None = None
    recovered: bool


class SubscribedUser(Frame):
    """The unfinished batches and the newest 100; `truncated` where the user has more."""

    type: Literal["subscribed"]
    user: Literal[True]
    position: PositionText
    batches: list[BatchView] | None = None
    truncated: bool | None = None
    recovered: bool = False


class Unsubscribed(Frame):
    type: Literal["unsubscribed"]
    batch_id: str | None = None
    user: Literal[True] | None = None


class EventFrame(Frame):
    """An effective fact and its batch's counts after it; `batch` is null after BatchDeleted."""

    type: Literal["event"]
    position: PositionText
    event: EventView
    batch: BatchCounts | None


class ProgressFrame(Frame):
    """How far the attempt in work is; only the latest counts, and losing one loses no fact."""

    type: Literal["progress"]
    batch_id: str
    upload_id: str
    attempt: int
    stage: str
    percent: Annotated[int, Field(ge=0, le=100)]


class ErrorFrame(Frame):
    """What was not understood or is not there; the connection stays."""

    type: Literal["error"]
    code: Code
    detail: str
    batch_id: str | None = None


class Pong(Frame):
    type: Literal["pong"]


CLIENT_FRAMES: tuple[type[Frame], ...] = (Auth, SubscribeBatch, SubscribeUser, Unsubscribe, Ping)
SERVER_FRAMES: tuple[type[Frame], ...] = (
    Ready,
    SubscribedBatch,
    SubscribedUser,
    Unsubscribed,
    EventFrame,
    ProgressFrame,
    ErrorFrame,
    Pong,
)
CLOSE_CODES: dict[int, str] = {
    4001: "no token, or a bad one",
    4008: "too slow; the reason holds the last position",
    4009: "too many connections",
    1012: "restarting; come back with `since`",
}
"""Why the server ends a connection."""
