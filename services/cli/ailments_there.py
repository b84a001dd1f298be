"""What can be wrong with Kafka, Postgres and the services: reachable, of a fit version, with the right settings, of the
same log, with clocks that agree, ready.

See `checkup.py`. Asked are the servers that settings name, else those of the `up` that runs in the data folder.
"""

import time
from collections.abc import Sequence

import httpx

from schemas.position import Position
from services.cli.checkup import Ailing, Check, NotNeeded, Patient
from services.cli.errors import CliError
from services.cli.operating import opened_database, opened_log
from services.cli.up import SERVICES
from services.database import SILENT_S
from services.eventlog import LogRefused
from services.eventlog.topics import MENDED_BY
from services.migrating import missing_tables
from services.opening import grown_again
from services.processor.replay import astray_views

CLOCK_DIFFERENCE_S_MAX = 2.0
READY_TIMEOUT_S = 5.0


async def kafka(patient: Patient) -> str:
    _only_where(patient, "kafka_bootstrap_servers")
    servers = patient.settings.kafka_bootstrap_servers
    try:
        async with opened_log(patient.settings) as log:
            return f"Kafka {await log.check_version()} answers at {servers}"
    except CliError as error:
        raise Ailing(str(error), _way_to("kafka", patient)) from error


async def topic(patient: Patient) -> str:
    _only_where(patient, "kafka_bootstrap_servers")
    settings = patient.settings
    async with opened_log(settings) as log:
        found = await log.inspect(fsync=settings.fsync)
    if found is None:
        return f"there is no {settings.log_topic} yet; the first start makes it"
    if found.complaint is not None:
        what, _, more = found.complaint.partition(MENDED_BY)
        raise Ailing(what, f"{MENDED_BY.removeprefix(': ')}{more}")
    if found.partitions > settings.partitions and "partitions" in settings.model_fields_set:
        raise Ailing(
            f"{settings.log_topic} has {found.partitions} partitions, SLUICE_PARTITIONS is {settings.partitions}",
            f"set SLUICE_PARTITIONS={found.partitions}: partitions are never taken away",
        )
    return f"{settings.log_topic} keeps everything, in {found.partitions} partition(s)"


async def database(patient: Patient) -> str:
    _only_where(patient, "database_url")
    try:
        async with opened_database(patient.settings) as opened, opened.connection() as connection:
            version = await connection.fetchval("SHOW server_version")
            migrated = await connection.fetchval("SELECT to_regclass('sluice_ops.live_generation') IS NOT NULL")
            broken = [] if not migrated else await missing_tables(connection)
            whole = migrated and not broken
            astray = await astray_views(connection, await opened.generation()) if whole else {}
    except CliError as error:
        raise Ailing(str(error), _way_to("postgres", patient)) from error
    if broken:
        raise Ailing(
            f"Postgres {version} answers, but tables are gone: {', '.join(broken)}",
            "start a processor: it makes the read models anew from the log",
        )
    if astray:
        shown = ", ".join(f"public.{name} shows {instead}" for name, instead in astray.items())
        raise Ailing(
            f"Postgres {version} answers, but views do not show the live tables: {shown}", "run `sluice doctor --mend`"
        )
    tables = "with Sluice's tables" if migrated else "without tables yet; the first start makes them"
    return f"Postgres {version} answers, {tables}"


async def processors(patient: Patient) -> str:
    """Who works the lanes, as they say themselves."""
    _only_where(patient, "database_url")
    async with opened_database(patient.settings) as opened, opened.connection() as connection:
        if not await connection.fetchval("SELECT to_regclass('sluice_ops.processors') IS NOT NULL"):
            raise NotNeeded("no processor of this version was started on this database yet")
        rows = await connection.fetch(
            "SELECT partition, worker_id, state, degraded, problems FROM sluice_ops.processors "  # noqa: S608  # ours
            f"WHERE {SILENT_S} < 5 ORDER BY partition, state DESC"
        )
    if not rows and not patient.runs:
        raise NotNeeded("no processor works on this database now")
    working = {row["partition"] for row in rows if row["state"] == "working"}
    unworked = sorted(set(range(patient.settings.partitions)) - working)
    if unworked:
        raise Ailing(
            f"no processor works lane {', '.join(map(str, unworked))}",
            "start one for each: `python -m services.processor` with SLUICE_PARTITION",
            bearable=not patient.runs,
        )
    without = [f"{row['worker_id']}: {why}" for row in rows for why in (*row["problems"], *row["degraded"])]
    if without:
        raise Ailing("; ".join(without), "look into that processor's log", bearable=True)
    return f"{', '.join(row['worker_id'] for row in rows if row['state'] == 'working')} at work"


