"""The notifier's story: settings, logging, the log and the database, the tail caught up, then serve until told to stop.

It keeps nothing that it cannot read again: a client that comes back, to this notifier or another, says `since` and goes
on. Told to stop, it takes no new clients and sends those it has away with 1012, then closes in reverse.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from services.auth import Authenticator
from services.faults import arm
from services.history import History, Past
from services.lifecycle import cancelled, closing, run_service, run_until_told, stopwatch
from services.notifier.followings import Followings
from services.notifier.hub import Hub, HubLimits
from services.notifier.origins import Origins
from services.notifier.replays import Replays
from services.notifier.sessions import CLIENT_MESSAGE_BYTES_MAX, Connection, Parts, Sessions, StreamConnection
from services.notifier.streams import Streaming
from services.notifier.subscriptions import Subscriptions
from services.notifier.watches import Watches
from services.observability import configure_logging, logger
from services.opening import open_authenticator, open_stores
from services.serving import LOST, health_routes, serving
from services.settings import Settings, load
from services.tail import Tail
from services.tailing import open_tail, serve_until, soon_caught_up

_log = logger("notifier")

CLIENT_FRAMES_MAX = 50_000
HISTORY_BYTES_MAX = 64 * 1024 * 1024


def run() -> None:
    """Run the notifier until SIGTERM or SIGINT."""
    run_service(main)


async def main() -> None:
    settings = load(needs=("jwt_secret|jwks_url",))
    configure_logging(service="notifier", log_format=settings.log_format, log_level=settings.log_level)
    arm(settings.fault)
    await run_until_told(functools.partial(_serve, settings))


async def _serve(settings: Settings, stop: asyncio.Event, ready: asyncio.Event) -> None:
    async with notifying(settings) as notifier:
        ready.set()
        await notifier.until(stop)


@dataclass(frozen=True, slots=True)
class Notifier:
    """A notifier that serves on `port`."""

    port: int
    tail: Tail
    watches: Watches
    followings: Followings
    relay: asyncio.Task[None]

    async def until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; raises StartError where a part ended without which there is nothing to tell."""
        await serve_until(stop, tail=self.tail, needed=self.relay, service="notifier")


@contextlib.asynccontextmanager
async def notifying(settings: Settings) -> AsyncIterator[Notifier]:
    """A notifier that is ready, until the block is left."""
    async with contextlib.AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(settings, service="notifier"))
        authenticator = await stack.enter_async_context(open_authenticator(settings))
        async with stopwatch("tail caught up"):
            past = Past(log=stores.log, log_id=stores.log_id, database=stores.database)
            tail = await stack.enter_async_context(open_tail(settings, stores, past=past.before))
            await soon_caught_up(tail)
        hub = Hub(_limits(settings))
        watches = await stack.enter_async_context(Watches.open(tail=tail, hub=hub))
        followings = await stack.enter_async_context(Followings.open(tail=tail, hub=hub, database=stores.database))
        replays = Replays(tail, History(past=past, tail=tail), stores.database)
        progress = stores.log.progress_reader(range(settings.partitions))
        stack.push_async_callback(progress.close)
        relay = asyncio.create_task(watches.relay_progress(progress), name="relay_progress")
        stack.push_async_callback(cancelled, relay)
        parts = Parts(
            hub=hub,
            subscriptions=Subscriptions(tail, stores.identity, hub, watches, followings, replays),
            authenticate=functools.partial(authenticator.authenticate, scope="read"),
            heartbeat_s=settings.heartbeat_s,
        )
        sessions = Sessions(parts)
        port = await stack.enter_async_context(_served(settings, sessions, authenticator, tail))
        await stack.enter_async_context(closing("clients sent away", sessions.close, timeout_s=settings.stop_timeout_s))
        _log.info("notifier_ready", position=str(tail.position()))
        yield Notifier(port=port, tail=tail, watches=watches, followings=followings, relay=relay)


def _limits(settings: Settings) -> HubLimits:
    return HubLimits(
        clients_max=settings.clients_max,
        clients_per_user_max=settings.clients_per_user_max,
        client_bytes_max=settings.client_bytes_max,
        client_frames_max=CLIENT_FRAMES_MAX,
        history_bytes_max=HISTORY_BYTES_MAX,
    )


def _streamed(sessions: Sessions) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of server-sent events."""

    async def stream(request: Request) -> Response:
        return Streaming(request, sessions)

    return stream


def _served(
    settings: Settings, sessions: Sessions, authenticator: Authenticator, tail: Tail
) -> contextlib.AbstractAsyncContextManager[int]:
    def problems() -> list[str]:
        found = [*tail.problems(), *authenticator.problems()]
        if (lag_s := tail.behind_s(settings.tail_lag_max_s)) is not None:
            found.append(f"the log was last read to its end {lag_s:.0f} s ago, so progress is told late")
        if sessions.stopping:
            found.append("the notifier is stopping")
        return found

    routes = [
        *health_routes(problems),
        WebSocketRoute("/v1/ws", sessions.serve),
        Route("/v1/stream", _streamed(sessions)),
        Route("/v1/stream/batches/{batch_id}", _streamed(sessions)),
    ]
    return serving(
        Origins(Starlette(routes=routes, exception_handlers=LOST), origins=settings.origins),
        host=settings.host,
        port=settings.notifier_port,
        stop_timeout_s=settings.stop_timeout_s,
        http=StreamConnection,
        ws=Connection,
        ws_max_size=CLIENT_MESSAGE_BYTES_MAX,
        ws_ping_interval=settings.heartbeat_s,
        ws_ping_timeout=settings.heartbeat_s,
        ws_per_message_deflate=False,
    )
