"""The record of a run: what clients asked and heard, what the log and the tables hold, how the processes did.

Plain values, so that a history can be made by hand, kept in a folder and read again. Times are of one clock, in
seconds. `mark` ties a request to the log: a name that no other request gives a file or a batch, or the id of what it
asks for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from schemas.batch import Batch, Lane, Upload
from schemas.records import StoredRecord

Outcome = Literal["ok", "fail", "unknown"]
What = Literal["create", "upload", "seal", "cancel", "delete", "retry"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing one request asked for; of a form, one for each file. `ids`: what an `ok` answered, `code`: why not."""

    what: What
    mark: str
    outcome: Outcome
    begin_s: float = 0.0
    end_s: float = 0.0
    code: str | None = None
    ids: tuple[str, ...] = ()
    position: str | None = None


@dataclass(slots=True)
class Stream:
    """All that one client heard of one batch, or of all batches of a user (the other id is None), message by message;
    `{"type": "cut"}` stands where it was cut off, `{"type": "error"}` where it was refused. `to_the_end`: it listened
    until nothing more could come; `by`: over which protocol."""

    batch_id: str | None
    messages: list[dict[str, Any]] = field(default_factory=list)
    to_the_end: bool = True
    user_id: str | None = None
    by: str = "WebSocket"


@dataclass(frozen=True, slots=True)
class Answer:
    """What GET gave for a batch at a position, None for 404."""

    batch_id: str
    position: str
    batch: Mapping[str, Any] | None


@dataclass(slots=True)
class Rows:
    """The live read models. `verdicts`: (partition, offset) → why the fact is ignored, None where it is effective;
    `tables`: each table's rows as text, in order."""

    lanes: dict[int, Lane] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    verdicts: dict[tuple[int, int], str | None] = field(default_factory=dict)
    quarantined: list[tuple[int, int]] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Looked:
    """What /readyz of a service said at a time; None where it did not answer."""

    service: str
    at_s: float
    ready: bool | None


@dataclass(frozen=True, slots=True)
class Away:
    """A part that could not be used from one time to another."""

    part: str
    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class Settled:
    """The last fault was healed; the read models were even with the log so many seconds later, None for never."""

    after: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process held at a quiet moment."""

    service: str
    pid: int
    memory_bytes: int
    descriptors: int
    tasks: int


@dataclass(slots=True)
class Evidence:
    """A whole run. `positions`: (partition, next offset of the read models) as sampled while it went on. `replayed`:
    the tables of replays from zero, by how they polled; `verified`: what `sluice verify` said, by how it polled."""

    operations: list[Operation] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    records: list[StoredRecord] = field(default_factory=list)
    rows: Rows = field(default_factory=Rows)
    replayed: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    verified: dict[str, list[str]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)
    looks: list[Looked] = field(default_factory=list)
    away: list[Away] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)


def save(evidence: Evidence, folder: Path, *, found: Sequence[str]) -> None:
    """Keep a history for whoever looks into it: what was found, and each part as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "violations.txt").write_text("".join(f"{sentence}\n" for sentence in found), encoding="utf-8")
    for name in Evidence.__dataclass_fields__:
        part = getattr(evidence, name)
        (folder / f"{name}.json").write_text(json.dumps(_plain(part), indent=1, ensure_ascii=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return _plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value
