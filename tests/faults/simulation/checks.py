"""What must be true after every run, whatever broke: pure, over the log, the rows, the wishes and the streams.

The log is folded here once more, by `evolve` alone; everything else is held to that. Each check yields sentences, one
for each thing that is not as it should be. tests/unit/test_simulation_checks.py shows that each can fail.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from schemas.batch import ATTEMPTS_PER_QUEUEING, Batch
from schemas.events import (
    BatchCancelled,
    BatchCreated,
    BatchDeleted,
    BatchSealed,
    LogCreated,
    UploadAttemptFailed,
    UploadFailed,
    UploadInterrupted,
    UploadQueued,
    UploadRetried,
    UploadStarted,
    UploadSucceeded,
)
from schemas.ids import partition_of
from schemas.position import Position
from schemas.records import StoredRecord
from schemas.requests import key_hash
from schemas.views import BatchCounts, BatchView, UploadView
from tests.fakes_rows import Tables
from tests.faults.simulation.clients import Wish
from tests.faults.simulation.processes import Answer, Sent, Stream
from tests.faults.simulation.reference import Effective, Folding, fold

WORKER_CRASHED = "worker_crashed"
_ENDS = (UploadAttemptFailed, UploadFailed, UploadSucceeded, UploadInterrupted)


@dataclass(frozen=True)
class Evidence:
    """All that a run left behind. `settled`: whether it came to rest after everything was healed; `undisturbed`:
    whether no attempt can have crashed; `heard_all`: whether a stream was open at the end."""

    records: Sequence[StoredRecord]
    tables: Tables
    refolded: Sequence[Tables]
    wishes: Sequence[Wish]
    reads: Sequence[tuple[Sent, Answer]]
    streams: Sequence[Stream]
    blobs: Callable[[str], bool]
    settled: bool
    undisturbed: bool
    heard_all: Callable[[Stream], bool] = lambda _stream: False

    @property
    def partitions(self) -> list[int]:
        return sorted({record.partition for record in self.records})

    def end(self, partition: int) -> int:
        """Where a partition ends."""
        return sum(record.partition == partition for record in self.records)


def violations(evidence: Evidence) -> list[str]:
    """Everything that is wrong."""
    folding = fold(evidence.records)
    found = [
        *check_log(evidence, folding),
        *check_outcomes(folding, settled=evidence.settled),
        *check_counters(folding),
        *check_attempts(folding, undisturbed=evidence.undisturbed),
        *check_rows(evidence, folding),
        *check_wishes(evidence.wishes, folding),
        *check_reads(evidence, folding),
        *check_streams(evidence, folding),
        *check_blobs(evidence, folding),
    ]
    return found[:20]


def check_log(evidence: Evidence, folding: Folding) -> Iterator[str]:
    """One log id, no gap, every record readable, epochs that increase, each after the one it names."""
    if folding.unreadable:
        yield f"the log holds what nobody can read, at {folding.unreadable}"
    for partition, epochs in folding.epochs.items():
        if epochs != sorted(set(epochs)):
            yield f"effective epochs of partition {partition} do not increase: {epochs}"
    for partition in evidence.partitions:
        offsets = [record.offset for record in evidence.records if record.partition == partition]
        if offsets != list(range(len(offsets))):
            yield f"the offsets of partition {partition} have gaps: {offsets}"
        created = [each.fact.offset for _, each in folding.of(LogCreated) if each.fact.partition == partition]
        if created != [0]:
            yield f"partition {partition} of the log begins at {created}, not at 0 once"
    for event, each in folding.of(UploadStarted, *_ENDS):
        epochs = folding.epochs[each.fact.partition]
        newest = max((epoch for epoch in epochs if epoch < each.fact.offset), default=None)
        if event.epoch != newest:
            yield f"{event.type} at {each.fact.offset} counts under {event.epoch}, the newest epoch was {newest}"


def check_outcomes(folding: Folding, *, settled: bool) -> Iterator[str]:
    """Per queueing one effective outcome at most, and one when all is quiet; then no sealed batch is left."""
    queueings: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for event, each in folding.of(UploadQueued, UploadRetried, UploadSucceeded, UploadFailed):
        if isinstance(event, UploadQueued | UploadRetried):
            queueings[event.upload_id] += 1
        else:
            outcomes[event.upload_id] += 1
        if outcomes[event.upload_id] > queueings[event.upload_id]:
            yield f"upload {event.upload_id} has a second outcome for one queueing, at {each.fact.offset}"
    for batch, uploads in folding.batches():
        gone = batch.deleted or batch.status == "cancelled"
        if settled and not gone and batch.sealed and not batch.ended:
            yield f"batch {batch.id} is sealed and never ended: {_counts(batch)}"
        for upload in uploads.values():
            if settled and not gone and outcomes[upload.id] != queueings[upload.id]:
                of = f"{outcomes[upload.id]} outcomes of {queueings[upload.id]}"
                yield f"upload {upload.id} ({upload.filename}) has {of}"
    if not settled:
        yield "it did not come to rest in time after all was healed"


def check_counters(folding: Folding) -> Iterator[str]:
    """A batch counts what its uploads are."""
    for batch, uploads in folding.batches():
        if batch.deleted:
            continue
        states = Counter(upload.status for upload in uploads.values())
        counted = {name: getattr(batch, name) for name in ("queued", "processing", "completed", "failed", "cancelled")}
        if {name: states.get(name, 0) for name in counted} != counted:  # type: ignore[call-overload]
            yield f"batch {batch.id} counts {counted}, its uploads are {dict(states)}"


def check_attempts(folding: Folding, *, undisturbed: bool) -> Iterator[str]:
    """A crash is an attempt and an interruption is none; only a lane that was taken anew finds crashed attempts. Where
    a late copy of a start began one, nobody worked at it, and it is interrupted by whoever has the lane then."""
    started: dict[str, Effective] = {}
    first = _first_places(folding)
    made: Counter[str] = Counter()
    before: dict[str, int] = {}
    for event, each in folding.of(UploadStarted, *_ENDS, UploadRetried):
        upload_id = event.upload_id
        if isinstance(event, UploadStarted):
            made[upload_id] += 1
            started[upload_id] = each
            if event.attempt != made[upload_id]:
                yield f"attempt {event.attempt} of {upload_id} is its number {made[upload_id]}"
        elif isinstance(event, UploadRetried):
            before[upload_id] = made[upload_id]
        else:
            start: Any = started[upload_id].fact.event
            late = first[started[upload_id].fact.id] != (each.fact.partition, started[upload_id].fact.offset)
            crashed = not isinstance(event, UploadSucceeded | UploadInterrupted) and event.error.code == WORKER_CRASHED
            if isinstance(event, UploadInterrupted):
                made[upload_id] -= 1
                if event.epoch != start.epoch and not late:
                    yield f"the attempt of {upload_id} that crashed under {start.epoch} cost nothing"
            else:
                yield from _attempt_ended(event, each, start, made[upload_id] - before.get(upload_id, 0))
            if crashed and (undisturbed or late):
                at = f", where a start landed late at {started[upload_id].fact.offset}" if late else ""
                yield f"an attempt of {upload_id} is said to have crashed, and nothing did{at}"
        if each.upload is not None and each.upload.attempts != made[upload_id]:
            yield f"upload {upload_id} counts {each.upload.attempts} attempts of {made[upload_id]}"


def _first_places(folding: Folding) -> dict[str, tuple[int, int]]:
    """Where each start stood in the log first, effective or not, by the fact's id."""
    facts = [*(each.fact for each in folding.effective), *(fact for fact, _ in folding.ignored)]
    starts = [fact for fact in facts if isinstance(fact.event, UploadStarted)]
    first: dict[str, tuple[int, int]] = {}
    for fact in sorted(starts, key=lambda fact: fact.offset):
        first.setdefault(fact.id, (fact.partition, fact.offset))
    return first


