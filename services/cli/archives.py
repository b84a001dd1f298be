"""`sluice log export` and `sluice log import`: which Kafka is meant, how far it is, and what was done at the end.

Where nothing runs in --data-dir and no setting names a Kafka, the one of that folder is started for as long as it
takes: so an export needs no running Sluice, and an import can fill a folder that `sluice up` then starts on. The doing
itself is in services/archive.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import typer

from services.archive.exporting import Exporter, OnProgress
from services.archive.importing import Imported, Importer
from services.archive.manifest import ArchiveRefused, Manifest
from services.archive.places import Place, PlaceUnavailable, place_of
from services.archive.selecting import Erasure, Selection, Slice, Whole
from services.cli import up
from services.cli.display import console_of, print_json, size
from services.cli.errors import EXIT_INTERRUPTED, CliError, WrongUse
from services.cli.operating import kafka_of, opened_log
from services.cli.telling import News, told_meanwhile


def export_log(data_dir: Path, dest: str, *, batch: str | None, erase: str | None, as_json: bool) -> None:
    """Export the log, or what is wanted of it, and tell what is there now."""
    place, data_dir = _place(dest), data_dir.absolute()
    if batch is not None and erase is not None:
        raise WrongUse("--batch and --erase are two different exports: give one of them.")
    done: list[Manifest] = []

    async def story() -> None:
        with _told(), _shown_progress() as on_progress:
            async with kafka_of(data_dir, make=False) as settings, opened_log(settings) as log:
                done.append(await Exporter(log, place, _selection(batch, erase), on_progress).run())

    asyncio.run(up.until_signal(story()))
    _require_done(done)
    manifest = done[0]
    if as_json:
        print_json(
            {
                "place": str(place),
                "log_id": manifest.log_id,
                "kind": manifest.kind,
                "ends": {str(partition): end for partition, end in manifest.ends.items()},
                "segments": len(manifest.segments),
                "size_bytes": manifest.size_bytes,
            }
        )
        return
    console_of().print(
        f"{manifest.records} records of the log {manifest.log_id} in {place}: {len(manifest.segments)} segments, "
        f"{size(manifest.size_bytes)}",
        markup=False,
        soft_wrap=True,
    )


def import_log(data_dir: Path, source: str, *, as_json: bool) -> None:
    """Import an archive and tell which log there is now."""
    place, data_dir = _place(source), data_dir.absolute()
    done: list[Imported] = []

    async def story() -> None:
        with _told(), _shown_progress() as on_progress:
            async with kafka_of(data_dir, make=True) as settings, opened_log(settings) as log:
                importer = Importer(
                    log,
                    place,
                    on_progress,
                    replication_factor=settings.replication_factor,
                    fsync=settings.fsync,
                )
                done.append(await importer.run())

    asyncio.run(up.until_signal(story()))
    _require_done(done)
    imported = done[0]
    if as_json:
        print_json(dataclasses.asdict(imported))
        return
    lines = [
        f"The log {imported.log_id} has the {imported.records} records of {imported.previous_log_id}"
        + (f", {imported.written} of them written now." if imported.written else "; nothing was missing."),
        "Positions of that log are good here too. Start the services on an empty database, and they rebuild all.",
    ]
    if imported.partitions > 1:
        lines.append(f"It has {imported.partitions} partitions: start with SLUICE_PARTITIONS={imported.partitions}.")
    for line in lines:
        console_of().print(line, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What an archive refuses, as a person is told."""
    try:
        yield
    except (ArchiveRefused, PlaceUnavailable) as error:
        text = str(error)
        raise CliError(f"{text[:1].upper()}{text[1:]}.") from error


def _selection(batch: str | None, erase: str | None) -> Selection:
    if batch is not None:
        return Slice(batch)
    return Erasure(erase) if erase is not None else Whole()


def _place(text: str) -> Place:
    try:
        return place_of(text)
    except ValueError as error:
        raise WrongUse(f"{error}.") from error


def _require_done(done: list[Manifest] | list[Imported]) -> None:
    if not done:
        console_of(stderr=True).print("Interrupted: run the same command again, it goes on where it was.")
        raise typer.Exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _shown_progress() -> Iterator[OnProgress]:
    """What to call with news."""
    with told_meanwhile() as tell:
        yield lambda progress: tell(News(progress.step, progress.done, progress.of, progress.unit))