async def same_log(patient: Patient) -> str:
    """Kafka and Postgres belong together, and the read models do not reach beyond the log."""
    _only_where(patient, "kafka_bootstrap_servers", "database_url")
    async with opened_log(patient.settings) as log, opened_database(patient.settings) as opened:
        async with opened.connection() as connection:
            if not await connection.fetchval("SELECT to_regclass('sluice_ops.live_generation') IS NOT NULL"):
                raise NotNeeded("Postgres has no tables yet")
        lanes = await opened.positions()
        found = await log.inspect()
        try:
            log_id = await log.identify() if found else None
        except LogRefused as error:
            raise Ailing(f"this is no log of Sluice: {error}", "give Sluice a topic of its own") from error
        if not lanes:
            raise NotNeeded("the read models are empty: they are made from the log")
        if found is None or log_id is None:
            raise Ailing(
                "Postgres has read models, and Kafka has no log",
                "check SLUICE_KAFKA_BOOTSTRAP_SERVERS and SLUICE_LOG_TOPIC, or bring the log back with "
                "`sluice log import`",
            )
        if any(lane.log_id != log_id for lane in lanes.values()):
            theirs = Position.of(next(iter(lanes.values())).log_id, {}).log
            raise Ailing(
                f"Postgres has the read models of the log {theirs}, Kafka has the log {Position.of(log_id, {}).log}",
                "check SLUICE_DATABASE_URL and SLUICE_KAFKA_BOOTSTRAP_SERVERS; where they are right, make the read "
                "models anew from this log with `sluice replay`",
            )
        reader = log.reader(range(found.partitions))
        ends = await reader.ends()
        await reader.close()
        beyond = [number for number, lane in lanes.items() if lane.next_offset > ends.get(number, 0)]
        lost = (
            f"the read models include more than the log holds, in partition {beyond[0]}: its end was lost"
            if beyond
            else await grown_again(log, lanes)
        )
        if lost:
            raise Ailing(
                lost,
                "bring it back with `sluice log import`, or rebuild the read models from the log with `sluice replay`",
            )
    behind = sum(max(0, end - (lanes[number].next_offset if number in lanes else 0)) for number, end in ends.items())
    return f"log {Position.of(log_id, {}).log}; the read models are {behind} records behind it"


async def clocks(patient: Patient) -> str:
    _only_where(patient, "database_url")
    async with opened_database(patient.settings) as opened, opened.connection() as connection:
        began_s = time.time()
        theirs_s = float(await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())"))
        ended_s = time.time()
        migrated = await connection.fetchval("SELECT to_regclass('sluice_ops.live_generation') IS NOT NULL")
        newest_s = (
            max((lane.time_ms / 1000 for lane in (await opened.positions()).values()), default=0.0) if migrated else 0.0
        )
    difference_s = max(began_s - theirs_s, theirs_s - ended_s, 0.0)
    if difference_s > CLOCK_DIFFERENCE_S_MAX:
        raise Ailing(
            f"this machine's clock and Postgres' differ by {difference_s:.1f} s", "set both by NTP", bearable=True
        )
    if newest_s - ended_s > CLOCK_DIFFERENCE_S_MAX:
        raise Ailing(
            f"the newest record of the log is {newest_s - ended_s:.1f} s in the future of this machine",
            "set the clocks of this machine and of Kafka's by NTP",
            bearable=True,
        )
    return f"this machine's clock and Postgres' differ by less than {max(difference_s, 0.1):.1f} s"


async def services(patient: Patient) -> str:
    if not patient.runs:
        raise NotNeeded(f"nothing runs in {patient.data_dir}")
    failing: list[str] = []
    async with httpx.AsyncClient(trust_env=False, timeout=READY_TIMEOUT_S) as http:
        for name in SERVICES:
            try:
                answer = await http.get(f"{patient.endpoints[name]}/readyz")
            except httpx.TransportError as error:
                failing.append(f"{name} gives no answer ({str(error) or type(error).__name__})")
                continue
            if not answer.is_success:
                failing.append(f"{name}: {'; '.join(answer.json().get('problems', [])) or answer.status_code}")
    if failing:
        raise Ailing("; ".join(failing), f"look into {patient.data_dir / 'logs'}, then start `sluice up` again")
    return f"{', '.join(SERVICES)} are ready"


THERE: Sequence[tuple[str, Check]] = (
    ("kafka", kafka),
    ("topic", topic),
    ("postgres", database),
    ("processors", processors),
    ("same log", same_log),
    ("clocks", clocks),
    ("services", services),
)
"""Every check by its name, in order."""


def _only_where(patient: Patient, *needed: str) -> None:
    """Raises NotNeeded where no server is named and none runs."""
    for name in needed:
        if name not in patient.external and not patient.runs:
            raise NotNeeded(f"SLUICE_{name.upper()} is not set and nothing runs: `sluice up` starts its own")


def _way_to(server: str, patient: Patient) -> str:
    setting = {"kafka": "kafka_bootstrap_servers", "postgres": "database_url"}[server]
    if setting in patient.external:
        return f"start it, or correct SLUICE_{setting.upper()}"
    return f"look at {patient.data_dir / 'logs' / f'{server}.log'}, then start `sluice up` again"