def _attempt_ended(event: Any, each: Effective, started: UploadStarted, of_queueing: int) -> Iterator[str]:
    if isinstance(event, UploadSucceeded):
        if event.epoch != started.epoch:
            yield f"{event.upload_id} was started under {started.epoch} and succeeded under {event.epoch}"
        return
    crashed = event.error.code == "worker_crashed"
    if crashed == (event.epoch == started.epoch):
        yield f"{event.type} at {each.fact.offset}: {event.error.code}, of an attempt begun under {started.epoch}"
    looked_at = event.error.code == "corrupt_media"
    hopeless = looked_at and each.upload is not None and each.upload.filename.startswith("broken")
    if isinstance(event, UploadFailed) != (of_queueing >= ATTEMPTS_PER_QUEUEING or hopeless):
        yield f"{event.type} at {each.fact.offset} ends attempt {of_queueing} of its queueing"


def check_rows(evidence: Evidence, folding: Folding) -> Iterator[str]:
    """The rows are the log's fold, also from zero with other polls; the position only grew, to the log's end."""
    reached = dict.fromkeys(evidence.partitions, 0)
    for partition, source, target in evidence.tables.moves:
        if source != reached[partition] or target <= source:
            yield f"the position of partition {partition} went from {source} to {target}, after {reached[partition]}"
        reached[partition] = target
    ends = {partition: evidence.end(partition) for partition in evidence.partitions}
    if evidence.settled and reached != ends:
        yield f"the positions are {reached}, the log ends at {ends}"
    if reached != ends:
        return
    yield from _rows_differ(evidence.tables, folding)
    mine = evidence.tables.content()
    for number, other in enumerate(evidence.refolded):
        theirs = other.content()
        for table, rows in mine.items():
            if rows != theirs[table]:
                yield f"{table} differs from what replay {number} makes of the log: {_difference(rows, theirs[table])}"


