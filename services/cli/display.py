"""How it looks: two live bars on a terminal, plain lines elsewhere, tables at the end, JSON where asked for.

Nothing is known here that is not on the board or in a view; unknown values are shown as unknown. Text that came from
outside (file names, messages) goes through `clean` before it meets a terminal.
"""

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.cli.board import Board, Item
from services.lifecycle import cancelled

FRAMES_PER_S = 12
NAME_COLUMNS = 24
BAR_COLUMNS = 24
PLAIN_COLUMNS = 200
UNKNOWN = "?"
TOLD_CHARACTERS_MAX = 80
STATUS_STYLES = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "processing": "cyan",
    "rejected": "red",
    "full": "green",
    "working": "green",
    "degraded": "yellow",
}


class Display(Protocol):
    """Shows a board while it changes."""

    def update(self, board: Board, message: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None:
        """A sentence beside the board."""


def console_of(*, stderr: bool = False) -> Console:
    """Standard output (or error) as Rich sees it: wide where it is no terminal, so that tables are not folded."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False)


@contextlib.asynccontextmanager
async def display(*, as_json: bool = False) -> AsyncIterator[Display]:
    """The display that fits: JSON lines, a live one on a terminal, else plain lines."""
    console = console_of()
    if as_json:
        yield JsonLines()
    elif console.is_terminal:
        async with LiveBars.open(console) as bars:
            yield bars
    else:
        yield PlainLines()


class Silence:
    """For commands whose output is one JSON document at their end."""

    def update(self, board: Board, message: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


class JsonLines:
    """Each message as the notifier sent it, a line each."""

    def update(self, board: Board, message: Mapping[str, Any]) -> None:
        del board
        print_json(message, indent=None)

    def note(self, text: str) -> None:
        sys.stderr.write(text + "\n")


class PlainLines:
    """A line for each thing that happened to the batch or a file of it."""

    def update(self, board: Board, message: Mapping[str, Any]) -> None:
        if line := _plain_line(board, message):
            print_line(line)

    def note(self, text: str) -> None:
        print_line(text)


class LiveBars:
    """Two bars, drawn anew a few times a second from the newest board."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._board: Board | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, console: Console) -> AsyncIterator["LiveBars"]:
        with Live(Text("waiting for the first news …", style="dim"), console=console, auto_refresh=False) as live:
            bars = cls(live)
            drawing = asyncio.create_task(bars._draw())
            try:
                yield bars
            finally:
                await cancelled(drawing)
                bars._refresh()

    def update(self, board: Board, message: Mapping[str, Any]) -> None:
        self._board = board
        if failure := _failure(board, message):
            self._live.console.print(Text(failure, style="red"))

    def note(self, text: str) -> None:
        self._live.console.print(Text(clean(text), style="dim"))

    async def _draw(self) -> None:
        while True:
            self._refresh()
            await asyncio.sleep(1 / FRAMES_PER_S)

    def _refresh(self) -> None:
        if self._board is not None:
            self._live.update(render(self._board), refresh=True)


def render(board: Board) -> RenderableType:
    """The two bars, the file in work and the batch, and below them what facts tell; 80 columns are enough."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=5, min_width=5, style="bold")
    grid.add_column(width=NAME_COLUMNS, no_wrap=True, overflow="ellipsis")
    grid.add_column(width=BAR_COLUMNS)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row("file", *_file_cells(board))
    bar = ProgressBar(total=max(board.total, 1), completed=board.done, width=BAR_COLUMNS)
    status = Text(clean(str(board.counts.get("status", UNKNOWN))))
    grid.add_row("batch", status, bar, _files(board))
    return Group(grid, Text(f"      {facts_line(board)}", no_wrap=True, overflow="ellipsis"))


def _files(board: Board) -> str:
    """`3/16 files`; `3/16+ files` while it is not known how many come."""
    known = board.counts.get("sealed") or board.announced_files
    return f"{board.done}/{board.total}{'' if known else '+'} files"


def _file_cells(board: Board) -> tuple[RenderableType, RenderableType, RenderableType]:
    item = board.in_work
    if item is None:
        idle = "all done" if board.ended else "none in work"
        return Text(idle, style="dim"), Text(), Text()
    known = item.percent is not None
    bar = ProgressBar(total=100 if known else None, completed=item.percent or 0, width=BAR_COLUMNS)
    stage = f"{item.percent:3d} %  {item.stage}" if known else "started"
    again = f"  attempt {item.attempt}" if item.attempt > 1 else ""
    return Text(clean(item.shown_name)), bar, Text(clean(stage + again))


def facts_line(board: Board) -> str:
    """Bytes, rate and time left; a question mark where facts do not tell."""
    rate = board.rate
    parts = [
        f"{_maybe(board.bytes_done, size)} of {_maybe(board.bytes_total, size)}",
        f"{rate.items_per_s:.1f} files/s, {size(rate.bytes_per_s)}/s" if rate else f"{UNKNOWN} files/s",
    ]
    if not board.ended:
        parts.append(f"{_maybe(board.time_left_s, duration)} left")
    return " · ".join(parts)


def outcomes(uploads: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]] = ()) -> Table:
    """What became of each file, those that were not taken last."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("file", "type", "size", "W×H", "attempts", "outcome"):
        table.add_column(heading, justify="right" if heading in ("size", "W×H", "attempts") else "left")
    for upload in uploads:
        result = upload["result"] or {}
        pixels = f"{result['width']}×{result['height']}" if "width" in result else "–"
        table.add_row(
            Text(clean(upload["filename"])),
            Text(clean(upload["content_type"])),
            size(upload["size_bytes"]),
            pixels,
            str(upload["attempts"]),
            _outcome(upload["status"], upload["error"]),
        )
    for one in rejected:
        why = {"code": one["code"], "message": one["detail"]}
        table.add_row(Text(clean(one["filename"])), "–", "–", "–", "–", _outcome("rejected", why))
    return table


def _outcome(status: str, error: Mapping[str, Any] | None) -> Text:
    why = clean(f": {error['code']}, {error['message']}") if error else ""
    return Text.assemble((status, STATUS_STYLES.get(status, "")), why)


def members(shown: Mapping[str, Any]) -> Table:
    """Names and values, one a line; those without a value are left out."""
    table = Table.grid(padding=(0, 3))
    for name, value in shown.items():
        if value not in (None, "", [], {}):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            style = STATUS_STYLES.get(text, "") if name in ("status", "mode") else ""
            table.add_row(Text(name, style="bold"), Text(clean(text), style=style))
    return table


def batches(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("batch", "name", "status", "files", "failed", "created"):
        table.add_column(heading, no_wrap=heading == "batch")
    for batch in found:
        done = batch["processed_uploads"] + batch["cancelled_uploads"]
        status = Text(batch["status"], style=STATUS_STYLES.get(batch["status"], ""))
        files = f"{done}/{batch['total_uploads']}"
        name = Text(clean(batch["name"] or "–"))
        table.add_row(batch["id"], name, status, files, str(batch["failed_uploads"]), batch["created_at"])
    return table


def processors(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("lane", "processor", "state", "since", "heard", "at work"):
        table.add_column(heading, no_wrap=heading == "processor")
    for each in found:
        state = Text(each["state"], style=STATUS_STYLES.get(each["state"], ""))
        work = f"since {each['working_since']}, attempt {each['attempt']}" if each["working_since"] else "–"
        table.add_row(
            str(each["partition"]), clean(each["worker_id"]), state, each["since"], f"{each['heard_s']:.1f} s ago", work
        )
    return table


def _plain_line(board: Board, message: Mapping[str, Any]) -> str:
    """A line for this message; "" where it says nothing new to a reader of lines (percentages)."""
    match message.get("type"):
        case "subscribed":
            counts = board.counts
            return clean(f"batch {board.batch_id}: {counts.get('status')}, {board.done} of {board.total} files done")
        case "lost":
            return clean(f"the connection was lost ({message['reason']}), trying again")
        case "event":
            return _event_line(board, message["event"])
        case _:
            return ""


def _event_line(board: Board, event: Mapping[str, Any]) -> str:
    name, data = event["type"].split(".")[1], event["data"]
    item = board.items.get(data.get("upload_id", ""))
    place = f"[{board.done}/{board.total}]"
    if item is None:
        return clean(f"{place} {_words(name)} (left: {_maybe(board.time_left_s, duration)})")
    return clean(f"{place} {item.shown_name}: {_what_happened(name, item)}")


def _what_happened(name: str, item: Item) -> str:
    match name:
        case "UploadStarted":
            return f"started, attempt {item.attempt}"
        case "UploadSucceeded":
            result = item.result or {}
            return " ".join(["completed", *_pixels(result)])
        case "UploadFailed" | "UploadAttemptFailed":
            error = item.error or {}
            again = ", it is tried again" if name == "UploadAttemptFailed" else ""
            return f"failed: {error.get('code')}, {error.get('message')}{again}"
        case _:
            return _words(name).removeprefix("upload ")


def _pixels(result: Mapping[str, Any]) -> list[str]:
    return [f"{result['format']} {result['width']}×{result['height']}"] if "width" in result else []


def _failure(board: Board, message: Mapping[str, Any]) -> str:
    """The line of a failure, which stays on the screen above the bars."""
    if message.get("type") == "event" and message["event"]["type"].split(".")[1].endswith("Failed"):
        return _event_line(board, message["event"])
    return _plain_line(board, message) if message.get("type") == "lost" else ""


def _words(name: str) -> str:
    """`BatchSealed` → `batch sealed`."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def past_line(event: Mapping[str, Any]) -> str:
    """A fact of a batch's history as one line: time, position, what happened, to which upload, the rest."""
    data = {name: value for name, value in event["data"].items() if name not in ("batch_id", "user_id")}
    parts = [f"{name.removesuffix('_id')}={told(value)}" for name, value in data.items() if value not in (None, {}, [])]
    ignored = f"(ignored: {event['ignored']})  " if event["ignored"] else ""
    name = event["type"].split(".")[1]
    return clean(f"{event['time']}  {event['position']:<15}  {name:<19}  {ignored}{'  '.join(parts)}").rstrip()


def told(value: Any) -> str:
    """A value for people: text as it is, all else as JSON, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= TOLD_CHARACTERS_MAX else f"{text[: TOLD_CHARACTERS_MAX - 1]}…"


def size(size_bytes: float) -> str:
    """Bytes for people, in powers of ten: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:  # noqa: PLR2004  # the step of SI prefixes
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`; what has begun counts."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _maybe(value: float | None, shown: Any) -> str:
    return UNKNOWN if value is None else str(shown(value))


def clean(text: str) -> str:
    """The text without what would steer a terminal (control and direction characters)."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(value: Any, *, indent: int | None = 2) -> None:
    print_line(json.dumps(value, ensure_ascii=False, indent=indent))
