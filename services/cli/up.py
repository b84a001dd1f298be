"""Everything on this machine: Kafka ‖ Postgres, then the three services, until told to stop or until a part dies.

`running` reads top to bottom in the order of the start, and the stop is the same backwards: the api first, so that
nothing new comes in, then the processor, which gives its file back, then the notifier, which tells that to who watches,
then the servers. Servers named by SLUICE_KAFKA_BOOTSTRAP_SERVERS and SLUICE_DATABASE_URL are used as they are.
Each part as a child process: `parts.py`; the embedded servers: `services/embedded`.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.cli import connection
from services.cli.errors import WrongUse, one_error
from services.cli.parts import PartEnded, Parts, Say, Service, followed, stop
from services.embedded import EmbeddedKafka, EmbeddedPostgres
from services.embedded.folders import FolderLock, free_ports, lock_folder, make_folder
from services.lifecycle import stop_signals
from services.settings import Settings, load

SERVICES = ("notifier", "processor", "api")
"""In the order of their start; they are stopped the other way round."""
STOP_AFTER_DEATH_S = 5.0
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
    """What runs. `clean` becomes false when a part did not stop as it should."""

    parts: Parts
    endpoints: dict[str, Any] = field(default_factory=dict)
    clean: bool = True


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
    stack = Stack(Parts())
    async with AsyncExitStack() as stopping:
        lock = await lock_folder(plan.data_dir)
        stopping.callback(lock.release)
        if "jwt_secret" not in plan.settings.model_fields_set:
            connection.keep_secret(plan.data_dir)  # made or refused now, not when the servers have started
        kafka, database_url = await _start_servers(plan, stack, stopping, say)
        environment = _environment(plan, kafka=kafka, database_url=database_url)
        started = [
            await _start_service(
                name, port, plan, stack, stopping, lock=lock, environment=environment | own, say=say, follow=follow
            )
            for name, port, own in _members(plan)
        ]
        stopping.push_async_callback(stack.parts.forget)
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
            await stack.parts.unless_one_ends(_all_ready(started, http, say))
        stack.endpoints = {service.name: service.url for service in reversed(started) if service.name in SERVICES} | {
            "kafka": kafka,
            "postgres": database_url,
            "blobs": environment["SLUICE_BLOB_URL"],
            "pid": os.getpid(),
        }
        connection.write_endpoints(plan.data_dir, stack.endpoints)
        stopping.callback(connection.endpoints_file(plan.data_dir).unlink, missing_ok=True)
        try:
            yield stack
        except PartEnded:
            await _stop_all_at_once(stack, started, say)
            raise


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
        size = server.log_file.stat().st_size
        stack.parts.watch(server.name, server.wait, log_file=server.log_file, log_began=max(0, size - 4_000))
        match server:
            case EmbeddedKafka():
                kafka = server.bootstrap_servers
            case EmbeddedPostgres():
                database_url = server.url
    return kafka, database_url


async def _stop_server(server: EmbeddedKafka | EmbeddedPostgres, say: Say) -> None:
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
) -> Service:
    say(name, "starting")
    service = await Service.start(
        name,
        url=f"http://{_reachable(plan.settings.host)}:{port}",
        log_file=plan.data_dir / "logs" / f"{name}.log",
        lock=lock,
        environment=environment,
        grace_s=plan.settings.stop_timeout_s,
    )
    if follow:
        await stopping.enter_async_context(followed(name, service.log_file, service.log_began, say))

    async def stop_it() -> None:
        stack.clean &= await stop(service, say=say)

    stopping.push_async_callback(stop_it)
    stack.parts.watch(name, service.wait, log_file=service.log_file, log_began=service.log_began)
    return service


async def _all_ready(started: list[Service], http: httpx.AsyncClient, say: Say) -> None:
    async def one(service: Service) -> None:
        await service.ready(http)
        say(service.name, f"ready at {service.url}")

    with one_error():
        async with asyncio.TaskGroup() as waiting:
            for service in started:
                waiting.create_task(one(service))


async def _stop_all_at_once(stack: Stack, started: list[Service], say: Say) -> None:
    """Where a part is missing the others cannot drain in good order: none should wait for another's limit."""
    say("up", "a part ended, stopping the others")
    await stack.parts.forget()
    await asyncio.gather(*(service.process.stop(within_s=STOP_AFTER_DEATH_S) for service in started))


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


def is_free(settings: Settings, port: int) -> bool:
    try:
        socket.create_server((settings.host, port)).close()
    except OSError:
        return False
    return True


def _another_port(*, taken: set[int]) -> int:
    return next(port for port in free_ports(len(taken) + 1) if port not in taken)


def _reachable(host: str) -> str:
    """Where a service that listens on every address can be asked from here."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  # compared, not listened on