def _rows_differ(tables: Tables, folding: Folding) -> Iterator[str]:
    for partition, lane in folding.lanes.items():
        if tables.lanes[partition] != lane:
            yield f"the lane's row is {tables.lanes[partition]}, the fold gives {lane}"
    for batch, uploads in folding.batches():
        row = tables.batch(batch.id)
        if batch.deleted:
            if row is None or not row.deleted or tables.uploads_of(batch.id):
                yield f"batch {batch.id} was deleted, and its rows are {row}, {tables.uploads_of(batch.id)}"
            continue
        if row != batch:
            yield f"the row of batch {batch.id} differs from the fold: {_fields_differ(row, batch)}"
        if tables.uploads_of(batch.id) != uploads:
            differing = [
                _fields_differ(tables.upload(each.id), each)
                for each in uploads.values()
                if tables.upload(each.id) != each
            ]
            yield f"the upload rows of {batch.id} differ from the fold: {differing}"
    known = {batch.id for batch, _ in folding.batches()}
    if extra := set(tables.batches) - known:
        yield f"there are rows of batches nobody made: {sorted(extra)}"


def check_wishes(wishes: Sequence[Wish], folding: Folding) -> Iterator[str]:
    """What was granted stands in the log once, what stayed unknown at most once, what was refused never."""
    queued: dict[str, list[UploadQueued]] = defaultdict(list)
    created: Counter[str] = Counter()
    for event, _ in folding.of(UploadQueued):
        queued[event.filename].append(event)
    for event, _ in folding.of(BatchCreated):
        created[event.name or ""] += 1
    granted = {wish.sent for wish in wishes if wish.outcome != "refused"}
    for wish in wishes:
        match wish.kind:
            case "create":
                yield from _held_to(wish, wish.names[0], created[wish.names[0]], refused=wish.outcome == "refused")
            case "post_batch" | "post_uploads":
                yield from _check_post(wish, queued, elsewhere=wish.sent in granted)
            case "put":
                yield from _check_put(wish, queued, wishes)
            case _:
                yield from _check_change(wish, folding)


def _check_post(wish: Wish, queued: dict[str, list[UploadQueued]], *, elsewhere: bool) -> Iterator[str]:
    rejected = set()
    if wish.outcome == "ok":
        rejected = {each["filename"] for each in wish.answer.body["rejected"]}
        accepted = [each["filename"] for each in wish.answer.body["accepted"]]
        gone = not accepted and not rejected
        if not gone and sorted([*accepted, *rejected]) != sorted(wish.names):
            yield f"{_said(wish)} was told of {accepted} and {rejected}, it had sent {wish.names}"
    for name in wish.names:
        refused = name in rejected or (wish.outcome == "refused" and not elsewhere)
        yield from _held_to(wish, name, len(queued[name]), refused=refused)


