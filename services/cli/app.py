"""The commands: what each takes, in which order it does what, and what it answers. The doing is in the modules beside.

Exit codes: 0 done, 1 it failed (or a file did), 2 wrong use, 130 Ctrl-C. Data goes to standard output, all else to
standard error.
"""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from rich.text import Text

from schemas.ids import is_id
from schemas.text import storable_text
from services.cli import connection, operator_app, rebuild_app, up
from services.cli.board import Board
from services.cli.client import Api
from services.cli.connection import DEFAULT_DATA_DIR, TOKEN_TTL_S, TOKEN_TTL_S_MAX
from services.cli.demo import Demo
from services.cli.display import (
    Silence,
    batches,
    clean,
    console_of,
    display,
    members,
    outcomes,
    past_line,
    print_json,
    print_line,
    processors,
)
from services.cli.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_WRONG_USE,
    CliError,
    Interrupted,
    Refused,
    WrongUse,
)
from services.cli.hints import addresses, data_dir_option, program, up_hints
from services.cli.options import AsJson, DataDir, Port
from services.cli.part_logs import Say
from services.cli.sending import Sent, check_files, send
from services.cli.watching import follow, send_and_follow
from services.embedded import EmbeddedError
from services.settings import SettingsError

BATCHES_SHOWN = 10
PART_STYLES = {"api": "green", "processor": "magenta", "notifier": "cyan", "kafka": "yellow", "postgres": "blue"}
T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sluice: uploads that are not lost, with progress that is true.",
)
app.add_typer(operator_app.log, name="log")
app.add_typer(rebuild_app.quarantine, name="quarantine")


