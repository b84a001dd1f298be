"""The read models against the log: rows are the fold, counters count the rows, positions are true and only grow, and a
replay from zero gives the same bytes, whatever the poll sizes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from schemas.batch import Batch
from tests.faults.checking.folded import FoldedLog
from tests.faults.checking.history import Evidence

_OF_TOMBSTONES = ("user_id", "request_key_hash", "request_body_hash", "created_ms", "created_offset", "offset")


def violations(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    yield from _positions(evidence, folded)
    yield from _rows(evidence, folded)
    yield from _counters(evidence)
    yield from _replays(evidence)
    yield from _verified(evidence)


def _positions(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    for partition, expected in folded.state.lanes.items():
        found = evidence.rows.lanes.get(partition)
        if found is None:
            yield f"positions: partition {partition} has no row"
            continue
        for name in ("next_offset", "epoch", "log_id", "time_ms"):
            if getattr(found, name) != getattr(expected, name):
                yield (
                    f"positions: {name} of partition {partition} is {getattr(found, name)}, "
                    f"the log says {getattr(expected, name)}"
                )
    last: dict[int, int] = defaultdict(int)
    for partition, next_offset in evidence.positions:
        if next_offset < last[partition]:
            yield f"positions: partition {partition} went back from {last[partition]} to {next_offset}"
        last[partition] = max(last[partition], next_offset)


def _rows(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    rows, state = evidence.rows, folded.state
    for table, found, expected in (
        ("upload_batches", rows.batches, state.batches),
        ("uploads", rows.uploads, state.uploads),
    ):
        for row_id in sorted(found.keys() | expected.keys()):
            row, folded_row = found.get(row_id), expected.get(row_id)
            if row is None or folded_row is None:
                yield f"{table}: {row_id} is {'missing' if row is None else 'there, and not in the log'}"
            elif different := _different(row, folded_row):
                yield f"{table}: {row_id} differs from the fold in {', '.join(different)}"


def _different(row: Any, folded: Any) -> list[str]:
    names = [field.name for field in fields(row)]
    if isinstance(row, Batch) and folded.deleted and row.deleted:
        names = list(_OF_TOMBSTONES)
    return [
        f"{name} ({getattr(row, name)!r:.80} for {getattr(folded, name)!r:.80})"
        for name in names
        if getattr(row, name) != getattr(folded, name)
    ]


def _counters(evidence: Evidence) -> Iterator[str]:
    buckets = ("queued", "processing", "completed", "failed", "cancelled")
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for upload in evidence.rows.uploads.values():
        counted[upload.batch_id][upload.status] += 1
    for batch in evidence.rows.batches.values():
        said = {name: getattr(batch, name) for name in buckets}
        rows = {name: counted[batch.id][name] for name in buckets}
        if said != rows and not batch.deleted:
            yield f"upload_batches: {batch.id} says {_shown(said)}, its uploads are {_shown(rows)}"


def _replays(evidence: Evidence) -> Iterator[str]:
    live = evidence.rows.tables
    for how, tables in evidence.replayed.items():
        for name in sorted(live.keys() | tables.keys()):
            here, there = set(live.get(name, [])), set(tables.get(name, []))
            if live.get(name) == tables.get(name):
                continue
            example = next(iter(sorted(here ^ there)), "the order of rows")
            yield f"{name}: a replay from zero ({how}) gives other rows than the live ones, for example {example:.300}"


def _verified(evidence: Evidence) -> Iterator[str]:
    for how, differences in evidence.verified.items():
        yield from (f"verify ({how}): {difference}" for difference in differences)


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"
