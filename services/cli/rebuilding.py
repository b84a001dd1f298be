"""`sluice replay` and `sluice verify`: opening the stores and telling what it came to.

The doing itself is in services/processor: `replay.py`, `verifying.py`; how far it is, meanwhile, `telling.py` says.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from schemas.position import Position
from services.cli.display import clean, console_of, duration, print_json, print_line
from services.cli.errors import EXIT_FAILURE, CliError
from services.cli.operating import log_id_of, opened_database, opened_log, operator_settings, partitions_of
from services.cli.telling import News, told_meanwhile
from services.database import Database
from services.eventlog import EventLog
from services.observability import configure_logging
from services.processor.rebuilding import RECORDS_MAX, OnStep, Places, RebuildRefused
from services.processor.replay import Replay, Replayed
from services.processor.verifying import Difference, Verification, Verified
from services.settings import Settings

NEEDS = ("kafka_bootstrap_servers", "database_url")
POOL_MAX = 6
SOURCE = "sluice/replay"


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """A log and the database of its read models."""

    log: EventLog
    log_id: str
    partitions: int
    database: Database


def replay(data_dir: Path, *, records_max: int | None, as_json: bool) -> None:
    """Rebuild, switch and tell."""

    async def story() -> tuple[Replayed, str]:
        async with opened_stores(data_dir) as stores:
            return await replayed(stores, as_json=as_json, records_max=records_max), stores.log_id

    with refusals("Nothing was changed"):
        done, log_id = asyncio.run(story())
    if as_json:
        print_json(as_shown(done, log_id))
    else:
        print_line(told(done, log_id))


async def replayed(
    stores: Opened, *, as_json: bool, records_max: int | None = None, retried: Places = frozenset()
) -> Replayed:
    """Replay a log that is whole: an import that is unfinished is refused."""
    await stores.log.ensure_created(partitions=stores.partitions, source=SOURCE)
    with progress_told(as_json=as_json) as on_step:
        return await Replay(
            log=stores.log,
            log_id=stores.log_id,
            partitions=stores.partitions,
            database=stores.database,
            on_step=on_step,
            records_max=records_max or RECORDS_MAX,
            retried=retried,
        ).run()


def as_shown(done: Replayed, log_id: str) -> dict[str, Any]:
    return {
        "generation": done.generation,
        "position": position_of(log_id, done.next_offsets),
        "records": done.records,
        "seconds": round(done.seconds, 3),
        "records_per_s": round(done.records / done.seconds, 1),
        "held_ms": done.held_ms,
        "quarantined": done.quarantined,
        "old_dropped": done.old_dropped,
    }


def told(done: Replayed, log_id: str) -> str:
    """What a replay came to, in a sentence or three."""
    upto = position_of(log_id, done.next_offsets)
    sentences = [
        f"The read models were rebuilt from {done.records} records in {duration(done.seconds)} and are live, to {upto}."
    ]
    if done.quarantined:
        sentences.append(f"{done.quarantined} records are in quarantine: see `sluice quarantine list`.")
    if not done.old_dropped:
        sentences.append("The old tables are still being read by somebody; the next replay drops them.")
    return " ".join(sentences)


def verify(data_dir: Path, *, records_max: int | None, as_json: bool) -> None:
    """Rebuild, compare and tell; raises typer.Exit where rows differ."""

    async def story() -> tuple[Verified, str]:
        async with opened_stores(data_dir) as stores:
            with progress_told(as_json=as_json) as on_step:
                verification = Verification(
                    log=stores.log,
                    log_id=stores.log_id,
                    database=stores.database,
                    on_step=on_step,
                    records_max=records_max or RECORDS_MAX,
                )
                return await verification.run(), stores.log_id

    with refusals("Nothing was compared"):
        found, log_id = asyncio.run(story())
    if as_json:
        print_json(_verified(found, log_id))
    else:
        _show_verified(found, log_id)
    if not found.equal:
        raise typer.Exit(EXIT_FAILURE)


def _verified(found: Verified, log_id: str) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "generation": found.generation,
        "position": position_of(log_id, found.next_offsets),
        "records": found.records,
        "seconds": round(found.seconds, 3),
        "rows": found.rows,
        "differing": found.differing,
        "differences": [dataclasses.asdict(each) for each in found.shown],
    }


def _show_verified(found: Verified, log_id: str) -> None:
    where = f"as of {position_of(log_id, found.next_offsets)}"
    if found.equal:
        print_line(
            f"Equal {where}: {sum(found.rows.values())} rows are what the {found.records} records of the log say."
        )
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("table", "key", "column", "live", "", "rebuilt"):
        table.add_column(heading, overflow="fold")
    for each in found.shown:
        table.add_row(
            each.table, clean(each.key), each.column or "(row)", _side(each, "live"), "≠", _side(each, "rebuilt")
        )
    console_of().print(table)
    counts = ", ".join(f"{count} of {table}" for table, count in found.differing.items())
    print_line(f"Different {where}: {counts}. `sluice replay` puts the rebuilt rows in the place of the live ones.")


def _side(difference: Difference, side: str) -> Text:
    value: str | None = getattr(difference, side)
    if value is None:
        return Text("(no row)" if difference.column is None else "(null)", style="dim")
    return Text(clean(value))


# Shared with the quarantine's commands


@contextlib.asynccontextmanager
async def opened_stores(data_dir: Path) -> AsyncIterator[Opened]:
    """The log and the database that settings or a running `up` name. Raises CliError."""
    settings: Settings = operator_settings(data_dir=data_dir, needs=NEEDS)
    configure_logging(service="cli", log_format=settings.log_format, log_level="error")
    async with opened_log(settings) as log, opened_database(settings, pool_max=POOL_MAX) as database:
        yield Opened(log, await log_id_of(log), len(await partitions_of(log)), database)


@contextlib.contextmanager
def refusals(consequence: str) -> Iterator[None]:
    """RebuildRefused as a person is told."""
    try:
        yield
    except RebuildRefused as error:
        raise CliError(f"{consequence}: {error}.") from error


@contextlib.contextmanager
def progress_told(*, as_json: bool) -> Iterator[OnStep]:
    """What to call as it goes on."""
    with told_meanwhile(as_json=as_json) as tell:
        yield lambda progress: tell(News(progress.step, progress.records, progress.records_in_all))


def position_of(log_id: str, next_offsets: dict[int, int]) -> str:
    return str(Position.of(log_id, {number: end - 1 for number, end in next_offsets.items() if end}))