def main() -> None:
    """The console script: errors become a message and an exit code."""
    try:
        app()
    except CliError as error:
        _fail(str(error), error.exit_code)
    except SettingsError as error:
        _fail(str(error), EXIT_WRONG_USE)
    except EmbeddedError as error:
        _fail(str(error), EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


@app.command("up")
def up_command(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    api_port: Port = None,
    notifier_port: Port = None,
    *,
    restart: Annotated[
        bool, typer.Option("--restart/--no-restart", help="Start again what dies; else all ends when a part does.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Start Kafka, Postgres and the three services on this machine, and keep them running until Ctrl-C.

    SLUICE_KAFKA_BOOTSTRAP_SERVERS and SLUICE_DATABASE_URL name servers to use instead of starting some.
    """
    plan = up.plan(data_dir=data_dir, api_port=api_port, notifier_port=notifier_port)
    stacks: list[up.Stack] = []

    async def story() -> None:
        async with up.running(plan, say=_sayer(), follow=True) as stack:
            stacks.append(stack)
            if as_json:
                print_json(stack.endpoints, indent=None)
            else:
                _show_up(stack, plan)
            await (stack.keep() if restart else stack.parts.until_one_ends())

    asyncio.run(up.until_signal(story()))
    if not all(stack.clean for stack in stacks):
        _fail(f"Not every part stopped by itself; see {plan.data_dir / 'logs'}.", EXIT_FAILURE)


@app.command("demo")
def demo_command(
    data_dir: DataDir = DEFAULT_DATA_DIR / "demo",
    api_port: Port = None,
    notifier_port: Port = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Start everything, send real pictures through it and show what becomes of them.

    With a terminal it stays up until Ctrl-C; without one, or with --json, it stops. Exits 0 only if every outcome was
    as it should be.
    """
    plan = up.plan(data_dir=data_dir, api_port=api_port, notifier_port=notifier_port, any_port=True)
    console = console_of()
    demo = Demo(plan, console=console, stays=console.is_terminal and not as_json, as_json=as_json)
    asyncio.run(up.until_signal(demo.run(_sayer())))
    if demo.complaints or not demo.clean:
        _fail(
            "The demo did not go as it should: " + "; ".join(demo.complaints or ["a part did not stop"]), EXIT_FAILURE
        )


@app.command("upload")
def upload_command(
    files: Annotated[list[Path], typer.Argument(help="Files, not folders.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    name: Annotated[str | None, typer.Option(help="A name for the batch.")] = None,
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the batch's id and nothing else.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the work on them until it is done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send files as one batch. Exits 1 if one was refused, or with --watch if one failed."""
    check_files(files)
    try:
        storable_text(name or "")
    except ValueError as error:
        raise WrongUse(f"--name {name!a:.80} {error}.") from None
    here = connection.find(data_dir=data_dir)
    sent, uploads = _run(_upload(here, files, name=name, watch=watch, silent=as_json or quiet))
    failed = watch and any(upload["status"] != "completed" for upload in uploads)
    if quiet:
        if sent.batch is not None:
            print_line(sent.batch["id"])
    elif as_json:
        print_json({"batch": sent.batch, "accepted": uploads, "rejected": sent.rejected})
    else:
        _show_sent(sent, uploads, watched=watch, data_dir=data_dir)
    if sent.rejected or failed:
        raise typer.Exit(EXIT_FAILURE)


@app.command("watch")
def watch_command(batch: str, data_dir: DataDir = DEFAULT_DATA_DIR, *, as_json: AsJson = False) -> None:
    """Show a batch's progress until it ended. Exits 1 unless it completed without a failed file."""
    _require_id(batch)

    async def story() -> tuple[Board, list[dict[str, Any]]]:
        here = connection.find(data_dir=data_dir)
        async with Api.open(here) as api:
            async with display(as_json=as_json) as shown:
                board = await follow(api, token=here.token, batch_id=batch, shown=shown)
            return board, [] if board.deleted else await api.uploads(batch, min_position=board.position)

    board, uploads = _run(story())
    if not as_json:
        if board.deleted:
            print_line("The batch was deleted.")
        else:
            console_of().print(outcomes(uploads))
    if not board.all_well:
        raise typer.Exit(EXIT_FAILURE)


@app.command("status")
def status_command(
    which: Annotated[str | None, typer.Argument(metavar="[BATCH|UPLOAD]")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    at: Annotated[str | None, typer.Option(metavar="POSITION|TIME", help="The batch as it was there or then.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show how Sluice is and the newest batches, or one batch, or one upload."""
    if which is not None:
        _require_id(which)
    elif at is not None:
        raise WrongUse("--at needs the batch that is to be shown as it was.")
    here = connection.find(data_dir=data_dir)
    if at is not None and which is not None:
        _show_thing(_run(_batch_at(here, which, at)), None, as_json=as_json)
    elif which is None:
        _show_service(*_run(_service_status(here)), as_json=as_json)
    else:
        _show_thing(*_run(_thing_status(here, which)), as_json=as_json)


@app.command("history")
def history_command(batch: str, data_dir: DataDir = DEFAULT_DATA_DIR, *, as_json: AsJson = False) -> None:
    """Show what happened to a batch, oldest first. With --json one JSON object a line."""
    _require_id(batch)

    async def story() -> None:
        async with Api.open(connection.find(data_dir=data_dir)) as api:
            async for event in api.events(batch):
                if as_json:
                    print_json(event, indent=None)
                else:
                    print_line(past_line(event))

    _run(story())


@app.command("cancel")
def cancel_command(batch: str, data_dir: DataDir = DEFAULT_DATA_DIR, *, as_json: AsJson = False) -> None:
    """Stop the work on a batch for good; what is done stays done. Cancelling twice changes nothing."""
    _require_id(batch)

    async def story() -> dict[str, Any]:
        async with Api.open(connection.find(data_dir=data_dir)) as api:
            return await api.cancel(batch)

    found = _run(story())
    if as_json:
        print_json(found)
    else:
        print_line(
            f"batch {found['id']} is {found['status']}: {found['cancelled_uploads']} files cancelled, "
            f"{found['successful_uploads']} completed, {found['failed_uploads']} failed"
        )


@app.command("retry")
def retry_command(
    which: Annotated[str, typer.Argument(metavar="BATCH|UPLOAD")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    as_json: AsJson = False,
) -> None:
    """Try again what failed: one upload, or all failed ones of a batch."""
    _require_id(which)
    found = _run(_retry(connection.find(data_dir=data_dir), which))
    if as_json:
        print_json(found)
        return
    batch_id = found.get("batch_id", found["id"])
    print_line(f"{'upload' if 'batch_id' in found else 'batch'} {found['id']} is {found['status']}")
    print_line(f"watch it:  {program()} watch{data_dir_option(data_dir)} {batch_id}")


app.command("replay")(rebuild_app.replay_command)
app.command("verify")(rebuild_app.verify_command)
app.command("sweep")(operator_app.sweep_command)
app.command("doctor")(operator_app.doctor_command)


@app.command("token")
def token_command(
    user: Annotated[str, typer.Option(help="Whom the token speaks for (its `sub`).")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    ttl: Annotated[float, typer.Option(min=1, max=TOKEN_TTL_S_MAX, help="For how many seconds it is good.")] = (
        TOKEN_TTL_S
    ),
    scope: Annotated[list[str] | None, typer.Option(help="A scope it carries: read or write.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Print a token, signed with SLUICE_JWT_SECRET or with the secret of the `up` in --data-dir."""
    try:
        token = connection.make_token(user=user, data_dir=data_dir, ttl_s=ttl, scopes=tuple(scope or ()))
    except ValidationError as error:
        raise WrongUse(f"--user {user!r:.80} cannot be a user: {error.errors()[0]['msg']}.") from None
    if as_json:
        print_json({"token": token, "user_id": user, "ttl_s": ttl, "scopes": scope or []})
    else:
        print_line(token)


async def _upload(
    here: connection.Connection, files: list[Path], *, name: str | None, watch: bool, silent: bool
) -> tuple[Sent, list[dict[str, Any]]]:
    """What was sent, and the uploads: right after they were taken, or with `watch` as they ended."""
    async with Api.open(here) as api:
        batch = await api.create_batch(name=name)
        try:
            if not watch:
                sent = await send(api, batch, files)
                return sent, sent.accepted
            if silent:
                sent, board = await send_and_follow(api, batch, token=here.token, files=files, shown=Silence())
            else:
                async with display() as shown:
                    sent, board = await send_and_follow(api, batch, token=here.token, files=files, shown=shown)
        except asyncio.CancelledError:
            raise Interrupted(batch["id"]) from None
        if sent.batch is None:
            return sent, []
        sent.batch = await api.batch(board.batch_id, min_position=board.position)
        return sent, await api.uploads(board.batch_id, min_position=board.position)


async def _service_status(here: connection.Connection) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    async with Api.open(here) as api:
        return await api.status(), await api.batches(limit=BATCHES_SHOWN)


async def _batch_at(here: connection.Connection, batch_id: str, at: str) -> dict[str, Any]:
    async with Api.open(here) as api:
        return await api.batch(batch_id, at=at)


async def _thing_status(here: connection.Connection, which: str) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """A batch and its uploads, or an upload and None."""
    async with Api.open(here) as api:
        try:
            batch = await api.batch(which)
        except Refused as refusal:
            if refusal.code != "not_found":
                raise
        else:
            return batch, await api.uploads(which)
        try:
            return await api.upload(which), None
        except Refused as refusal:
            if refusal.code != "not_found":
                raise
            raise _nothing_of(which, here) from None


async def _retry(here: connection.Connection, which: str) -> dict[str, Any]:
    """The batch or the upload as it is after its retry."""
    async with Api.open(here) as api:
        try:
            return await api.retry_batch(which)
        except Refused as refusal:
            if refusal.code != "not_found":
                raise
        try:
            return await api.retry_upload(which)
        except Refused as refusal:
            if refusal.code != "not_found":
                raise
            raise _nothing_of(which, here) from None


def _nothing_of(which: str, here: connection.Connection) -> CliError:
    return CliError(f"There is neither a batch nor an upload {which} of this user at {here.api}.")


def _show_up(stack: up.Stack, plan: up.Plan) -> None:
    console = console_of()
    console.print("\nSluice is up.\n", style="bold")
    console.print(addresses(stack.endpoints, data_dir=plan.data_dir))
    console.print()
    for line in up_hints(plan.data_dir):
        console.print(line, markup=False, soft_wrap=True)
    console.print("\nCtrl-C stops it.\n")


def _show_sent(sent: Sent, uploads: list[dict[str, Any]], *, watched: bool, data_dir: Path) -> None:
    console = console_of()
    if watched:
        console.print(outcomes(uploads, sent.rejected))
        return
    if sent.batch is None:
        print_line("no file was taken, so there is no batch")
    else:
        print_line(f"batch {sent.batch['id']}: {len(uploads)} files taken, {len(sent.rejected)} rejected")
    for one in sent.rejected:
        print_line(clean(f"  rejected: {one['filename']}: {one['detail']} ({one['code']})"))
    if sent.batch is not None:
        print_line(f"watch it:  {program()} watch{data_dir_option(data_dir)} {sent.batch['id']}")


def _show_service(status: dict[str, Any], newest: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json({"status": status, "batches": newest})
        return
    console = console_of()
    console.print(members({name: value for name, value in status.items() if name != "processors"}))
    console.print()
    if status.get("processors"):
        console.print(processors(status["processors"]))
        console.print()
    console.print(batches(newest) if newest else Text("This user has no batches."))


def _show_thing(thing: dict[str, Any], uploads: list[dict[str, Any]] | None, *, as_json: bool) -> None:
    if as_json:
        print_json(thing if uploads is None else {**thing, "uploads": uploads})
        return
    console = console_of()
    console.print(members(thing))
    if uploads:
        console.print()
        console.print(outcomes(uploads))


def _require_id(text: str) -> None:
    if not is_id(text):
        raise WrongUse(
            f"{text!r:.80} is not the id of a batch or upload, such as 0198c0de-0000-7000-8000-000000000000."
        )


def _sayer() -> Say:
    """Tell lines on standard error, each after the name of its part."""
    console = console_of(stderr=True)

    def say(part: str, line: str) -> None:
        prefix = (f"{part:<9} │ ", PART_STYLES.get(part, "dim"))
        console.print(Text.assemble(prefix, clean(line.expandtabs())), soft_wrap=True)

    return say


def _run(story: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(story)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write("".join(f"{clean(line)}\n" for line in message.splitlines()))
    sys.exit(code)
