"""Every invariant, looked for in a history: `violations` gives a sentence for each that does not hold, none if all do.

What a service claims is never taken for granted: facts are folded again here, and how often an upload ended is counted
from what the read models call effective, without the fold. Where the log itself has gaps nothing else can be told.
The rest stands beside: how often files were tried (`attempts`), what clients asked for (`promises`), what the tables
hold (`tables`), what streams told (`streams`), how the processes did (`processes`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from schemas.events import (
    LaneClaimed,
    LogCreated,
    OfAttempt,
    UploadFailed,
    UploadQueued,
    UploadRetried,
    UploadSucceeded,
)
from schemas.records import StoredRecord
from tests.faults.checking import attempts, processes, promises, streams, tables
from tests.faults.checking.folded import FoldedLog, Place, fold_again
from tests.faults.checking.history import Evidence


def violations(evidence: Evidence) -> list[str]:
    """What does not hold, in sentences."""
    if gaps := list(_gaps(evidence.records)):
        return [*gaps, "the log has gaps, so nothing else was looked at"]
    folded = fold_again(evidence.records)
    return [
        *processes.violations(evidence),
        *_one_log(folded),
        *_verdicts(evidence, folded),
        *_epochs(evidence, folded),
        *_outcomes(evidence, folded),
        *attempts.violations(evidence, folded),
        *promises.violations(evidence, folded),
        *tables.violations(evidence, folded),
        *streams.violations(evidence, folded),
    ]


def _gaps(records: Iterable[StoredRecord]) -> Iterator[str]:
    expected: dict[int, int] = defaultdict(int)
    for record in records:
        if record.offset != expected[record.partition]:
            yield f"the log: offset {record.partition}-{record.offset} stands where {expected[record.partition]} should"
        expected[record.partition] = record.offset + 1


def _one_log(folded: FoldedLog) -> Iterator[str]:
    ids = set()
    for partition in folded.state.lanes:
        first = folded.facts.get((partition, 0))
        if first is None or not isinstance(first.event, LogCreated):
            yield f"the log: partition {partition} does not begin with LogCreated"
        else:
            ids.add(first.event.log_id)
    if len(ids) > 1:
        yield f"the log: its partitions name {len(ids)} log ids, {', '.join(sorted(ids))}"


def _verdicts(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    """The index holds every fact of a batch, with the reason the fold gives; quarantine holds the rest, once."""
    verdicts = evidence.rows.verdicts
    for place, fact in folded.facts.items():
        if fact.batch_id is None:
            continue
        if place not in verdicts:
            yield f"{folded.named(place)} does not stand in batch_events"
        elif verdicts[place] != folded.reasons[place]:
            yield (
                f"{folded.named(place)} is {verdicts[place] or 'effective'} in batch_events, "
                f"the fold says {folded.reasons[place] or 'effective'}"
            )
    for place in verdicts.keys() - folded.facts.keys():
        yield f"batch_events names {place[0]}-{place[1]}, where the log has no fact"
    kept = evidence.rows.quarantined
    for partition, offset in sorted({place for place in kept if kept.count(place) > 1}):
        yield f"the record {partition}-{offset} is in quarantine more than once"
    for partition, offset in sorted(set(kept) ^ set(folded.undecodable)):
        where = "in quarantine, though it can be read" if (partition, offset) in kept else "not in quarantine"
        yield f"the record {partition}-{offset} is {where}"


def _epochs(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    newest: dict[int, int | None] = defaultdict(lambda: None)
    for place in folded.called_effective(evidence.rows.verdicts):
        event = folded.facts[place].event
        if isinstance(event, LaneClaimed):
            if event.after != newest[place[0]]:
                yield f"{folded.named(place)} supersedes epoch {event.after}, the newest is {newest[place[0]]}"
            newest[place[0]] = place[1]
        elif isinstance(event, OfAttempt) and event.epoch != newest[place[0]]:
            yield f"{folded.named(place)} is effective with epoch {event.epoch}, the newest is {newest[place[0]]}"


def _outcomes(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    """Per queueing one effective outcome: no second, and none missing unless the batch was cancelled or deleted."""
    waiting: dict[str, Place] = {}
    for place in folded.called_effective(evidence.rows.verdicts):
        event = folded.facts[place].event
        if isinstance(event, UploadQueued | UploadRetried):
            if event.upload_id in waiting:
                yield f"{folded.named(place)} is effective while the upload waits since {waiting[event.upload_id]}"
            waiting[event.upload_id] = place
        elif isinstance(event, UploadSucceeded | UploadFailed) and waiting.pop(event.upload_id, None) is None:
            yield f"{folded.named(place)} is a second outcome of upload {event.upload_id}"
    for upload_id, place in waiting.items():
        batch_id = folded.facts[place].batch_id
        batch = folded.state.batches.get(batch_id or "")
        if batch is None or not (batch.deleted or batch.status == "cancelled"):
            yield f"upload {upload_id}, queued at {place[0]}-{place[1]}, never came to an outcome"
    for batch in folded.state.batches.values():
        if batch.completable:
            yield f"batch {batch.id}: every upload ended, and it was never completed"
