"""`sluice log tail`: the facts as they stand in the log, from where one wants, those one wants, as they come.

Read straight from Kafka, in the order of each partition, without consumer group and without a service. Facts of workers
do not name a user, so who wants one user's facts also needs the read models, for batches that were made before.
"""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.events import BatchCreated, Fact, Undecodable, decode, public_data, type_of
from schemas.position import InvalidPositionError, Position
from schemas.records import StoredRecord
from schemas.views import rfc3339
from services.cli.display import clean, print_line, told
from services.cli.errors import WrongUse
from services.cli.operating import identity_of, partitions_of, require_same_log
from services.database import Database
from services.eventlog import EventLog, LogIdentity, LogReader, LogUnavailable

NEWEST = 10
READ_RECORDS_MAX = 1_000
READ_TIMEOUT_MS = 500
NAME_COLUMNS = 22
POSITION_COLUMNS = 15

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which facts are wanted; None is any. `type`: such as UploadFailed, in any case of letters."""

    batch: str | None = None
    upload: str | None = None
    user: str | None = None
    type: str | None = None

    def takes(self, fact: Fact | Undecodable, user_of: Callable[[str], str | None]) -> bool:
        if isinstance(fact, Undecodable):
            return self == Filter()
        if self.type is not None and self.type.lower() not in _names(fact.event.type):
            return False
        return (
            (self.batch is None or fact.batch_id == self.batch)
            and (self.upload is None or fact.upload_id == self.upload)
            and (self.user is None or _user(fact, user_of) == self.user)
        )


def checked(wanted: Filter, *, start: str | None, newest: int | None) -> int:
    """How many records to begin with; raises WrongUse for what could show nothing, or not what was meant."""
    if wanted.type is not None and not any(wanted.type.lower() in _names(each) for each in type_of):
        there = ", ".join(short(each) for each in type_of)
        raise WrongUse(f"--type {wanted.type!r:.80}: there are no such facts. There are {there}.")
    if start is not None and newest is not None:
        raise WrongUse("--from and --newest each say where to begin: leave one of them out.")
    return NEWEST if newest is None else newest


@dataclass(slots=True)
class Users:
    """Whose batch is whose: from the facts that passed, else from the read models."""

    database: Database | None
    _known: dict[str, str | None] = field(default_factory=dict)

    async def learn(self, facts: Sequence[Fact | Undecodable]) -> None:
        """Know the user of each of these facts' batches, as far as anybody does. Raises DatabaseUnavailable."""
        made = [fact.event for fact in facts if isinstance(fact, Fact) and isinstance(fact.event, BatchCreated)]
        self._known.update({event.batch_id: event.user_id for event in made})
        named = {fact.batch_id for fact in facts if isinstance(fact, Fact) and fact.batch_id is not None}
        unknown = named - self._known.keys()
        if unknown and self.database is not None:
            rows = await self.database.read(
                "SELECT id, user_id FROM {generation}.upload_batches WHERE id = ANY($1) "
                "UNION ALL SELECT id, user_id FROM {generation}.deleted_batches WHERE id = ANY($1)",
                list(unknown),
            )
            self._known.update({row["id"]: row["user_id"] for row in rows})

    def of(self, batch_id: str) -> str | None:
        return self._known.get(batch_id)


@dataclass(frozen=True, slots=True)
class Span:
    """Partition → the first offset to show, and the last one; None has no end."""

    first: dict[int, int]
    last: dict[int, int] | None

    def ended(self, next_offsets: dict[int, int]) -> bool:
        return self.last is not None and all(next_offsets[number] > last for number, last in self.last.items())


async def span(log: EventLog, *, start: str | None, end: str | None, newest: int, follow: bool) -> Span:
    """What is to be read. `start`: "start", a position (its record is the first one), None for the `newest` records.

    A position means the partitions that it names; one of a log that this one was imported from is as good here. Raises
    WrongUse, CliError, LogUnavailable.
    """
    partitions = await partitions_of(log)
    identity = await identity_of(log, partitions)
    ends = await _ends(log, partitions)
    if start == "start":
        first = dict.fromkeys(partitions, 0)
    elif start is not None:
        first = _offsets(start, "--from", identity, ends)
    else:
        first = {number: max(0, ends[number] - newest) for number in partitions}
    if end is not None:
        last = _offsets(end, "--to", identity, ends)
        first = {number: offset for number, offset in first.items() if number in last}
        return Span(first, {number: last[number] for number in first})
    return Span(first, None if follow else {number: ends[number] - 1 for number in first})


