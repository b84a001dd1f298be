"""The api's story: settings, logging, the log, the database and the blob store, the tail caught up, then serve.

It keeps nothing of its own: what it answers is folded from the log, and what it is told goes there. Told to stop, it
takes no new requests, lets those under way end, and closes in reverse.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass

from schemas.events import Limits
from services.api.app import build_app
from services.api.health import Health
from services.api.mcp import assisted
from services.api.rates import Rates
from services.api.reading import Reading
from services.api.resources import Resources
from services.api.writing import Writing
from services.faults import arm
from services.history import History, Past
from services.lifecycle import cancelled, closing, run_service, run_until_told, stopwatch
from services.observability import configure_logging, logger
from services.opening import open_authenticator, open_blobs, open_stores
from services.serving import serving
from services.settings import Settings, host_in_url, load
from services.tail import Tail
from services.tailing import open_tail, serve_until, soon_caught_up

_log = logger("api")

KEEP_ALIVE_S = 30


def run() -> None:
    """Run the api until SIGTERM or SIGINT."""
    run_service(main)


async def main() -> None:
    settings = load(needs=("jwt_secret|jwks_url", "blob_url"))
    configure_logging(service="api", log_format=settings.log_format, log_level=settings.log_level)
    arm(settings.fault)
    await run_until_told(functools.partial(_serve, settings))


async def _serve(settings: Settings, stop: asyncio.Event, ready: asyncio.Event) -> None:
    async with serving_api(settings) as api:
        ready.set()
        await api.until(stop)


@dataclass(frozen=True, slots=True)
class Api:
    """An api that serves on `port`."""

    port: int
    tail: Tail
    watch: asyncio.Task[None]

    async def until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; raises StartError where a part ended without which nothing can be answered."""
        await serve_until(stop, tail=self.tail, needed=self.watch, service="api")


@contextlib.asynccontextmanager
async def serving_api(settings: Settings) -> AsyncIterator[Api]:
    """An api that is ready, until the block is left."""
    async with contextlib.AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(settings, service="api"))
        authenticator = await stack.enter_async_context(open_authenticator(settings))
        async with stopwatch("blob store opened"):
            blobs = await stack.enter_async_context(open_blobs(settings))
        async with stopwatch("tail caught up"):
            tail = await stack.enter_async_context(open_tail(settings, stores))
            await soon_caught_up(tail)
        history = History(past=Past(log=stores.log, log_id=stores.log_id, database=stores.database), tail=tail)
        writer = stores.log.writer()
        await stack.enter_async_context(closing("log writer closed", writer.close, timeout_s=settings.stop_timeout_s))
        health = Health(
            tail=tail,
            authenticator=authenticator,
            blobs=blobs,
            database=stores.database,
            partitions=settings.partitions,
            topic_complaint=stores.topic_complaint,
            lag_max_s=settings.tail_lag_max_s,
        )
        resources = Resources(
            settings=settings,
            limits=_limits(settings),
            authenticator=authenticator,
            rates=Rates(per_s=settings.rate_limit_per_s, burst=settings.rate_limit_burst),
            tail=tail,
            database=stores.database,
            blobs=blobs,
            writing=Writing(tail=tail, writer=writer, settings=settings),
            reading=Reading(
                tail=tail, history=history, database=stores.database, identity=stores.identity, settings=settings
            ),
            health=health,
        )
        watch = asyncio.create_task(health.watch(), name="watch_health")
        stack.push_async_callback(cancelled, watch)
        app = build_app(resources)
        assistants = await stack.enter_async_context(assisted(app, tail=tail))
        port = await stack.enter_async_context(
            serving(
                app,
                host=settings.host,
                port=settings.api_port,
                stop_timeout_s=settings.stop_timeout_s,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        stack.callback(assistants.dismiss)
        _log.info("api_ready", address=f"http://{host_in_url(settings.host)}:{port}", position=str(tail.position()))
        yield Api(port, tail, watch)


def _limits(settings: Settings) -> Limits:
    """What new batches are bound to."""
    return Limits(
        files_max=settings.files_max,
        batch_bytes_max=settings.batch_bytes_max,
        file_bytes_max=settings.file_bytes_max,
    )