def _held_to(wish: Wish, name: str, effective: int, *, refused: bool) -> Iterator[str]:
    if refused and effective:
        yield f"{_said(wish)} was refused {name} ({wish.code}), and it is in the log"
    if wish.outcome == "ok" and not refused and effective == 0:
        yield f"{_said(wish)} was granted {name}, and the log does not have it"
    if effective > 1:
        yield f"{name} is in the log {effective} times"


def _check_put(wish: Wish, queued: dict[str, list[UploadQueued]], wishes: Sequence[Wish]) -> Iterator[str]:
    batch_id = wish.sent.path.split("/")[3]
    of_name = [event for event in queued[wish.names[0]] if event.batch_id == batch_id]
    mine = [event for event in of_name if event.sha256 == wish.sha256[0]]
    if len(of_name) > 1:
        yield f"{wish.names[0]} is in batch {batch_id} {len(of_name)} times"
    if wish.outcome == "ok" and not mine:
        yield f"{_said(wish)} was granted, and the log does not have it"
    same = [each for each in wishes if each.sent == wish.sent]
    if mine and all(each.outcome == "refused" for each in same):
        yield f"{_said(wish)} was refused ({wish.code}), and it is in the log"


def _check_change(wish: Wish, folding: Folding) -> Iterator[str]:
    if wish.outcome != "ok":
        return
    kinds: dict[str, type[Any]] = {"seal": BatchSealed, "cancel": BatchCancelled, "delete": BatchDeleted}
    of = wish.sent.path.split("/")[3]
    held = folding.held.get(of)
    if wish.kind in kinds and held is not None and held.batch is not None:
        batch = held.batch
        said = {"seal": batch.sealed, "cancel": batch.status == "cancelled", "delete": batch.deleted}
        if not said[wish.kind]:
            yield f"{_said(wish)} was granted, and the batch is {batch.status}"
    if wish.kind == "retry" and (keys := [value for name, value in wish.sent.headers if name == "Idempotency-Key"]):
        again = Counter(
            event.upload_id
            for event, _ in folding.of(UploadRetried)
            if event.request and event.batch_id == of and event.request.key_hash == _key_hash(wish, keys[0])
        )
        if doubled := [upload_id for upload_id, times in again.items() if times > 1]:
            yield f"{_said(wish)} queued {doubled} more than once"


def check_reads(evidence: Evidence, folding: Folding) -> Iterator[str]:
    """Whatever was shown was so at the position it names; what somebody was told of is found."""
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for each in folding.effective:
        if each.batch is not None:
            view = BatchView.of_log(each.batch, log_id=folding.log_id).model_dump(mode="json")
            shown[view["id"], view["position"]] = view
        if each.upload is not None and each.batch is not None:
            upload = UploadView.of_log(each.upload, log_id=folding.log_id, partition=each.fact.partition)
            seen = upload.model_dump(mode="json")
            shown[seen["id"], seen["position"]] = seen
    answers = [(wish.sent, answer) for wish in evidence.wishes for answer in wish.answers]
    for sent, answer in [*answers, *evidence.reads]:
        for view in _views_in(answer):
            key = (view["id"], view["position"])
            if view.get("status") == "cancelled" and "batch_id" in view:
                continue  # swept with its batch: no fact of its own
            if key not in shown:
                said = f"{view['id']} at {view['position']}"
                yield f"{sent.method} {sent.path} showed {said}, where nothing happened to it"
            elif view != shown[key]:
                yield f"{sent.method} {sent.path} showed {_difference(view, shown[key])} at {view['position']}"
    for sent, answer in evidence.reads:
        if sent.path.startswith("/v1/batches/"):
            yield from _check_found(sent, answer, folding)


