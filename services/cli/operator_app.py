"""The commands for operators, `log`, `sweep` and `doctor`: what each takes. They talk to the stores directly.

What they do is in `operators.py` and `archives.py`, which are imported when one of them is called: with the clients of
Kafka and Postgres they would double the time that every other command takes to start.
"""

from typing import Annotated

import typer

from services.cli.connection import DEFAULT_DATA_DIR
from services.cli.options import AsJson, DataDir

DAY_H = 24.0

log = typer.Typer(no_args_is_help=True, help="Look at the log itself, save it, bring it back.")


@log.command("tail")
def log_tail_command(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="start|POSITION", help="Begin with the log's first record, or with this one."),
    ] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="POSITION", help="End with this record.")] = None,
    newest: Annotated[
        int | None,
        typer.Option("--newest", "-n", min=0, help="Without --from: how many to begin with; 10 if not given."),
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Only facts of this batch.")] = None,
    upload: Annotated[str | None, typer.Option(help="Only facts of this upload.")] = None,
    user: Annotated[str | None, typer.Option(help="Only facts of this user's batches.")] = None,
    event_type: Annotated[str | None, typer.Option("--type", help="Only facts such as UploadFailed.")] = None,
    *,
    follow: Annotated[bool, typer.Option(help="Go on as facts come, until Ctrl-C.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show the facts in the log, and go on showing them as they come. With --json one JSON object a line."""
    from services.cli import log_tail, operators  # noqa: PLC0415  # see the module's text

    wanted = log_tail.Filter(batch=batch, upload=upload, user=user, type=event_type)
    newest = log_tail.checked(wanted, start=start, newest=newest)
    operators.show_log(data_dir, wanted, start=start, end=end, newest=newest, follow=follow, as_json=as_json)


@log.command("export")
def log_export_command(
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A folder, or s3://bucket/prefix.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    batch: Annotated[str | None, typer.Option(help="Only this batch, as a log that rebuilds it elsewhere.")] = None,
    erase: Annotated[str | None, typer.Option(metavar="USER", help="All but what this user's batches say.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Copy the log into files with checksums. Run again, it goes on: what is new is added.

    The services may run meanwhile. The bytes of uploads are no part of it.
    """
    from services.cli import archives  # noqa: PLC0415  # see the module's text

    archives.export_log(data_dir, dest, batch=batch, erase=erase, as_json=as_json)


@log.command("import")
def log_import_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What `log export` wrote.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    as_json: AsJson = False,
) -> None:
    """Write an export into an empty Kafka, at the same positions. Run again, it goes on.

    Where nothing runs in the data folder, its Kafka is started for this; `sluice up` then starts with the log.
    """
    from services.cli import archives  # noqa: PLC0415  # see the module's text

    archives.import_log(data_dir, source, as_json=as_json)


def sweep_command(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    older_than_h: Annotated[
        float, typer.Option(min=0, help="How many hours old a blob must be to count as left over.")
    ] = DAY_H,
    keep_trash_h: Annotated[float, typer.Option(min=0, help="How many hours the trash keeps what was moved there.")] = 7
    * DAY_H,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    contents: Annotated[bool, typer.Option(help="Read every file and compare its SHA-256, not its size only.")] = True,
    as_json: AsJson = False,
) -> None:
    """Move blobs that nobody refers to into the trash, and report files that are missing or damaged.

    Exits 1 if a file is missing or damaged. The services may run meanwhile.
    """
    from services.cli import operators  # noqa: PLC0415  # see the module's text

    ages = operators.Ages(blob_h=older_than_h, trash_h=keep_trash_h)
    operators.sweep(data_dir, ages, dry_run=dry_run, contents=contents, as_json=as_json)


def doctor_command(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    mend: Annotated[
        bool, typer.Option("--mend", help="First set right the topic's settings and the public views.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check all that a start needs and, where Sluice runs, how it is; say how to mend what is wrong.

    Changes nothing without --mend. Exits 1 if something is wrong.
    """
    from services.cli import operators  # noqa: PLC0415  # see the module's text

    operators.examine(data_dir, mend=mend, as_json=as_json)
