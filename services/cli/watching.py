"""Following one batch: the notifier's messages, for as long as it takes, onto a board.

A connection that is lost is made anew and asks for what came after the last position; where the notifier cannot tell,
it sends a snapshot, which the board takes as well. A snapshot holds counts; names and sizes of files that were there
before us come from the api, beside the messages. What a message means to a watcher: `board.py`.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from services.cli.board import Board
from services.cli.client import Api
from services.cli.connection import is_loopback
from services.cli.display import Display
from services.cli.errors import CliError, Refused, Unreachable
from services.cli.sending import Sent, send
from services.lifecycle import cancelled

GIVE_UP_AFTER_S = 60.0
OPEN_TIMEOUT_S = 10.0
PAUSE_S, PAUSE_MAX_S = 0.2, 3.0
MESSAGE_BYTES_MAX = 32 * 1024 * 1024  # a frame may hold a snapshot and many facts
BAD_TOKEN, TOO_MANY = 4001, 4009

Message = dict[str, Any]


async def follow(
    api: Api,
    *,
    token: str,
    batch_id: str,
    shown: Display,
    announced: Sequence[Path] = (),
    on_begun: Callable[[], None] = lambda: None,
) -> Board:
    """Show the batch until it ended; the board as it is then. `on_begun` is called when from then on nothing is missed.
    `announced`: the files that are being sent into it meanwhile.

    Raises Unreachable, Refused.
    """
    board = Board(batch_id, len(announced), sum(path.stat().st_size for path in announced))
    watch = Watch((await api.config())["notifier_url"], token, batch_id)
    async with contextlib.aclosing(watch.messages()) as messages, contextlib.AsyncExitStack() as beside:
        async for message in messages:
            board.apply(message)
            shown.update(board, message)
            if board.ended:
                break
            if message["type"] == "subscribed":
                on_begun()
                if board.misses_rows:
                    rows = asyncio.create_task(_add_rows(api, board))
                    beside.push_async_callback(cancelled, rows)
    return board


async def send_and_follow(
    api: Api, batch: dict[str, Any], *, token: str, files: Sequence[Path], shown: Display
) -> tuple[Sent, Board]:
    """Send the files into the new batch and show it meanwhile, until it ended (or is gone, as no file was taken).

    Watching that fails does not keep the files from being sent: then CliError says so and names the batch.
    """
    begun = asyncio.Event()
    following = asyncio.create_task(
        follow(api, token=token, batch_id=batch["id"], shown=shown, announced=files, on_begun=begun.set), name="follow"
    )
    following.add_done_callback(lambda _ended: begun.set())
    try:
        await begun.wait()  # so that the names of all files are seen
        sent = await send(api, batch, files)
        return sent, await following
    except (Unreachable, Refused) as error:
        if not following.done() or following.exception() is not error:
            raise
        raise CliError(f"The files were sent as batch {batch['id']}, but watching it failed: {error}") from error
    finally:
        await cancelled(following)


async def _add_rows(api: Api, board: Board) -> None:
    """Names and sizes of the files that were in the batch before us; without them the bars show less."""
    with contextlib.suppress(Refused, Unreachable):
        board.add_rows(await api.uploads(board.batch_id, min_position=board.position))


@dataclass(slots=True)
class Watch:
    """One batch on one notifier. `position`: of the last message, where the next connection goes on."""

    notifier_url: str
    token: str
    batch_id: str
    position: str | None = None
    give_up_after_s: float = GIVE_UP_AFTER_S
    _ever_heard: bool = field(default=False, init=False)
    _lost_at: float | None = field(default=None, init=False)

    async def messages(self) -> AsyncGenerator[Message, None]:
        """Every message until the caller stops asking; `{"type": "lost", "reason"}` stands between two connections.

        The answer to the subscription counts as heard, the greeting does not. Raises Unreachable, Refused.
        """
        pause_s = PAUSE_S
        while True:
            try:
                async for message in self._connection():
                    self._ever_heard = True
                    if message.get("type") == "ready":
                        continue
                    self._lost_at, pause_s = None, PAUSE_S
                    yield message
            except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
                lost = error
            self._raise_if_final(lost)
            yield {"type": "lost", "reason": _reason(lost)}
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    async def _connection(self) -> AsyncIterator[Message]:
        """The messages of one connection, until it closes."""
        async with connect(
            web_socket_url(self.notifier_url),
            additional_headers={"Authorization": f"Bearer {self.token}"},
            proxy=None if is_loopback(self.notifier_url) else True,
            compression=None,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=1.0,
            max_size=MESSAGE_BYTES_MAX,
        ) as socket:
            await self._subscribe(socket)
            async for frame in socket:
                assert isinstance(frame, str), "the notifier speaks in text"
                for line in frame.split("\n"):
                    message: Message = json.loads(line)
                    self._note(message)
                    yield message
            raise ConnectionResetError("the notifier closed the connection")

    async def _subscribe(self, socket: ClientConnection) -> None:
        """Say what is wanted; the header of the handshake said who we are."""
        wanted = {"type": "subscribe", "batch_id": self.batch_id}
        if self.position is not None:
            wanted["since"] = self.position
        await socket.send(json.dumps(wanted))

    def _note(self, message: Message) -> None:
        match message.get("type"):
            case "subscribed" | "event":
                self.position = message["position"]
            case "error" if message["code"] == "not_found":
                raise Refused(status=404, code="not_found", detail=f"There is no batch {self.batch_id} of this user.")
            case "error" if message["code"] in ("invalid_position", "position_of_another_log"):
                self.position = None
                raise ConnectionError(message["detail"])
            case "error":
                raise ConnectionError(f"{message['code']}: {message['detail']}")
            case _:
                pass

    def _raise_if_final(self, lost: Exception) -> None:
        """Some ends cannot be mended by coming back, and some go on for too long."""
        if _refuses_token(lost):
            raise Refused(status=401, code="unauthorized", detail="The notifier does not accept the token.") from lost
        if isinstance(lost, ConnectionClosed) and lost.rcvd and lost.rcvd.code == TOO_MANY:
            raise CliError(f"The notifier has as many connections as it takes: {_reason(lost)}. Close some.") from lost
        self._lost_at = self._lost_at or time.monotonic()
        if not self._ever_heard or time.monotonic() - self._lost_at > self.give_up_after_s:
            raise Unreachable(
                f"No answer from the notifier at {self.notifier_url} ({_reason(lost)}). Does it run there? The api "
                f"names this address in /v1/config; SLUICE_NOTIFIER_PUBLIC_URL changes it."
            ) from lost


def _refuses_token(error: Exception) -> bool:
    if isinstance(error, InvalidStatus):
        return error.response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    return isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == BAD_TOKEN


def web_socket_url(notifier_url: str) -> str:
    """`http://host:port` → `ws://host:port/v1/ws`."""
    parts = urlsplit(notifier_url)
    scheme = "wss" if parts.scheme == "https" else "ws"
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/v1/ws", "", ""))


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionClosed) and error.rcvd:
        return f"closed with {error.rcvd.code} {error.rcvd.reason}".rstrip()
    return str(error) or type(error).__name__
