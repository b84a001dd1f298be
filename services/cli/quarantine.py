"""`sluice quarantine`: the records that nobody could decode, what they hold, and trying them again after a fix.

Where they stand and why is in Postgres, what they hold is in the log. A retry is a replay in which these records are
decoded; they leave the quarantine in the transaction that makes the rebuilt rows live. What still cannot be decoded
stays, and so does a claim of a lane: who made it did not get the lane, and everybody went on from there.
"""

import asyncio
import base64
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from schemas.events import Fact, LaneClaimed, decode
from schemas.position import InvalidPositionError, Position
from schemas.records import StoredRecord
from schemas.views import rfc3339
from services.cli.display import clean, console_of, print_json, print_line, size
from services.cli.errors import EXIT_FAILURE, WrongUse
from services.cli.operating import require_same_log
from services.cli.rebuilding import Opened, as_shown, opened_stores, refusals, replayed
from services.cli.rebuilding import told as replay_told
from services.database import Database
from services.eventlog import EventLog, records_at

VALUE_CHARACTERS_MAX = 2_000
REASON_CHARACTERS_MAX = 120


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in quarantine, as Postgres knows it."""

    log_id: str
    partition: int
    offset: int
    time_ms: int
    reason: str

    @property
    def position(self) -> str:
        return str(Position.of(self.log_id, {self.partition: self.offset}))

    @property
    def place(self) -> tuple[int, int]:
        return self.partition, self.offset


def show_all(data_dir: Path, *, limit: int, as_json: bool) -> None:
    """List the quarantine."""

    async def story() -> tuple[list[Entry], dict[tuple[int, int], StoredRecord], int]:
        async with opened_stores(data_dir) as stores:
            entries = await _entries(stores.database, stores.log_id)
            return entries[:limit], await _records(stores.log, entries[:limit]), len(entries)

    entries, records, in_all = asyncio.run(story())
    if as_json:
        print_json({"items": [_item(each, records[each.place]) for each in entries], "in_all": in_all})
        return
    if not entries:
        print_line("Nothing is in quarantine.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("position", "time", "type", "why"):
        table.add_column(heading, no_wrap=heading in ("position", "time"))
    for each in entries:
        reason = each.reason if len(each.reason) <= REASON_CHARACTERS_MAX else f"{each.reason[:REASON_CHARACTERS_MAX]}…"
        named = _type_of(records[each.place])
        table.add_row(each.position, rfc3339(each.time_ms), Text(clean(named or "?")), Text(clean(reason)))
    console_of().print(table)
    if in_all > len(entries):
        print_line(f"{in_all - len(entries)} more; --limit shows them.")


def show_one(data_dir: Path, position: str, *, as_json: bool) -> None:
    """Show one record in full."""

    async def story() -> tuple[Entry, StoredRecord]:
        async with opened_stores(data_dir) as stores:
            (entry,) = _chosen(await _entries(stores.database, stores.log_id), [position], stores.log_id)
            return entry, (await _records(stores.log, [entry]))[entry.place]

    entry, record = asyncio.run(story())
    if as_json:
        print_json(_in_full(entry, record))
        return
    print_line(f"{entry.position}  {rfc3339(entry.time_ms)}")
    print_line(f"why      {clean(entry.reason)}")
    print_line(f"now      {_says_now(record)}")
    for name, value in record.headers:
        print_line(f"header   {clean(name)}: {_legible(value)}")
    print_line(f"key      {'(none)' if record.key is None else _legible(record.key)}")
    print_line(f"value    {'(none)' if record.value is None else size(len(record.value))}")
    if record.value:
        print_line(_legible(record.value))


def retry(data_dir: Path, positions: Sequence[str], *, every: bool, as_json: bool) -> None:
    """Count from now on what can be decoded; raises typer.Exit where something has to stay."""
    if every == bool(positions):
        raise WrongUse("Name the positions to try again (`sluice quarantine list` shows them), or say --all.")

    async def story() -> tuple[list[Entry], list[tuple[Entry, str]], Any, str]:
        async with opened_stores(data_dir) as stores:
            entries = await _entries(stores.database, stores.log_id)
            chosen = entries if every else _chosen(entries, positions, stores.log_id)
            taken, staying = await _sorted_out(stores, chosen)
            places = frozenset(entry.place for entry in taken)
            done = await replayed(stores, as_json=as_json, retried=places) if taken else None
            return taken, staying, done, stores.log_id

    with refusals("Nothing was taken out of quarantine"):
        taken, staying, done, log_id = asyncio.run(story())
    if as_json:
        print_json(
            {
                "retried": [entry.position for entry in taken],
                "stayed": [{"position": entry.position, "reason": why} for entry, why in staying],
                "replay": None if done is None else as_shown(done, log_id),
            }
        )
    else:
        for entry, why in staying:
            print_line(f"{entry.position} stays: {clean(why)}")
        if done is not None:
            print_line(f"{len(taken)} taken out of quarantine. {replay_told(done, log_id)}")
        elif not staying:
            print_line("Nothing is in quarantine.")
    if staying:
        raise typer.Exit(EXIT_FAILURE)


async def _sorted_out(stores: Opened, chosen: Sequence[Entry]) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """What can be decoded now, and what has to stay, each with the reason."""
    taken: list[Entry] = []
    staying: list[tuple[Entry, str]] = []
    records = await _records(stores.log, chosen)
    for entry in chosen:
        said = decode(records[entry.place])
        if not isinstance(said, Fact):
            staying.append((entry, said.reason))
        elif isinstance(said.event, LaneClaimed):
            staying.append((entry, "a claim of the lane that nobody could read did not get it"))
        else:
            taken.append(entry)
    return taken, staying


async def _entries(database: Database, log_id: str) -> list[Entry]:
    """The quarantine of this log, in log order."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT log_id, partition, record_offset, time_ms, reason FROM sluice_ops.quarantine WHERE log_id = $1 "
            "ORDER BY partition, record_offset",
            log_id,
        )
    return [Entry(row["log_id"], row["partition"], row["record_offset"], row["time_ms"], row["reason"]) for row in rows]


