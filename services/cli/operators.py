"""What the commands for operators do, in which order, and what they answer; `operator_app.py` says what they take.

The doing itself is in `log_tail.py`, `services/sweeping.py` and `doctor.py`.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.blobs import StorageUnavailable
from services.cli import doctor, log_tail, up
from services.cli.display import clean, console_of, print_json, size
from services.cli.errors import EXIT_FAILURE, EXIT_INTERRUPTED, CliError, WrongUse
from services.cli.log_tail import Filter
from services.cli.operating import kafka_of, log_id_of, opened_database, opened_log, operator_settings
from services.lifecycle import StartError
from services.opening import open_blobs
from services.processor.rebuilding import RebuildRefused
from services.processor.replay import mended_views
from services.settings import Settings
from services.sweeping import Report, Sweeper, SweepRefused

HOUR_S = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ages:
    """How many hours old a blob that nobody refers to must be, and how long the trash keeps it then."""

    blob_h: float
    trash_h: float


def show_log(
    data_dir: Path, wanted: Filter, *, start: str | None, end: str | None, newest: int, follow: bool, as_json: bool
) -> None:
    """Show the facts that are wanted, until the end or Ctrl-C."""
    needs = ("kafka_bootstrap_servers", *(("database_url",) if wanted.user is not None else ()))
    settings = operator_settings(data_dir=data_dir, needs=needs)
    console = console_of(stderr=True)

    def note(text: str) -> None:
        console.print(clean(text), markup=False)

    async def story() -> None:
        async with contextlib.AsyncExitStack() as stack:
            opened = await stack.enter_async_context(opened_log(settings))
            span = await log_tail.span(opened, start=start, end=end, newest=newest, follow=follow)
            log_id = await log_id_of(opened)
            users = log_tail.Users(
                await stack.enter_async_context(opened_database(settings)) if wanted.user is not None else None
            )
            async with contextlib.aclosing(log_tail.facts(opened, span, note=note)) as groups:
                async for facts in groups:
                    await users.learn(facts)
                    for fact in facts:
                        if wanted.takes(fact, users.of):
                            log_tail.show(fact, log_id=log_id, as_json=as_json)

    asyncio.run(up.until_signal(story()))


def sweep(data_dir: Path, ages: Ages, *, dry_run: bool, contents: bool, as_json: bool) -> None:
    """Sweep the blob store and tell what was found; raises typer.Exit where a file is missing or damaged."""
    settings = operator_settings(data_dir=data_dir, needs=("kafka_bootstrap_servers", "database_url", "blob_url"))
    if settings.blob_bucket is None and not settings.blob_folder.is_dir():
        raise WrongUse(f"{settings.blob_folder}, which SLUICE_BLOB_URL names, is no folder: nothing to sweep there.")

    async def story() -> Report:
        with _progress(console_of(stderr=True)) as on_step:
            async with (
                opened_log(settings) as opened,
                opened_database(settings) as database,
                open_blobs(settings) as store,
            ):
                sweeper = Sweeper(
                    log=opened,
                    database=database,
                    store=store,
                    age_s=ages.blob_h * HOUR_S,
                    trash_s=ages.trash_h * HOUR_S,
                    dry_run=dry_run,
                    contents=contents,
                    on_step=on_step,
                )
                return await sweeper.run()

    try:
        report = asyncio.run(story())
    except (SweepRefused, StorageUnavailable, StartError) as error:
        raise CliError(f"Nothing was swept: {error}.") from error
    if as_json:
        print_json({name: value for name, value in dataclasses.asdict(report).items() if name != "step"})
    else:
        _show_sweep(report, settings)
    if report.faults:
        raise typer.Exit(EXIT_FAILURE)


def examine(data_dir: Path, *, mend: bool, as_json: bool) -> None:
    """Make every check and tell what they found, with `mend` after topic and views were mended; raises typer.Exit where
    something is wrong."""
    data_dir = data_dir.absolute()
    mended = _mended(data_dir) if mend else []
    if not as_json:
        for line in mended or (["nothing to mend"] if mend else []):
            console_of().print(clean(line), markup=False, soft_wrap=True)
    findings = asyncio.run(doctor.examine(data_dir))
    if as_json:
        told = {"healthy": doctor.healthy(findings), "checks": [dataclasses.asdict(each) for each in findings]}
        print_json(told | ({"mended": mended} if mend else {}))
    else:
        console_of().print(doctor.table(findings))
    if not doctor.healthy(findings):
        raise typer.Exit(EXIT_FAILURE)


def _mended(data_dir: Path) -> list[str]:
    """Set right the settings of the log's topic and, where a Postgres is named or runs, where the public views point;
    what was changed."""
    done: list[list[str]] = []

    async def story() -> None:
        async with kafka_of(data_dir, make=False) as settings, opened_log(settings) as opened:
            changed = await opened.mend(fsync=settings.fsync)
        patient = doctor.patient_in(data_dir)
        if patient.runs or "database_url" in patient.external:
            try:
                async with opened_database(patient.settings) as database:
                    changed += await mended_views(database)
            except (CliError, RebuildRefused) as error:
                changed.append(f"the public views were not looked at: {error}")
        done.append(changed)

    asyncio.run(up.until_signal(story()))
    if not done:
        raise typer.Exit(EXIT_INTERRUPTED)
    return done[0]


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """What to call at each step: a line on a terminal that says how far it is, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda _report: None
        return
    with console.status("") as status:
        yield lambda report: status.update(_step(report))


def _step(report: Report) -> str:
    if report.uploads_in_all is None:
        return f"{report.step}: {report.blobs} blobs, {size(report.bytes)}"
    return f"{report.step}: {report.uploads} of {report.uploads_in_all}"


def _show_sweep(report: Report, settings: Settings) -> None:
    console = console_of()
    would = "would be moved" if report.dry_run else "moved"
    place = settings.blob_folder if settings.blob_bucket is None else settings.blob_url
    lines = [
        f"{report.blobs} blobs, {size(report.bytes)}, in {place}",
        f"{len(report.discarded)} that nobody refers to, {size(report.discarded_bytes)}, {would} into the trash",
        f"{report.young} more that nobody refers to, but that are too young",
    ]
    if report.spared:
        lines.append(f"{report.spared} spared, since a record in quarantine may name them")
    if report.emptied:
        lines.append(f"{report.emptied} removed for good from the trash")
    lines += [f"brought back from the trash: {name}" for name in report.brought_back]
    lines.append(f"{report.uploads} files checked, {len(report.faults)} missing or damaged")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if report.faults:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("file", "upload", "batch", "problem"):
            table.add_column(heading, no_wrap=heading in ("upload", "batch"))
        for fault in report.faults:
            problem = Text.assemble((fault.problem, "red"), f": {fault.detail}")
            table.add_row(Text(clean(fault.filename)), fault.upload_id, fault.batch_id, problem)
        console.print()
        console.print(table)
        console.print("\nBytes cannot be made again from the log: restore them from a backup, or send the files anew.")