def _check_found(sent: Sent, answer: Answer, folding: Folding) -> Iterator[str]:
    """A batch is there for its owner until it is deleted, and as new as the position that was waited for."""
    held = folding.held.get(sent.path.split("/")[3])
    if held is None or held.batch is None or held.batch.user_id != sent.user_id:
        if answer.status != 404:
            yield f"GET {sent.path} of {sent.user_id} was {answer.status}"
        return
    if answer.status == 404 and not held.batch.deleted:
        yield f"GET {sent.path} was 404, and the batch is there"
    if not sent.query:
        return
    least = _offset(sent.query.partition("=")[2], held.id)
    before = [each for each in folding.effective if each.fact.batch_id == held.id and each.fact.offset <= least]
    gone = any(isinstance(each.fact.event, BatchDeleted) for each in before)
    if gone != (answer.status == 404) and not held.batch.deleted:
        yield f"GET {sent.path}?{sent.query} was {answer.status}"
    for view in _views_in(answer) if answer.status < 300 and "items" not in answer.body else ():
        if gone or (before and _offset(view["position"], held.id) < before[-1].fact.offset):
            yield f"GET {sent.path}?{sent.query} showed {view['position']}, older than what was waited for"


def _offset(position: str, batch_id: str) -> int:
    """Of the batch's partition."""
    return Position.parse(position).offset(partition_of(batch_id)) or 0


def _views_in(answer: Answer) -> Iterator[dict[str, Any]]:
    body = answer.body
    if not isinstance(body, dict) or answer.status >= 300:
        return
    if "position" in body:
        yield body
    if isinstance(body.get("batch"), dict):
        yield body["batch"]
    for name in ("accepted", "items"):
        yield from body.get(name, ())


def check_streams(evidence: Evidence, folding: Folding) -> Iterator[str]:
    """A stream is a state at a position and then every effective fact of the batch, each once, in order."""
    facts: dict[str, list[tuple[int, str, dict[str, Any] | None]]] = defaultdict(list)
    for each in folding.effective:
        if each.batch is not None:
            counts = None if each.batch.deleted else BatchCounts.of(each.batch).model_dump()
            facts[each.batch.id].append((each.fact.offset, each.fact.id, counts))
    for stream in evidence.streams:
        known = [fact for fact in facts[stream.batch_id] if fact[0] <= stream.offset]
        state = known[-1][2] if known else None
        if stream.snapshot != state:
            yield f"a stream of {stream.batch_id} began at {stream.offset} with {stream.snapshot}, it was {state}"
        later = facts[stream.batch_id][len(known) :]
        whole = evidence.settled and evidence.heard_all(stream)
        expected = later if whole else later[: len(stream.facts)]
        if stream.facts != expected:
            heard = [fact[0] for fact in stream.facts]
            yield (
                f"a stream of {stream.batch_id} from {stream.offset} told of {heard}, there were "
                f"{[fact[0] for fact in expected]}: {_difference(stream.facts, expected)}"
            )


def check_blobs(evidence: Evidence, folding: Folding) -> Iterator[str]:
    """What the log names is in the store, unless its batch is deleted."""
    for batch, uploads in folding.batches():
        for upload in uploads.values():
            if not batch.deleted and not evidence.blobs(upload.blob):
                yield f"the bytes of {upload.filename} ({upload.id}) are gone"


def _key_hash(wish: Wish, key: str) -> str:
    return key_hash(wish.sent.user_id, wish.sent.method, wish.sent.path, key)


def _said(wish: Wish) -> str:
    return f"{wish.sent.method} {wish.sent.path} ({wish.outcome} {wish.code or ''})"


def _counts(batch: Batch) -> dict[str, int]:
    return {name: getattr(batch, name) for name in ("queued", "processing", "completed", "failed", "cancelled")}


def _fields_differ(row: Any, state: Any) -> str:
    if row is None:
        return "it is missing"
    names = [each.name for each in fields(state) if getattr(row, each.name) != getattr(state, each.name)]
    return ", ".join(f"{name}: {getattr(row, name)!r} ≠ {getattr(state, name)!r}" for name in names)


def _difference(mine: Any, theirs: Any) -> str:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        return "; ".join(f"{key}: {mine.get(key)!r} ≠ {theirs.get(key)!r}" for key in keys[:4])
    return f"{mine!r} ≠ {theirs!r}"[:600]
