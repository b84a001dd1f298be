"""What clients were told against what the log says: `ok` is there once, `unknown` at most once, `fail` never.

Requests for one thing belong together (a client repeats what it does not know the outcome of): one `ok` among them
makes it `ok`, else one `unknown` makes it `unknown`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from schemas.events import BatchCancelled, BatchCreated, BatchDeleted, BatchSealed, Fact, UploadQueued, UploadRetried
from schemas.position import Position
from tests.faults.checking.folded import FoldedLog
from tests.faults.checking.history import Evidence, Operation, Outcome, What

_ONCE: tuple[What, ...] = ("create", "upload", "seal", "cancel", "delete")


def violations(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    asked: dict[tuple[What, str], list[Operation]] = defaultdict(list)
    for operation in evidence.operations:
        asked[operation.what, operation.mark].append(operation)
    landed: dict[tuple[What, str], list[Fact]] = defaultdict(list)
    for fact in folded.effective():
        if (mark := _mark_of(fact)) is not None:
            landed[mark].append(fact)
    for (what, mark), operations in asked.items():
        if what == "seal" and _is_sealed(mark, folded):
            continue  # it was sealed by its last expected upload, or together with its files
        yield from _kept(what, mark, operations, landed[what, mark])
    yield from _answered(evidence.operations, folded)


def _kept(what: What, mark: str, operations: list[Operation], facts: list[Fact]) -> Iterator[str]:
    outcome = outcome_of(operations)
    said = f"{what} of {mark!r}"
    if outcome == "ok" and not facts:
        yield f"{said} was answered with ok and does not stand in the log"
    if outcome == "fail" and facts:
        codes = ", ".join(sorted({operation.code or "no code" for operation in operations}))
        yield f"{said} was refused ({codes}) and stands in the log at {_places(facts)}"
    most = 1 if what in _ONCE else sum(operation.outcome != "fail" for operation in operations)
    if outcome != "fail" and len(facts) > most:
        yield f"{said} is effective {len(facts)} times, at {_places(facts)}; {most} at most were asked for"


def _is_sealed(batch_id: str, folded: FoldedLog) -> bool:
    batch = folded.state.batches.get(batch_id)
    facts = [fact for fact in folded.effective() if fact.batch_id == batch_id and isinstance(fact.event, BatchSealed)]
    return batch is not None and batch.sealed and not facts


def _answered(operations: Iterable[Operation], folded: FoldedLog) -> Iterator[str]:
    """What an answer names is what the log holds: the ids, and for one file the very place."""
    queued = {fact.upload_id: fact for fact in folded.effective() if isinstance(fact.event, UploadQueued)}
    for operation in operations:
        if operation.what != "upload" or operation.outcome != "ok":
            continue
        for upload_id in operation.ids:
            fact = queued.get(upload_id)
            if fact is None:
                yield f"upload of {operation.mark!r} was answered with id {upload_id}, which the log does not know"
            elif operation.position is not None and not _includes(operation.position, fact):
                yield (
                    f"upload of {operation.mark!r} was answered with position {operation.position}, "
                    f"and stands at {fact.partition}-{fact.offset}"
                )


def outcome_of(operations: Iterable[Operation]) -> Outcome:
    """What is known of one thing after all that was asked for it."""
    outcomes = {operation.outcome for operation in operations}
    return "ok" if "ok" in outcomes else "unknown" if "unknown" in outcomes else "fail"


def _includes(position: str, fact: Fact) -> bool:
    offset = Position.parse(position).offset(fact.partition)
    return offset is not None and offset >= fact.offset


def _mark_of(fact: Fact) -> tuple[What, str] | None:
    match fact.event:
        case BatchCreated() as event:
            return "create", event.name or event.batch_id
        case UploadQueued() as event:
            return "upload", event.filename
        case BatchSealed() as event:
            return "seal", event.batch_id
        case BatchCancelled() as event:
            return "cancel", event.batch_id
        case BatchDeleted() as event:
            return "delete", event.batch_id
        case UploadRetried() as event:
            return "retry", event.upload_id
        case _:
            return None


def _places(facts: Iterable[Fact]) -> str:
    return ", ".join(f"{fact.partition}-{fact.offset}" for fact in facts)