async def facts(log: EventLog, wanted: Span, *, note: Note) -> AsyncGenerator[list[Fact | Undecodable]]:
    """What the records within the span say, in groups as they come; where Kafka is away, wait for it."""
    next_offsets = dict(wanted.first)
    if not next_offsets or wanted.ended(next_offsets):
        return
    reader = log.reader(list(next_offsets))
    try:
        for number, offset in next_offsets.items():
            await reader.seek(number, offset)
        away = False
        while not wanted.ended(next_offsets):
            try:
                records = await reader.read(records_max=READ_RECORDS_MAX, timeout_ms=READ_TIMEOUT_MS)
            except LogUnavailable as error:
                if not away:
                    note(f"{error}; waiting for it")
                away = True
                continue
            away = False
            next_offsets.update({record.partition: record.offset + 1 for record in records})
            yield [decode(record) for record in records if _within(record, wanted)]
    finally:
        await reader.close()


def shown(fact: Fact | Undecodable, *, log_id: str) -> dict[str, Any]:
    """A fact as JSON: as callers see it, with its position. `problem`: why it could not be decoded."""
    place = {
        "position": str(Position.of(log_id, {fact.partition: fact.offset})),
        "time": rfc3339(fact.timestamp_ms),
    }
    if isinstance(fact, Undecodable):
        return {**place, "id": None, "type": None, "data": None, "problem": fact.reason}
    return {**place, "id": fact.id, "type": fact.event.type, "data": public_data(fact.event)}


def line(fact: Fact | Undecodable, *, log_id: str) -> str:
    """A fact as one line for people: time, position, what happened, to which batch and upload, the rest."""
    position = str(Position.of(log_id, {fact.partition: fact.offset}))
    begin = f"{rfc3339(fact.timestamp_ms)}  {position:<{POSITION_COLUMNS}} "
    if isinstance(fact, Undecodable):
        return clean(f"{begin} {'(undecodable)':<{NAME_COLUMNS}} {fact.reason}")
    data = public_data(fact.event)
    parts = [f"{name}={told(data.pop(f'{name}_id'))}" for name in ("batch", "upload") if data.get(f"{name}_id")]
    parts += [f"{name}={told(value)}" for name, value in data.items() if value not in (None, {}, [])]
    return clean(f"{begin} {short(fact.event.type):<{NAME_COLUMNS}} {'  '.join(parts)}")


def _names(event_type: str) -> tuple[str, str]:
    """What a type of facts may be called by, in small letters."""
    return event_type.lower(), short(event_type).lower()


def short(event_type: str) -> str:
    """`sluice.UploadQueued.v1` → `UploadQueued`."""
    return event_type.split(".")[1]


def show(fact: Fact | Undecodable, *, log_id: str, as_json: bool) -> None:
    print_line(json.dumps(shown(fact, log_id=log_id), ensure_ascii=False) if as_json else line(fact, log_id=log_id))


def _user(fact: Fact, user_of: Callable[[str], str | None]) -> str | None:
    named: str | None = getattr(fact.event, "user_id", None)
    return named or (user_of(fact.batch_id) if fact.batch_id else None)


def _within(record: StoredRecord, wanted: Span) -> bool:
    return wanted.last is None or record.offset <= wanted.last[record.partition]


def _offsets(text: str, option: str, identity: LogIdentity, ends: dict[int, int]) -> dict[int, int]:
    try:
        position = identity.here(Position.parse(text))
    except InvalidPositionError as error:
        raise WrongUse(f"{option}: {error}.") from None
    require_same_log(position, identity.log_id)
    for number, offset in position.offsets:
        if number not in ends or offset >= ends[number]:
            raise WrongUse(f"{option}: the log has no {number}-{offset}; it ends before {_places(ends)}.")
    return dict(position.offsets)


def _places(ends: dict[int, int]) -> str:
    return ", ".join(f"{number}-{offset}" for number, offset in sorted(ends.items()))


async def _ends(log: EventLog, partitions: Sequence[int]) -> dict[int, int]:
    reader: LogReader = log.reader(partitions)
    try:
        return await reader.ends()
    finally:
        await reader.close()
