"""The commands about the read models and what they leave out, `replay`, `verify` and `quarantine`: what each takes.

What they do is in `rebuilding.py` and `quarantine.py`, imported when one of them is called, as in `operator_app.py`.
"""

from typing import Annotated

import typer

from services.cli.connection import DEFAULT_DATA_DIR
from services.cli.options import AsJson, DataDir

SHOWN_MAX = 100

RecordsMax = Annotated[
    int | None, typer.Option(min=1, max=1_000_000, hidden=True, help="Records of one poll; the result is the same.")
]

quarantine = typer.Typer(no_args_is_help=True, help="Look at records that nobody could decode, and try them again.")


def replay_command(
    data_dir: DataDir = DEFAULT_DATA_DIR, records_max: RecordsMax = None, *, as_json: AsJson = False
) -> None:
    """Rebuild the read models from the log beside the live ones, then switch to them.

    The services may run meanwhile. Whatever ends it before the switch, the live read models are as they were.
    """
    from services.cli import rebuilding  # noqa: PLC0415  # see the module's text

    rebuilding.replay(data_dir, records_max=records_max, as_json=as_json)


def verify_command(
    data_dir: DataDir = DEFAULT_DATA_DIR, records_max: RecordsMax = None, *, as_json: AsJson = False
) -> None:
    """Rebuild the read models from the log and compare them with the live ones, row by row.

    The services may run meanwhile. Changes nothing. Exits 1 if a row differs.
    """
    from services.cli import rebuilding  # noqa: PLC0415  # see the module's text

    rebuilding.verify(data_dir, records_max=records_max, as_json=as_json)


@quarantine.command("list")
def quarantine_list_command(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    limit: Annotated[int, typer.Option(min=1, help="How many to show, oldest first.")] = SHOWN_MAX,
    *,
    as_json: AsJson = False,
) -> None:
    """Show the records in quarantine: where they stand, since when, their type as they name it, and why."""
    from services.cli import quarantine as doing  # noqa: PLC0415  # see the module's text

    doing.show_all(data_dir, limit=limit, as_json=as_json)


@quarantine.command("show")
def quarantine_show_command(
    position: Annotated[str, typer.Argument(metavar="POSITION")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    as_json: AsJson = False,
) -> None:
    """Show one record as it lies in the log: headers, key and value; with --json all of its bytes."""
    from services.cli import quarantine as doing  # noqa: PLC0415  # see the module's text

    doing.show_one(data_dir, position, as_json=as_json)


@quarantine.command("retry")
def quarantine_retry_command(
    positions: Annotated[list[str] | None, typer.Argument(metavar="[POSITION]...")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    every: Annotated[bool, typer.Option("--all", help="All that are in quarantine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take out of quarantine what this version can decode, by a replay in which it counts from where it stands.

    Run it after a fix, with all services already on the fixed version. Exits 1 if something has to stay.
    """
    from services.cli import quarantine as doing  # noqa: PLC0415  # see the module's text

    doing.retry(data_dir, positions or [], every=every, as_json=as_json)
