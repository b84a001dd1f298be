"""The words of the progress protocol: what clients may say, and every message we answer, as JSON text.

Pure: text in, values out, and back. A text frame holds one message or several separated by newlines, in both
directions; none of ours holds a newline itself. An event is encoded here once, whoever it is sent to. The whole
conversation, with examples, stands in docs/protocol.md.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from schemas.batch import Batch
from schemas.errors import Code, RequestError
from schemas.events import EventView, Fact, UploadProgressed
from schemas.position import Position
from schemas.views import BatchCounts, BatchView, rfc3339

_DETAIL_CHARACTERS_MAX = 300


class _Message(BaseModel):
    """What a client says; members we do not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Auth(_Message):
    type: Literal["auth"]
    token: str


class _Topic(_Message):
    """Names one batch, or all batches of the user."""

    batch_id: str | None = None
    user: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.batch_id is None) == (self.user is None):
            raise ValueError('say either "batch_id":"…" or "user":true')
        return self


class Subscribe(_Topic):
    type: Literal["subscribe"]
    since: str | None = None


class Unsubscribe(_Topic):
    type: Literal["unsubscribe"]


class Ping(_Message):
    type: Literal["ping"]


ClientMessage = Auth | Subscribe | Unsubscribe | Ping
_CLIENT_MESSAGE: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])


def understand(text: str) -> ClientMessage:
    """What one message of a client says. Raises RequestError(INVALID_REQUEST) with what is wrong."""
    try:
        return _CLIENT_MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        detail = f"{place}: {what}" if place else what
        raise RequestError(
            Code.INVALID_REQUEST, f"The message is not understood: {detail:.{_DETAIL_CHARACTERS_MAX}}"
        ) from None


def ready(*, user_id: str, heartbeat_s: float, position: Position) -> str:
    return _text({"type": "ready", "user_id": user_id, "heartbeat_s": heartbeat_s, "position": str(position)})


def pong() -> str:
    return _text({"type": "pong"})


def error(problem: RequestError, *, batch_id: str | None = None) -> str:
    named = {} if batch_id is None else {"batch_id": batch_id}
    return _text({"type": "error", "code": str(problem.code), "detail": problem.detail, **named})


def snapshot(batch: Batch, *, log_id: str, position: Position) -> str:
    """The answer to a subscription: the batch as it is at `position`."""
    said = {"type": "subscribed", "batch_id": batch.id, "position": str(position)}
    view = BatchView.of_log(batch, log_id=log_id).model_dump(mode="json")
    return _text({**said, "batch": view, "recovered": False})


def resumed(*, batch_id: str, position: Position) -> str:
    """The answer to a subscription that goes on where it ended: the facts after `position` follow."""
    return _text({"type": "subscribed", "batch_id": batch_id, "position": str(position), "recovered": True})


def user_snapshot(batches: Sequence[Batch], *, truncated: bool, log_id: str, position: Position) -> str:
    """The answer to a subscription to all batches: these as they are at `position`; `truncated`: there are more."""
    views = [BatchView.of_log(batch, log_id=log_id).model_dump(mode="json") for batch in batches]
    said = {"type": "subscribed", "user": True, "position": str(position), "batches": views}
    return _text({**said, "truncated": truncated, "recovered": False})


def user_resumed(*, position: Position) -> str:
    """The answer to a subscription to all batches that goes on where it ended."""
    return _text({"type": "subscribed", "user": True, "position": str(position), "recovered": True})


def unsubscribed(wish: Unsubscribe) -> str:
    topic = {"user": True} if wish.user else {"batch_id": wish.batch_id}
    return _text({"type": "unsubscribed", **topic})


def event(fact: Fact, *, time_ms: int, position: Position, batch: Batch | None) -> str:
    """An effective fact and its batch's counts after it; `batch` is None once it is deleted."""
    told = EventView.of(fact, time=rfc3339(time_ms)).model_dump_json()
    counts = "null" if batch is None or batch.deleted else BatchCounts.of(batch).model_dump_json()
    return f'{{"type":"event","position":"{position}","event":{told},"batch":{counts}}}'


def progress(told: UploadProgressed) -> str:
    said = told.model_dump(include={"batch_id", "upload_id", "attempt", "stage", "percent"})
    return _text({"type": "progress", **said})


def joined(texts: Sequence[str]) -> str:
    """Several messages as one frame."""
    return "\n".join(texts)


def split(frame: str) -> list[str]:
    """The messages of one frame."""
    return [line for line in frame.split("\n") if line.strip()]


def _text(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