def _chosen(entries: Sequence[Entry], positions: Sequence[str], log_id: str) -> list[Entry]:
    """The entries at these positions. Raises WrongUse where one is not in quarantine."""
    by_place = {entry.place: entry for entry in entries}
    chosen: dict[tuple[int, int], Entry] = {}
    for text in positions:
        try:
            position = Position.parse(text)
        except InvalidPositionError as error:
            raise WrongUse(f"{error}.") from None
        require_same_log(position, log_id)
        for place in position.offsets:
            if place not in by_place:
                raise WrongUse(f"{Position.of(log_id, dict([place]))} is not in quarantine.")
            chosen[place] = by_place[place]
    return list(chosen.values())


async def _records(log: EventLog, entries: Sequence[Entry]) -> dict[tuple[int, int], StoredRecord]:
    """What these entries hold."""
    async with aclosing(records_at(log, [entry.place for entry in entries])) as records:
        return {(record.partition, record.offset): record async for record in records}


def _type_of(record: StoredRecord) -> str | None:
    """What the record calls itself."""
    return next((value.decode(errors="replace") for name, value in record.headers if name == "ce_type" and value), None)


def _says_now(record: StoredRecord) -> str:
    said = decode(record)
    if isinstance(said, Fact):
        return f"this version decodes it, as {said.event.type}: `sluice quarantine retry` lets it count"
    return clean(f"still: {said.reason}")


def _item(entry: Entry, record: StoredRecord) -> dict[str, Any]:
    return {
        "position": entry.position,
        "time": rfc3339(entry.time_ms),
        "type": _type_of(record),
        "reason": entry.reason,
        "decodable": isinstance(decode(record), Fact),
    }


def _in_full(entry: Entry, record: StoredRecord) -> dict[str, Any]:
    return {
        **_item(entry, record),
        "headers": [{"name": name, **_bytes("value", value)} for name, value in record.headers],
        **_bytes("key", record.key),
        **_bytes("value", record.value),
        "size_bytes": len(record.value or b""),
    }


def _bytes(name: str, value: bytes | None) -> dict[str, str | None]:
    """Bytes as JSON: as base64, and as text where they are some."""
    if value is None:
        return {name: None, f"{name}_base64": None}
    try:
        text: str | None = value.decode()
    except UnicodeDecodeError:
        text = None
    return {name: text, f"{name}_base64": base64.b64encode(value).decode()}


def _legible(value: bytes | None) -> str:
    """Bytes for a terminal: text without control characters, what is none escaped, cut where it is long."""
    text = (value or b"")[: 4 * VALUE_CHARACTERS_MAX].decode(errors="backslashreplace")
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[:VALUE_CHARACTERS_MAX])
    cut = len(text) > VALUE_CHARACTERS_MAX or len(value or b"") > 4 * VALUE_CHARACTERS_MAX
    return f"{shown}… (cut; --json shows all)" if cut else shown
