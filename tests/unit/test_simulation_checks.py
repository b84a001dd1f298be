"""The simulation's checks pass what is right and name what is wrong: hand-made histories, each bad in one way."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from schemas.events import LogEvent
from schemas.records import StoredRecord
from schemas.views import BatchCounts, BatchView
from services.processor.projection import Projection
from tests.examples import (
    BATCH,
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_USER,
    UPLOAD,
    USER,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_sealed,
    a_finished_batch,
    a_lane_claimed,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
    records_of,
)
from tests.fakes_rows import MemoryRows, Tables
from tests.faults.simulation.checks import (
    Evidence,
    check_attempts,
    check_counters,
    check_log,
    check_outcomes,
    violations,
)
from tests.faults.simulation.clients import Wish
from tests.faults.simulation.processes import Answer, Sent, Stream
from tests.faults.simulation.reference import Folding, fold

FINISHED = (*OPENING, *a_finished_batch())
CREATED_AT, SEALED_AT = 2, 4


async def tables_of(records: Sequence[StoredRecord], *, poll: int = 100) -> Tables:
    tables = Tables()
    rows = await Projection.open(MemoryRows(tables), partition=0, log_id=LOG_ID)
    for begin in range(0, len(records), poll):
        await rows.fold(records[begin : begin + poll])
        await rows.flush()
    return tables


async def evidence_of(*events: LogEvent, **changes: Any) -> Evidence:
    """A run that left this log behind, and nothing wrong unless told otherwise."""
    records = records_of(*events)
    given = {
        "records": records,
        "tables": await tables_of(records),
        "refolded": [await tables_of(records, poll=1)],
        "wishes": [],
        "reads": [],
        "streams": [],
        "blobs": lambda _blob: True,
        "settled": True,
        "undisturbed": False,
        "heard_all": lambda _stream: True,
    }
    return Evidence(**{**given, **changes})


def a_wish(kind: str, path: str, *, outcome: Any, names: tuple[str, ...] = (), body: Any = None) -> Wish:
    wish = Wish(kind, Sent("PUT" if kind == "put" else "POST", path, USER), names, ("0" * 64,), outcome)
    status = {"ok": 202, "refused": 409}.get(outcome)
    if status is not None:
        wish.answers.append(Answer(status, body or {"code": "batch_sealed"}, None))
    return wish


def a_stream(folding: Folding, *, at: int = 0) -> Stream:
    """A stream of the example batch from an offset on that misses nothing."""
    facts = [each for each in folding.effective if each.fact.batch_id == BATCH]
    told = [(each.fact.offset, each.fact.id, _counts(each.batch)) for each in facts]
    before = [fact for fact in told if fact[0] <= at]
    return Stream(BATCH, at, before[-1][2] if before else None, told[len(before) :])


def _counts(batch: Any) -> dict[str, Any]:
    return BatchCounts.of(batch).model_dump()


def view_at(folding: Folding, offset: int) -> dict[str, Any]:
    batch = next(each.batch for each in folding.effective if each.fact.offset == offset)
    assert batch is not None
    return BatchView.of_log(batch, log_id=LOG_ID).model_dump(mode="json")


async def test_a_good_run_is_passed() -> None:
    folding = fold(records_of(*FINISHED))
    name = an_upload_queued().filename
    accepted = a_wish("post_uploads", f"/v1/batches/{BATCH}/uploads", outcome="ok", names=(name,))
    accepted.answers[:] = [Answer(202, {"accepted": [], "rejected": []}, None)]
    seen = (Sent("GET", f"/v1/batches/{BATCH}", USER), Answer(200, view_at(folding, SEALED_AT), None))
    unseen = (Sent("GET", f"/v1/batches/{BATCH}", OTHER_USER), Answer(404, {"code": "not_found"}, None))

    found = violations(
        await evidence_of(
            *FINISHED,
            wishes=[accepted],
            reads=[seen, unseen],
            streams=[a_stream(folding), a_stream(folding, at=SEALED_AT)],
        )
    )

    assert found == []


BAD_LOGS: dict[str, tuple[Sequence[LogEvent], str]] = {
    "no LogCreated": ([a_lane_claimed(), a_batch_created()], "the log begins at"),
    "left sealed": ([*OPENING, a_batch_created(), a_batch_sealed()], "sealed and never ended"),
    "left queued": ([*OPENING, a_batch_created(), an_upload_queued()], "has 0 outcomes of 1"),
    "a first attempt that fails for good": (
        [*OPENING, a_batch_created(), an_upload_queued(), an_upload_started(), an_upload_failed()],
        "ends attempt 1 of its queueing",
    ),
    "a crash nobody had": (
        [*OPENING, a_batch_created(), an_upload_queued(), an_upload_started(), an_upload_attempt_failed()],
        "worker_crashed, of an attempt begun under",
    ),
    "a crash that cost nothing": (
        [
            *OPENING,
            a_batch_created(),
            an_upload_queued(),
            an_upload_started(),
            a_lane_claimed(after=EPOCH),
            an_upload_interrupted(epoch=5),
        ],
        "cost nothing",
    ),
    "somebody else's success": (
        [
            *OPENING,
            a_batch_created(),
            an_upload_queued(),
            an_upload_started(),
            a_lane_claimed(after=EPOCH),
            an_upload_succeeded(epoch=5),
        ],
        "was started under 1 and succeeded under 5",
    ),
}


@pytest.mark.parametrize("name", BAD_LOGS)
async def test_a_bad_log_is_named(name: str) -> None:
    events, expected = BAD_LOGS[name]

    found = violations(await evidence_of(*events))

    assert any(expected in violation for violation in found), found


async def test_a_gap_in_the_log_is_named() -> None:
    evidence = await evidence_of(*FINISHED)
    records = [replace(record, offset=record.offset + (record.offset > 5)) for record in evidence.records]

    with pytest.raises(AssertionError, match="does not follow"):
        violations(replace(evidence, records=records))


async def test_a_run_that_does_not_come_to_rest_is_named() -> None:
    found = violations(await evidence_of(*FINISHED, settled=False))

    assert found == ["it did not come to rest in time after all was healed"]


async def test_a_second_outcome_is_named() -> None:
    folding = fold(records_of(*FINISHED))
    succeeded = next(each for each in folding.effective if each.fact.event.type == "sluice.UploadSucceeded.v1")
    folding.effective.append(succeeded)

    assert any("second outcome" in violation for violation in check_outcomes(folding, settled=True))


async def test_epochs_that_go_back_are_named() -> None:
    folding = fold(records_of(*FINISHED))
    folding.epochs[0].append(0)

    assert any("do not increase" in violation for violation in check_log(await evidence_of(*FINISHED), folding))


async def test_wrong_counters_are_named() -> None:
    folding = fold(records_of(*FINISHED))
    batch = folding.held[BATCH].batch
    assert batch is not None
    batch.failed += 1

    assert any("counts" in violation for violation in check_counters(folding))


@pytest.mark.parametrize(
    ("table", "expected"),
    [("batches", "the row of batch"), ("uploads", "the upload rows of"), ("events", "events differs from what replay")],
)
async def test_rows_that_differ_are_named(table: str, expected: str) -> None:
    evidence = await evidence_of(*FINISHED)
    rows = getattr(evidence.tables, table)
    key, row = next(iter(rows.items()))
    rows[key] = (
        tuple("failed" if value == "completed" else value for value in row) if table != "events" else ("", 0, None)
    )

    assert any(expected in violation for violation in violations(evidence))


async def test_a_position_that_is_moved_twice_is_named() -> None:
    evidence = await evidence_of(*FINISHED)
    evidence.tables.moves.append(evidence.tables.moves[0])

    assert any("the position of partition 0 went from" in violation for violation in violations(evidence))


async def test_a_position_that_lags_at_the_end_is_named() -> None:
    evidence = await evidence_of(*FINISHED)
    behind = await tables_of(evidence.records[:-1])

    assert any("the log ends at" in violation for violation in violations(replace(evidence, tables=behind)))


async def test_a_partition_that_lags_is_named_though_another_one_does_not() -> None:
    evidence = await evidence_of(*FINISHED)
    another = [replace(record, partition=1) for record in records_of(*OPENING)]

    found = violations(replace(evidence, records=[*evidence.records, *another]))

    assert [f"the positions are {{0: {len(FINISHED)}, 1: 0}}, the log ends at {{0: {len(FINISHED)}, 1: 2}}"] == found


async def test_a_partition_that_begins_with_something_else_is_named() -> None:
    evidence = await evidence_of(*FINISHED)
    another = [replace(record, partition=1) for record in records_of(a_lane_claimed())]

    found = violations(replace(evidence, records=[*evidence.records, *another]))

    assert any("partition 1 of the log begins at [], not at 0 once" in violation for violation in found)


NAME = an_upload_queued().filename
PATH = f"/v1/batches/{BATCH}/uploads"
BAD_WISHES = {
    "lost": (
        a_wish("post_uploads", PATH, outcome="ok", names=("lost.jpg",), body={"accepted": [], "rejected": []}),
        "was granted lost.jpg, and the log does not have it",
    ),
    "refused and done": (a_wish("post_uploads", PATH, outcome="refused", names=(NAME,)), "was refused"),
    "rejected and done": (
        a_wish(
            "post_uploads", PATH, outcome="ok", names=(NAME,), body={"accepted": [], "rejected": [{"filename": NAME}]}
        ),
        "was refused",
    ),
    "told of another file": (
        a_wish(
            "post_uploads", PATH, outcome="ok", names=(NAME,), body={"accepted": [], "rejected": [{"filename": "x"}]}
        ),
        "was told of",
    ),
    "put and lost": (
        a_wish("put", f"{PATH}/a.jpg", outcome="ok", names=("a.jpg",)),
        "was granted, and the log does not",
    ),
    "created and lost": (a_wish("create", "/v1/batches", outcome="ok", names=("batch-9",)), "was granted batch-9"),
    "not cancelled": (a_wish("cancel", f"/v1/batches/{BATCH}/cancel", outcome="ok"), "and the batch is completed"),
    "not deleted": (a_wish("delete", f"/v1/batches/{BATCH}", outcome="ok"), "and the batch is completed"),
}


@pytest.mark.parametrize("name", BAD_WISHES)
async def test_a_broken_promise_is_named(name: str) -> None:
    wish, expected = BAD_WISHES[name]

    found = violations(await evidence_of(*FINISHED, wishes=[wish]))

    assert any(expected in violation for violation in found), found


async def test_a_file_that_is_in_the_log_twice_is_named() -> None:
    twice = [a_batch_created(), an_upload_queued(filename="a.jpg"), an_upload_queued(BATCH, filename="a.jpg")]
    wish = a_wish("post_uploads", PATH, outcome="unknown", names=("a.jpg",))

    found = violations(await evidence_of(*OPENING, *twice, a_batch_cancelled(), wishes=[wish]))

    assert "a.jpg is in the log 2 times" in found


async def test_a_refused_file_may_be_there_by_an_equal_request_that_was_granted() -> None:
    refused = a_wish("post_uploads", PATH, outcome="refused", names=(NAME,))
    unknown = a_wish("post_uploads", PATH, outcome="unknown", names=(NAME,))

    assert violations(await evidence_of(*FINISHED, wishes=[refused, unknown])) == []


async def test_an_answer_that_was_never_true_is_named() -> None:
    folding = fold(records_of(*FINISHED))
    sent = Sent("GET", f"/v1/batches/{BATCH}", USER)
    false = Answer(200, {**view_at(folding, SEALED_AT), "total_uploads": 2}, None)
    nowhere = Answer(200, {**view_at(folding, SEALED_AT), "position": f"{LOG_ID[:8]}.0-0"}, None)
    gone = Answer(404, {"code": "not_found"}, None)

    found = violations(await evidence_of(*FINISHED, reads=[(sent, false), (sent, nowhere), (sent, gone)]))

    assert [violation.split(f"{BATCH}")[1][:20] for violation in found] == [
        " showed total_upload",
        " showed ",
        " was 404, and the ba",
    ]


async def test_what_belongs_to_another_is_not_shown() -> None:
    folding = fold(records_of(*FINISHED))
    seen = (Sent("GET", f"/v1/batches/{BATCH}", OTHER_USER), Answer(200, view_at(folding, SEALED_AT), None))

    assert any("of grace was 200" in violation for violation in violations(await evidence_of(*FINISHED, reads=[seen])))


async def test_an_answer_older_than_what_was_waited_for_is_named() -> None:
    folding = fold(records_of(*FINISHED))
    sent = Sent("GET", f"/v1/batches/{BATCH}", USER, query=f"min_position={LOG_ID[:8]}.0-{SEALED_AT}")
    old = Answer(200, view_at(folding, CREATED_AT), None)

    found = violations(await evidence_of(*FINISHED, reads=[(sent, old)]))

    assert any("older than what was waited for" in violation for violation in found)


@pytest.mark.parametrize("harm", ["gap", "duplicate", "order", "state", "unfinished", "snapshot"])
async def test_a_bad_stream_is_named(harm: str) -> None:
    stream = a_stream(fold(records_of(*FINISHED)), at=CREATED_AT)
    match harm:
        case "gap":
            del stream.facts[1]
        case "duplicate":
            stream.facts.insert(1, stream.facts[1])
        case "order":
            stream.facts[0], stream.facts[1] = stream.facts[1], stream.facts[0]
        case "state":
            stream.facts[1] = (*stream.facts[1][:2], None)
        case "unfinished":
            del stream.facts[-1]
        case "snapshot":
            stream.snapshot = None

    found = violations(await evidence_of(*FINISHED, streams=[stream]))

    assert len(found) == 1
    assert found[0].startswith(f"a stream of {BATCH}")


async def test_a_stream_that_was_cut_may_end_early() -> None:
    stream = a_stream(fold(records_of(*FINISHED)), at=CREATED_AT)
    del stream.facts[2:]

    assert violations(await evidence_of(*FINISHED, streams=[stream], heard_all=lambda _: False)) == []


async def test_bytes_that_are_gone_are_named() -> None:
    found = violations(await evidence_of(*FINISHED, blobs=lambda _blob: False))

    assert found == [f"the bytes of {NAME} ({UPLOAD}) are gone"]


async def test_a_crash_in_an_undisturbed_run_is_named() -> None:
    events = [*OPENING, a_batch_created(), an_upload_queued(), an_upload_started(), a_lane_claimed(after=EPOCH)]
    events += [an_upload_attempt_failed(epoch=5), an_upload_started(attempt=2, epoch=5)]
    events += [an_upload_succeeded(attempt=2, epoch=5), a_batch_sealed(), a_batch_completed(epoch=5)]

    assert violations(await evidence_of(*events)) == []
    assert any("nothing did" in violation for violation in violations(await evidence_of(*events, undisturbed=True)))


@pytest.mark.parametrize(
    ("end", "copied", "found"),
    [
        (an_upload_interrupted(epoch=7), True, []),
        (an_upload_interrupted(epoch=7), False, ["cost nothing"]),
        (an_upload_attempt_failed(epoch=7), True, ["nothing did, where a start landed late at 6"]),
        (an_upload_attempt_failed(epoch=7), False, []),
    ],
    ids=["a copy given back", "a start given back", "a copy that crashed", "a start that crashed"],
)
def test_what_a_late_copy_began_is_given_back_and_what_a_start_began_has_crashed(
    end: LogEvent, *, copied: bool, found: list[str]
) -> None:
    events = [*OPENING, a_batch_created(), an_upload_queued(), an_upload_started(), an_upload_interrupted()]
    records = records_of(*events, an_upload_started(), a_lane_claimed(after=EPOCH, worker_id="worker-2"), end)
    if copied:
        records[6] = replace(records[4], offset=6)

    said = list(check_attempts(fold(records), undisturbed=False))

    assert len(said) == len(found)
    assert all(sentence.endswith(expected) for sentence, expected in zip(said, found, strict=True)), said
