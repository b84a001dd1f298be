"""Everything on this machine: Kafka ‖ Postgres, then the three services, until told to stop.

`running` reads top to bottom in the order of the start, and the stop is the same backwards: the api first, so that
nothing new comes in, then the processor, which gives its file back, then the notifier, which tells that to who watches,
then the servers. Servers named by SLUICE_KAFKA_BOOTSTRAP_SERVERS and SLUICE_DATABASE_URL are used as they are.
Each part as a child process: `parts.py`; what is done when one dies: `supervision.py`; the embedded servers:
`services/embedded`.
"""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.cli import connection
from services.cli.errors import WrongUse, one_error
from services.cli.part_logs import Say, followed
from services.cli.parts import Part, Server, Service, stop
from services.cli.supervision import Parts, Supervisor
from services.embedded import EmbeddedKafka, EmbeddedPostgres
from services.embedded.folders import FolderLock, free_ports, lock_folder, make_folder
from services.lifecycle import stop_signals
from services.serving import bound
from services.settings import Settings, host_in_url, load

SERVICES = ("notifier", "processor", "api")
"""In the order of their start; they are stopped the other way round."""
STOP_AFTER_DEATH_S = 5.0
ASK_TIMEOUT_S = 5.0
PORT_OPTIONS = {
    "api": "--api-port",
    "notifier": "--notifier-port",
    "processor": "SLUICE_PROCESSOR_PORT",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started where. `settings` hold the final ports."""

    data_dir: Path
    settings: Settings

    def is_external(self, name: str) -> bool:
        return name in self.settings.model_fields_set


@dataclass(slots=True)
class Stack:
    """What runs. `clean` becomes false when a part did not stop as it should.

    Either `parts` tells when one ends, or all are kept running by `keep`; the former until the latter is called.
    """

    parts: Parts
    supervisor: Supervisor
    servers: list[Server] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)
    endpoints: dict[str, Any] = field(default_factory=dict)
    kept: bool = False
    clean: bool = True

    async def keep(self) -> None:
        """Start again what ends, until cancelled."""
        self.kept = True
        await self.parts.forget()
        await self.supervisor.keep(self.members())

    def members(self) -> list[Part]:
        return [*self.servers, *self.services]

    def pids(self) -> dict[str, int]:
        """The processes of the parts that run now."""
        return {part.name: part.pid for part in self.members() if part.pid is not None}


def plan(
    *, data_dir: Path, api_port: int | None = None, notifier_port: int | None = None, any_port: bool = False
) -> Plan:
    """Settings, folder and ports, checked before anything is started. Raises SettingsError, WrongUse, EmbeddedError.

    `any_port`: where a port was not asked for and is taken, take a free one.
    """
    asked = {"api_port": api_port, "notifier_port": notifier_port}
    given: dict[str, Any] = {name: port for name, port in asked.items() if port is not None}
    settings = load(**given)
    ports: dict[str, Any] = {}
    for name in SERVICES:
        port: int = getattr(settings, f"{name}_port")
        if port == 0 or (any_port and f"{name}_port" not in settings.model_fields_set and not is_free(settings, port)):
            port = _another_port(taken=set(ports.values()))
        elif not is_free(settings, port):
            raise WrongUse(
                f"Port {port} of {settings.host}, where the {name} should listen, is taken. Stop what listens there, "
                f"or choose another with {PORT_OPTIONS[name]} (0: any free one)."
            )
        if port in ports.values():
            raise WrongUse(
                f"Port {port} is asked for twice, the second time for the {name}; {PORT_OPTIONS[name]} names it."
            )
        ports[f"{name}_port"] = port
    data_dir = data_dir.absolute()
    make_folder(data_dir, purpose="where Sluice keeps its data on this machine")
    return Plan(data_dir, load(**ports))


@asynccontextmanager
async def running(plan: Plan, *, say: Say, follow: bool) -> AsyncIterator[Stack]:
    """Everything, started and ready; stopped and gone afterwards. `follow`: also tell the services' log lines.

    Raises EmbeddedError, CliError; `PartEnded` comes to whoever waits on `stack.parts`.
    """
    async with AsyncExitStack() as stopping:
        lock = await lock_folder(plan.data_dir)
        stopping.callback(lock.release)
        if "jwt_secret" not in plan.settings.model_fields_set:
            connection.keep_secret(plan.data_dir)  # made or refused now, not when the servers have started
        http = await stopping.enter_async_context(_client())
        stack = Stack(Parts(), Supervisor(http=http, say=say, changed=lambda: _write_endpoints(plan, stack)))
        kafka, database_url = await _start_servers(plan, stack, stopping, say)
        environment = _environment(plan, kafka=kafka, database_url=database_url)
        for name, port, own in _members(plan):
            await _start_service(
                name, port, plan, stack, stopping, lock=lock, environment=environment | own, say=say, follow=follow
            )
        stopping.push_async_callback(stack.parts.forget)
        await stack.parts.unless_one_ends(_all_ready(stack.services, http, say))
        stack.endpoints = {
            service.name: service.url for service in reversed(stack.services) if service.name in SERVICES
        } | {"kafka": kafka, "postgres": database_url, "blobs": environment["SLUICE_BLOB_URL"], "pid": os.getpid()}
        _write_endpoints(plan, stack)
        stopping.callback(connection.endpoints_file(plan.data_dir).unlink, missing_ok=True)
        try:
            yield stack
        finally:
            await _before_stop(stack, say)


async def until_signal(story: Coroutine[Any, Any, None]) -> None:
    """Run the story to its end, or until SIGINT or SIGTERM, after which it unwinds; its errors are raised."""
    stop_asked = asyncio.Event()
    with stop_signals(stop_asked):
        told = asyncio.create_task(story)
        asked = asyncio.create_task(stop_asked.wait())
        await asyncio.wait({told, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not told.done():
            told.cancel()
            await asyncio.wait({told})
        if not told.cancelled():
            told.result()


async def _start_servers(plan: Plan, stack: Stack, stopping: AsyncExitStack, say: Say) -> tuple[str, str]:
    """Where Kafka and Postgres answer, started here unless settings name others."""
    kafka = plan.settings.kafka_bootstrap_servers
    database_url = plan.settings.database_url.get_secret_value()
    wanted: list[EmbeddedKafka | EmbeddedPostgres] = []
    if not plan.is_external("kafka_bootstrap_servers"):
        flushed = {"log.flush.interval.messages": "1"} if plan.settings.fsync else {}
        wanted.append(EmbeddedKafka(data_dir=plan.data_dir, log=lambda line: say("kafka", line), properties=flushed))
    if not plan.is_external("database_url"):
        wanted.append(
            EmbeddedPostgres(data_dir=plan.data_dir, log=lambda line: say("postgres", line), fsync=plan.settings.fsync)
        )
    for server in wanted:
        stopping.push_async_callback(_stop_server, server, say)
    with one_error():
        async with asyncio.TaskGroup() as starting:
            for server in wanted:
                say(server.name, "starting")
                starting.create_task(server.start())
    for server in wanted:
        stack.servers.append(Server(server))
        stack.parts.watch(stack.servers[-1], server.wait)
        match server:
            case EmbeddedKafka():
                kafka = server.bootstrap_servers
            case EmbeddedPostgres():
                database_url = server.url
    return kafka, database_url


async def _stop_server(server: EmbeddedKafka | EmbeddedPostgres, say: Say) -> None:
    if not server.runs:
        await server.stop()  # what it holds
        return
    began = time.monotonic()
    await server.stop()
    say(server.name, f"stopped after {time.monotonic() - began:.1f} s")


def _members(plan: Plan) -> list[tuple[str, int, dict[str, str]]]:
    """Name, port and own settings of each service, in the order of their start: a processor for every lane."""
    members: list[tuple[str, int, dict[str, str]]] = []
    for name in SERVICES:
        port: int = getattr(plan.settings, f"{name}_port")
        members.append((name, port, {"SLUICE_PARTITION": "0"} if name == "processor" else {}))
        if name == "processor" and plan.settings.partitions > 1:
            ports = free_ports(plan.settings.partitions - 1)
            members += [
                (f"processor-{lane}", port, {"SLUICE_PARTITION": str(lane), "SLUICE_PROCESSOR_PORT": str(port)})
                for lane, port in enumerate(ports, start=1)
            ]
    return members


async def _start_service(
    name: str,
    port: int,
    plan: Plan,
    stack: Stack,
    stopping: AsyncExitStack,
    *,
    lock: FolderLock,
    environment: dict[str, str],
    say: Say,
    follow: bool,
) -> None:
    say(name, "starting")
    service = await Service.start(
        name,
        url=_url(plan.settings.host, port),
        log_file=plan.data_dir / "logs" / f"{name}.log",
        lock=lock,
        environment=environment,
        grace_s=plan.settings.stop_timeout_s,
        followed=follow,
    )
    if follow:
        await stopping.enter_async_context(followed(name, service.log_file, service.log_began, say))

    async def stop_it() -> None:
        stack.clean &= await stop(service, say=say)

    stopping.push_async_callback(stop_it)
    stack.parts.watch(service, service.wait)
    stack.services.append(service)


async def _all_ready(started: list[Service], http: httpx.AsyncClient, say: Say) -> None:
    async def one(service: Service) -> None:
        say(service.name, f"ready at {await service.ready(http)}")

    with one_error():
        async with asyncio.TaskGroup() as waiting:
            for service in started:
                waiting.create_task(one(service))


async def _before_stop(stack: Stack, say: Say) -> None:
    """Say how often parts were started again. Where a server is missing the services cannot drain in good order, nor
    where a part's end is the end of all: then none waits for another's limit.
    """
    await stack.parts.forget()
    for name, restarts in stack.supervisor.restarts.items():
        say(name, f"was started again {restarts} time{'s' if restarts > 1 else ''}")
    missing = [part.name for part in stack.members() if part.pid is None]
    if any(server.pid is None for server in stack.servers) or (missing and not stack.kept):
        say("up", f"without {' and '.join(missing)}: stopping all services at once")
        stops = (stop(service, say=say, within_s=STOP_AFTER_DEATH_S) for service in stack.services)
        stack.clean &= all(await asyncio.gather(*stops))


def _environment(plan: Plan, *, kafka: str, database_url: str) -> dict[str, str]:
    """What the services are told: the caller's settings, and over them what is decided here."""
    known = {f"SLUICE_{name.upper()}" for name in Settings.model_fields}
    given = {name.upper(): value for name, value in os.environ.items() if name.upper() in known}
    if "jwt_secret" not in plan.settings.model_fields_set:
        given["SLUICE_JWT_SECRET"] = connection.keep_secret(plan.data_dir)
    return given | {
        "SLUICE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "SLUICE_DATABASE_URL": database_url,
        "SLUICE_BLOB_URL": plan.settings.blob_url or (plan.data_dir / "blobs").as_uri(),
        **{f"SLUICE_{name.upper()}_PORT": str(getattr(plan.settings, f"{name}_port")) for name in SERVICES},
    }


def _write_endpoints(plan: Plan, stack: Stack) -> None:
    stack.endpoints["pids"] = stack.pids()
    connection.write_endpoints(plan.data_dir, stack.endpoints)


def _client() -> httpx.AsyncClient:
    """For asking our own services how they are: a connection each time, since any of them may be another process."""
    return httpx.AsyncClient(trust_env=False, timeout=ASK_TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))


def is_free(settings: Settings, port: int) -> bool:
    """Whether a service can listen there. Raises WrongUse where something else than a taken port is in the way."""
    try:
        bound(settings.host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise WrongUse(
            f"No service can listen on port {port} of SLUICE_HOST={settings.host!r}: {error.strerror or error}. Set "
            "SLUICE_HOST to an address of this machine, and choose a port that you may use."
        ) from error
    return True


def _another_port(*, taken: set[int]) -> int:
    return next(port for port in free_ports(len(taken) + 1) if port not in taken)


def _url(host: str, port: int) -> str:
    """Where a service that listens there can be asked from here."""
    asked = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  # compared, not listened on
    return f"http://{host_in_url(asked)}:{port}"
