"""The checker of fault histories catches what it should: good histories pass, and each way to spoil one is named."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from schemas.batch import Batch
from schemas.events import LogEvent
from schemas.ids import partition_of
from schemas.position import Position
from schemas.records import StoredRecord
from tests.examples import (
    BATCH,
    EPOCH,
    LOG_ID,
    OPENING,
    OTHER_BATCH,
    OTHER_UPLOAD,
    OTHER_USER,
    UPLOAD,
    USER,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    an_id,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    records_of,
)
from tests.faults.checking import (
    Answer,
    Away,
    Evidence,
    Looked,
    Operation,
    Rows,
    Settled,
    Stream,
    Usage,
    attempts,
    violations,
)
from tests.faults.checking.folded import FoldedLog, Told, fold_again

CRASHED_AND_DONE: tuple[LogEvent, ...] = (
    *OPENING,
    a_batch_created(),  # 2
    an_upload_queued(),
    an_upload_queued(OTHER_UPLOAD),
    a_batch_sealed(),
    an_upload_started(),  # 6
    a_lane_claimed(after=EPOCH, worker_id="worker-2"),
    an_upload_succeeded(epoch=EPOCH),  # 8: of a zombie
    an_upload_attempt_failed(epoch=7),
    an_upload_started(OTHER_UPLOAD, epoch=7),  # 10
    an_upload_interrupted(OTHER_UPLOAD, epoch=7),
    an_upload_started(OTHER_UPLOAD, epoch=7),
    an_upload_failed(OTHER_UPLOAD, epoch=7),
    an_upload_started(attempt=2, epoch=7),  # 14
    an_upload_succeeded(attempt=2, epoch=7),
    a_batch_completed(epoch=7, total_uploads=2, failed_uploads=1),  # 16
)


def a_history(*events: LogEvent) -> Evidence:
    """What a run that went well leaves behind."""
    records = records_of(*(events or CRASHED_AND_DONE))
    folded = fold_again(records)
    of_batches = {place: reason for place, reason in folded.reasons.items() if folded.facts[place].batch_id}
    rows = Rows(
        lanes=copy.deepcopy(folded.state.lanes),
        batches=copy.deepcopy(folded.state.batches),
        uploads=copy.deepcopy(folded.state.uploads),
        verdicts=of_batches,
        quarantined=list(folded.undecodable),
        tables={"uploads": ["(1)", "(2)"], "positions": ["(0,17)"]},
    )
    return Evidence(
        operations=[
            Operation("create", "holiday", "ok", ids=(BATCH,)),
            Operation("upload", f"{UPLOAD[:8]}.jpg", "unknown"),
            Operation("upload", f"{UPLOAD[:8]}.jpg", "ok", ids=(UPLOAD,), position=at(3)),
            Operation("upload", "never.jpg", "fail", code="log_unavailable"),
            Operation("upload", "perhaps.jpg", "unknown"),
            Operation("seal", BATCH, "ok"),
        ],
        streams=[a_stream(records)],
        records=records,
        rows=rows,
        replayed={"polls of 1": copy.deepcopy(rows.tables)},
        answers=[Answer(BATCH, at(len(records) - 1), rows_answer(records))],
        positions=[(0, 0), (0, 5), (0, 5), (0, len(records))],
        looks=[Looked("api", 1.0, ready=True), Looked("api", 30.0, ready=False), Looked("api", 41.0, ready=True)],
        away=[Away("kafka", 2.0, 40.0)],
        settled=[Settled("the kill of api", 0.5)],
        usage=[Usage("api", 7, 100 << 20, 30, 20)] * 3,
    )


def at(offset: int) -> str:
    return str(Position.of(LOG_ID, {0: offset}))


def rows_answer(records: list[StoredRecord]) -> dict[str, Any] | None:
    return fold_again(records).counts_at(BATCH, len(records))


def a_stream(records: list[StoredRecord]) -> Stream:
    """A snapshot after the batch was made, a cut in the middle, then the rest."""
    told = fold_again(records).told[BATCH]
    stream = Stream(BATCH, [a_snapshot(told[0].offset, told[0].counts)])
    for number, each in enumerate(told[1:]):
        if number == 3:
            here = stream.messages[-1]["position"]
            resumed = {"type": "subscribed", "batch_id": BATCH, "position": here, "recovered": True}
            stream.messages += [{"type": "cut", "reason": "1012"}, resumed]
        stream.messages.append(an_event(BATCH, each, at(each.offset)))
    return stream


def an_event(batch_id: str, told: Told, position: str) -> dict[str, Any]:
    event = {"id": told.event_id, "type": "", "time": "", "data": {"batch_id": batch_id}}
    return {"type": "event", "position": position, "event": event, "batch": copy.copy(told.counts)}


def a_snapshot(offset: int, counts: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "subscribed", "batch_id": BATCH, "position": at(offset), "recovered": False, "batch": counts}


@pytest.mark.parametrize(
    "events",
    [
        CRASHED_AND_DONE,
        (*OPENING, a_batch_created(), an_upload_queued(), a_batch_sealed(), an_upload_started(), a_batch_cancelled()),
        (*OPENING, a_batch_created(), an_upload_queued(), a_batch_sealed(), an_upload_started(), a_batch_deleted()),
        (
            *CRASHED_AND_DONE,
            an_upload_retried(OTHER_UPLOAD),
            an_upload_started(OTHER_UPLOAD, attempt=2, epoch=7),
            an_upload_succeeded(OTHER_UPLOAD, attempt=2, epoch=7),
            a_batch_completed(epoch=7, total_uploads=2, successful_uploads=2),
        ),
    ],
    ids=["crash and zombie", "cancelled", "deleted", "retried"],
)
def test_a_good_history_passes(events: tuple[LogEvent, ...]) -> None:
    assert violations(a_history(*events)) == []


def lose_an_upload(history: Evidence) -> None:
    history.operations.append(Operation("upload", "lost.jpg", "ok", ids=("0" * 36,), position=at(4)))


def land_a_refused_one(history: Evidence) -> None:
    history.operations.append(Operation("upload", f"{OTHER_UPLOAD[:8]}.jpg", "fail", code="batch_sealed"))


def answer_with_a_wrong_position(history: Evidence) -> None:
    history.operations.append(Operation("upload", f"{OTHER_UPLOAD[:8]}.jpg", "ok", ids=(OTHER_UPLOAD,), position=at(3)))


def lose_a_seal(history: Evidence) -> None:
    history.operations.append(Operation("seal", UPLOAD, "ok"))


def lose_a_cancel(history: Evidence) -> None:
    history.operations.append(Operation("cancel", BATCH, "ok"))


def count_a_second_outcome(history: Evidence) -> None:
    history.rows.verdicts[0, 8] = None


def ignore_an_outcome(history: Evidence) -> None:
    history.rows.verdicts[0, 15] = "stale_epoch"


def forget_a_fact(history: Evidence) -> None:
    del history.rows.verdicts[0, 9]


def leave_a_gap(history: Evidence) -> None:
    del history.records[9]


def swap_two_records(history: Evidence) -> None:
    records = history.records
    records[9], records[10] = records[10], records[9]


def begin_without_log_created(history: Evidence) -> None:
    history.records[0] = dataclasses.replace(history.records[0], value=b"{}")


def quarantine_what_can_be_read(history: Evidence) -> None:
    history.rows.quarantined.append((0, 5))


def quarantine_nothing_of_a_tombstone(history: Evidence) -> None:
    last = history.records[-1]
    history.records.append(dataclasses.replace(last, offset=last.offset + 1, value=None))


def stream_a_gap(history: Evidence) -> None:
    del history.streams[0].messages[2]


def stream_a_duplicate(history: Evidence) -> None:
    messages = history.streams[0].messages
    messages.insert(3, copy.deepcopy(messages[2]))


def stream_in_another_order(history: Evidence) -> None:
    messages = history.streams[0].messages
    messages[1], messages[2] = messages[2], messages[1]


def stream_wrong_counts(history: Evidence) -> None:
    history.streams[0].messages[-1]["batch"]["successful_uploads"] = 2


def stream_a_wrong_snapshot(history: Evidence) -> None:
    history.streams[0].messages[0]["batch"]["total_uploads"] = 3


def stream_an_ignored_fact(history: Evidence) -> None:
    told = copy.deepcopy(history.streams[0].messages[6])
    told["position"] = at(8)
    history.streams[0].messages.insert(7, told)


def stream_another_fact(history: Evidence) -> None:
    history.streams[0].messages[2]["event"]["id"] = "0" * 36


def stream_no_end(history: Evidence) -> None:
    history.streams[0].messages.pop()


def resume_before(history: Evidence) -> None:
    history.streams[0].messages[5]["position"] = at(2)


def get_another_state(history: Evidence) -> None:
    answer = history.answers[0]
    history.answers[0] = Answer(BATCH, answer.position, {**(answer.batch or {}), "failed_uploads": 0})


def get_nothing(history: Evidence) -> None:
    history.answers[0] = Answer(BATCH, history.answers[0].position, None)


def batch_of(history: Evidence) -> Batch:
    return history.rows.batches[BATCH]


def miscount(history: Evidence) -> None:
    batch_of(history).move("failed", "completed")


def lose_a_row(history: Evidence) -> None:
    del history.rows.uploads[UPLOAD]


def invent_a_row(history: Evidence) -> None:
    history.rows.batches[UPLOAD] = dataclasses.replace(batch_of(history), id=UPLOAD)


def change_a_row(history: Evidence) -> None:
    history.rows.uploads[UPLOAD].attempts = 1


def replay_otherwise(history: Evidence) -> None:
    history.replayed["polls of 1"]["uploads"][1] = "(3)"


def verify_otherwise(history: Evidence) -> None:
    history.verified["polls of 9"] = ["uploads differ in 1 row"]


def claim_too_much(history: Evidence) -> None:
    history.rows.lanes[0].next_offset += 1


def go_back(history: Evidence) -> None:
    history.positions.insert(3, (0, 4))


def keep_an_old_epoch(history: Evidence) -> None:
    history.rows.lanes[0].epoch = EPOCH


def settle_late(history: Evidence) -> None:
    history.settled.append(Settled("the pause of kafka", 31.0))


def settle_never(history: Evidence) -> None:
    history.settled.append(Settled("the pause of kafka", None))


def say_ready_without_kafka(history: Evidence) -> None:
    history.looks.append(Looked("processor", 20.0, ready=True))


def grow(history: Evidence) -> None:
    history.usage.append(Usage("api", 7, 300 << 20, 30, 20))


def leak_tasks(history: Evidence) -> None:
    history.usage.append(Usage("api", 7, 100 << 20, 30, 200))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose_an_upload, "upload of 'lost.jpg' was answered with ok and does not stand in the log"),
        (land_a_refused_one, "was refused (batch_sealed) and stands in the log at 0-4"),
        (answer_with_a_wrong_position, "and stands at 0-4"),
        (lose_a_seal, f"seal of '{UPLOAD}' was answered with ok and does not stand in the log"),
        (lose_a_cancel, "cancel of"),
        (count_a_second_outcome, f"UploadSucceeded at 0-15 is a second outcome of upload {UPLOAD}"),
        (count_a_second_outcome, "UploadSucceeded at 0-8 is effective with epoch 1, the newest is 7"),
        (count_a_second_outcome, "is effective in batch_events, the fold says stale_epoch"),
        (ignore_an_outcome, "never came to an outcome"),
        (forget_a_fact, "UploadAttemptFailed at 0-9 does not stand in batch_events"),
        (leave_a_gap, "offset 0-10 stands where 9 should"),
        (swap_two_records, "offset 0-10 stands where 9 should"),
        (begin_without_log_created, "partition 0 does not begin with LogCreated"),
        (quarantine_what_can_be_read, "0-5 is in quarantine, though it can be read"),
        (quarantine_nothing_of_a_tombstone, "0-17 is not in quarantine"),
        (stream_a_gap, "between 0-3 and 0-5 the facts at 0-4 were not told"),
        (stream_a_duplicate, "the fact at 0-4 came again or out of order"),
        (stream_in_another_order, "the fact at 0-3 came again or out of order"),
        (stream_wrong_counts, "successful_uploads 2 for 1"),
        (stream_a_wrong_snapshot, "the snapshot at 0-2 says total_uploads 3 for 0"),
        (stream_an_ignored_fact, "the fact at 0-8 was told, and is no effective fact of what it follows"),
        (stream_another_fact, "was told, the log has"),
        (stream_no_end, "it ended at 0-15, and facts stand at 0-16"),
        (resume_before, "it was resumed at 0-2, the client was at 0-5"),
        (get_another_state, "(GET gives)"),
        (get_nothing, "GET gives the contrary"),
        (miscount, "says 2 completed, its uploads are 1 completed, 1 failed"),
        (miscount, "differs from the fold in completed"),
        (lose_a_row, f"uploads: {UPLOAD} is missing"),
        (invent_a_row, f"upload_batches: {UPLOAD} is there, and not in the log"),
        (change_a_row, f"uploads: {UPLOAD} differs from the fold in attempts (1 for 2)"),
        (replay_otherwise, "uploads: a replay from zero (polls of 1) gives other rows"),
        (verify_otherwise, "verify (polls of 9): uploads differ in 1 row"),
        (claim_too_much, "next_offset of partition 0 is 18, the log says 17"),
        (go_back, "partition 0 went back from 5 to 4"),
        (keep_an_old_epoch, "epoch of partition 0 is 1, the log says 7"),
        (settle_late, "even with the log only after 31.0 s"),
        (settle_never, "even with the log never"),
        (say_ready_without_kafka, "processor said ready 18.0 s after kafka went away"),
        (grow, "api (pid 7) grew: memory_bytes"),
        (leak_tasks, "api (pid 7) grew: tasks from 20 to 200"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_spoilt_history_is_caught(spoil: Callable[[Evidence], None], said: str) -> None:
    history = a_history()

    spoil(history)

    assert any(said in sentence for sentence in violations(history)), violations(history)


OTHER, THIRD, FOREIGN = an_id("other", partition=1), an_id("third"), an_id("foreign", partition=1)


def a_history_of_two_lanes() -> Evidence:
    """A user with two batches in one lane and one in another, where somebody else has one too; all of the user's are
    followed, over server-sent events."""
    lanes = [
        records_of(
            *OPENING,
            a_batch_created(),  # 0-2
            an_upload_queued(),
            a_batch_created(THIRD),  # 0-4
            a_batch_cancelled(),
            a_batch_deleted(THIRD),  # 0-6
        ),
        records_of(
            *OPENING,
            a_batch_created(FOREIGN, user_id=OTHER_USER),  # 1-2
            a_batch_created(OTHER),
            a_batch_sealed(OTHER),  # 1-4
            a_batch_cancelled(FOREIGN, user_id=OTHER_USER),
            a_batch_completed(OTHER, total_uploads=0, successful_uploads=0),  # 1-6
            partition=1,
        ),
    ]
    history = a_history()
    history.records = [*lanes[0], *lanes[1]]
    folded = fold_again(history.records)
    history.rows.lanes, history.rows.batches = folded.state.lanes, folded.state.batches
    history.rows.uploads = folded.state.uploads
    history.rows.verdicts = {
        place: reason for place, reason in folded.reasons.items() if folded.facts[place].batch_id is not None
    }
    history.operations.clear()
    history.positions.clear()
    history.streams = [a_stream_of_all(folded)]
    last = vector(6, 6)
    history.answers = [Answer(batch_id, last, folded.counts_at(batch_id, 6)) for batch_id in (BATCH, OTHER, THIRD)]
    return history


def a_stream_of_all(folded: FoldedLog) -> Stream:
    """A snapshot while the user had two batches, a fact of each lane in turn, and a cut in the middle."""
    (_, queued, cancelled), (created, deleted) = folded.told[BATCH], folded.told[THIRD]
    _, sealed, completed = folded.told[OTHER]
    shown = [folded.counts_at(BATCH, 2), folded.counts_at(OTHER, 3)]
    return Stream(
        None,
        [
            {**SUBSCRIBED, "position": vector(2, 3), "recovered": False, "batches": shown, "truncated": False},
            an_event(BATCH, queued, vector(3, 3)),
            an_event(OTHER, sealed, vector(3, 4)),
            {"type": "cut", "reason": "1012"},
            {**SUBSCRIBED, "position": vector(3, 4), "recovered": True},
            an_event(THIRD, created, vector(4, 4)),
            an_event(BATCH, cancelled, vector(5, 4)),
            an_event(OTHER, completed, vector(5, 6)),
            an_event(THIRD, deleted, vector(6, 6)),
        ],
        user_id=USER,
        by="SSE",
    )


SUBSCRIBED = {"type": "subscribed", "user": True}


def vector(first: int, second: int) -> str:
    return str(Position.of(LOG_ID, {0: first, 1: second}))


def test_a_good_history_of_all_batches_of_a_user_passes() -> None:
    assert violations(a_history_of_two_lanes()) == []


def tell_another_lane_late(history: Evidence) -> None:
    """The position says that the other lane's fact was told."""
    messages = history.streams[0].messages
    messages[1]["position"], messages[2]["position"] = vector(3, 4), vector(3, 4)


def tell_one_lane_only(history: Evidence) -> None:
    messages = history.streams[0].messages
    history.streams[0].messages = [each for each in messages if "event" not in each or partition(each) == 0]


def partition(message: dict[str, Any]) -> int:
    return partition_of(message["event"]["data"]["batch_id"])


def tell_again_after_the_cut(history: Evidence) -> None:
    messages = history.streams[0].messages
    messages.insert(5, copy.deepcopy(messages[2]))


def lose_one_at_the_cut(history: Evidence) -> None:
    del history.streams[0].messages[5]


def go_back_in_the_other_lane(history: Evidence) -> None:
    history.streams[0].messages[6]["position"] = vector(5, 3)


def tell_of_somebody_else(history: Evidence) -> None:
    fact = fold_again(history.records).told[FOREIGN][1]
    history.streams[0].messages.insert(7, an_event(FOREIGN, fact, vector(5, 5)))


def leave_out_a_batch(history: Evidence) -> None:
    del history.streams[0].messages[0]["batches"][1]


def leave_out_one_in_work(history: Evidence) -> None:
    leave_out_a_batch(history)
    history.streams[0].messages[0]["truncated"] = True


def show_a_foreign_batch(history: Evidence) -> None:
    history.streams[0].messages[0]["batches"].append(fold_again(history.records).counts_at(FOREIGN, 3))


def resume_too_early(history: Evidence) -> None:
    history.streams[0].messages[4]["position"] = vector(3, 3)


def begin_anew_too_early(history: Evidence) -> None:
    messages = history.streams[0].messages
    messages[4] = {**messages[0], "position": vector(3, 3)}


def miscount_at_the_end(history: Evidence) -> None:
    answer = history.answers[1]
    history.answers[1] = Answer(OTHER, answer.position, {**(answer.batch or {}), "status": "failed"})


def get_what_was_deleted(history: Evidence) -> None:
    history.answers[2] = Answer(THIRD, history.answers[2].position, history.answers[0].batch)


def hear_nothing(history: Evidence) -> None:
    refused = {"type": "error", "code": "database_unavailable"}
    history.streams[0].messages = [refused, refused, {"type": "cut", "reason": "it was paused"}]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (tell_another_lane_late, "between 0-2.1-3 and 0-3.1-4 the facts at 1-4 were not told"),
        (tell_another_lane_late, "the fact at 1-4 came again or out of order, the client was at 0-3.1-4"),
        (tell_one_lane_only, "between 0-5.1-4 and 0-6.1-6 the facts at 1-6 were not told"),
        (tell_again_after_the_cut, "the fact at 1-4 came again or out of order, the client was at 0-3.1-4"),
        (lose_one_at_the_cut, "between 0-3.1-4 and 0-5.1-4 the facts at 0-4 were not told"),
        (go_back_in_the_other_lane, "the fact at 0-5 came again or out of order, the client was at 0-4.1-4"),
        (tell_of_somebody_else, "the fact at 1-5 was told, and is no effective fact of what it follows"),
        (leave_out_a_batch, f"the snapshot at 0-2.1-3 leaves out batch {OTHER}"),
        (leave_out_one_in_work, f"the snapshot at 0-2.1-3 leaves out batch {OTHER}"),
        (show_a_foreign_batch, f"shows batch {FOREIGN}, which is none of those it follows"),
        (resume_too_early, "it was resumed at 0-3.1-3, the client was at 0-3.1-4"),
        (begin_anew_too_early, "the snapshot at 0-3.1-3 goes back, the client was at 0-3.1-4"),
        (miscount_at_the_end, f"of batch {OTHER} says status completed for failed (GET gives)"),
        (get_what_was_deleted, f"of batch {THIRD} says a deleted batch, GET gives the contrary"),
        (hear_nothing, "nothing was ever told (refused 2 times, last ['database_unavailable']; cut 1 times"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_spoilt_history_of_all_batches_of_a_user_is_caught(spoil: Callable[[Evidence], None], said: str) -> None:
    history = a_history_of_two_lanes()

    spoil(history)

    whose = f"stream 0 of all batches of {USER} over SSE: "
    assert any(sentence.startswith(whose) and said in sentence for sentence in violations(history)), violations(history)


def test_a_long_list_may_leave_out_what_ended() -> None:
    history = a_history_of_two_lanes()
    folded = fold_again(history.records)
    snapshot = {**SUBSCRIBED, "position": vector(6, 6), "recovered": False, "batches": [], "truncated": True}
    history.streams[0].messages.append(snapshot)

    assert violations(history) == []

    snapshot["batches"] = [{**(folded.counts_at(OTHER, 6) or {}), "progress": 0.5}]

    assert violations(history) == [
        f"stream 0 of all batches of {USER} over SSE: {where} says progress 0.5 for 1.0 ({other})"
        for where, other in [
            ("the snapshot at 0-6.1-6", "the fold has"),
            (f"the end at {vector(6, 6)} of batch {OTHER}", "GET gives"),
        ]
    ]


def test_what_a_client_was_told_before_it_was_resumed_is_held_against_get() -> None:
    history = a_history()
    end = history.streams[0].messages[-1]["position"]
    later = at(int(end.rpartition("-")[2]) + 1)
    history.streams[0].messages.append({"type": "subscribed", "position": later, "recovered": True})
    history.answers = [Answer(BATCH, later, {**(rows_answer(history.records) or {}), "failed_uploads": 0})]

    assert any("failed_uploads 1 for 0 (GET gives)" in sentence for sentence in violations(history))


def test_an_unknown_upload_counts_at_most_once() -> None:
    history = a_history(*OPENING, a_batch_created(), an_upload_queued(filename="x.jpg"), a_batch_cancelled())
    history.operations = [Operation("upload", "x.jpg", "unknown")]
    assert violations(history) == []

    twice = a_history(
        *OPENING,
        a_batch_created(),
        an_upload_queued(filename="x.jpg"),
        an_upload_queued(OTHER_UPLOAD, filename="x.jpg"),
        a_batch_cancelled(),
    )
    twice.operations = [Operation("upload", "x.jpg", "unknown")]

    assert violations(twice) == ["upload of 'x.jpg' is effective 2 times, at 0-3, 0-4; 1 at most were asked for"]


def test_an_epoch_that_goes_back_is_caught_even_where_the_index_agrees_with_it() -> None:
    history = a_history()
    zombie_said = (0, 8)

    history.rows.verdicts[zombie_said] = None
    history.rows.verdicts[0, 15] = "upload_ended"

    assert any("effective with epoch 1, the newest is 7" in sentence for sentence in violations(history))


def test_a_batch_that_is_never_completed_is_caught() -> None:
    history = a_history(*CRASHED_AND_DONE[:-1])
    history.operations.clear()

    assert violations(history) == [f"batch {BATCH}: every upload ended, and it was never completed"]


# How often files were tried

ONE_QUEUED = (*OPENING, a_batch_created(), an_upload_queued())
TWO_QUEUED = (*ONE_QUEUED, a_batch_created(OTHER_BATCH), an_upload_queued(OTHER_UPLOAD, OTHER_BATCH))
OTHER_WORKED = (
    an_upload_started(OTHER_UPLOAD, OTHER_BATCH),
    an_upload_succeeded(OTHER_UPLOAD, OTHER_BATCH),
)
FAILED_ONCE = (an_upload_started(), an_upload_attempt_failed())


def said_of_attempts(*events: LogEvent, effective: Sequence[int] = (), copies: Mapping[int, int] | None = None) -> str:
    """What the checker says of the attempts in a log, where the services call the facts at these offsets effective,
    whatever the fold says. `copies`: offset → that of the record of which a late copy stands there."""
    records = records_of(*events)
    for at_offset, of in (copies or {}).items():
        records[at_offset] = dataclasses.replace(records[of], offset=at_offset)
    folded = fold_again(records)
    history = Evidence(records=records)
    history.rows.verdicts = {place: reason for place, reason in folded.reasons.items() if folded.facts[place].batch_id}
    history.rows.verdicts.update({(0, offset): None for offset in effective})
    return "\n".join(attempts.violations(history, folded))


@pytest.mark.parametrize(
    "events",
    [
        CRASHED_AND_DONE,
        (*TWO_QUEUED, an_upload_started(), a_batch_cancelled(), *OTHER_WORKED),
        (*TWO_QUEUED, an_upload_started(), a_batch_deleted(), *OTHER_WORKED),
        (
            *TWO_QUEUED,
            an_upload_started(),
            a_lane_claimed(after=EPOCH),  # 7
            an_upload_attempt_failed(epoch=7),
            an_upload_started(OTHER_UPLOAD, OTHER_BATCH, epoch=7),
        ),
        (
            *ONE_QUEUED,
            *FAILED_ONCE,
            an_upload_started(attempt=2),
            an_upload_interrupted(attempt=2),
            an_upload_started(attempt=2),
            an_upload_failed(attempt=2),
            an_upload_retried(),
            an_upload_started(attempt=3),
            an_upload_attempt_failed(attempt=3),
            an_upload_started(attempt=4),
            an_upload_succeeded(attempt=4),
        ),
    ],
    ids=["crash and zombie", "cancelled in work", "deleted in work", "crashed", "four attempts of two queueings"],
)
def test_attempts_that_went_well_pass(events: tuple[LogEvent, ...]) -> None:
    assert said_of_attempts(*events) == ""


def test_a_late_copy_of_a_start_that_is_given_back_again_passes() -> None:
    given_back = (an_upload_started(), an_upload_interrupted())
    other = an_upload_started(OTHER_UPLOAD, OTHER_BATCH)

    said = said_of_attempts(*TWO_QUEUED, *given_back, other, *given_back, *OTHER_WORKED[1:], copies={9: 6})

    assert said == ""


def test_a_late_copy_of_a_start_that_was_ignored_passes() -> None:
    given_back = (an_upload_started(), an_upload_interrupted())
    ignored = (
        an_upload_started(),
        an_upload_started(),
        an_upload_interrupted(),
    )  # a late copy is in work when it comes
    other = an_upload_started(OTHER_UPLOAD, OTHER_BATCH)

    said = said_of_attempts(
        *TWO_QUEUED, *given_back, *ignored, other, *given_back, *OTHER_WORKED[1:], copies={8: 6, 12: 9}
    )

    assert said == ""


@pytest.mark.parametrize(
    ("events", "effective", "said"),
    [
        (
            (
                *ONE_QUEUED,
                *FAILED_ONCE,
                an_upload_started(attempt=2),
                an_upload_attempt_failed(attempt=2),
                an_upload_started(attempt=3),
                an_upload_failed(attempt=3),
            ),
            [],
            f"UploadFailed at 0-9 ends attempt 3 of one queueing of upload {UPLOAD}, at most 2 are made",
        ),
        (
            (
                *ONE_QUEUED,
                *FAILED_ONCE,
                an_upload_started(attempt=2),
                an_upload_attempt_failed(attempt=2),
                an_upload_started(attempt=3),
                a_batch_cancelled(),
            ),
            [],
            f"UploadStarted at 0-8 begins attempt 3 of one queueing of upload {UPLOAD}, at most 2 are made",
        ),
        (
            (*TWO_QUEUED, an_upload_started(), *OTHER_WORKED),
            [],
            f"UploadStarted at 0-7 begins upload {OTHER_UPLOAD} while the lane works on upload {UPLOAD}",
        ),
        (
            (
                *TWO_QUEUED,
                an_upload_started(),
                a_batch_cancelled(OTHER_BATCH),
                a_batch_created(THIRD),
                an_upload_queued(an_id("third file"), THIRD),
                an_upload_started(an_id("third file"), THIRD),
            ),
            [],
            f"UploadStarted at 0-10 begins upload {an_id('third file')} while the lane works on upload {UPLOAD}",
        ),
        (
            (*ONE_QUEUED, an_upload_started(), an_upload_started()),
            [5],
            f"UploadStarted at 0-5 begins upload {UPLOAD}, whose attempt 1 is in work",
        ),
        (
            (*ONE_QUEUED, *FAILED_ONCE, an_upload_started(attempt=3), an_upload_succeeded(attempt=3)),
            [6, 7],
            "UploadStarted at 0-6 is of attempt 3, and 1 ended before it",
        ),
        (
            (*ONE_QUEUED, *FAILED_ONCE, an_upload_started(), an_upload_succeeded()),
            [6, 7],
            "UploadStarted at 0-6 is of attempt 1, and 1 ended before it",
        ),
        (
            (*ONE_QUEUED, an_upload_started(), an_upload_interrupted(), an_upload_started(attempt=2)),
            [6],
            "UploadStarted at 0-6 is of attempt 2, and 0 ended before it",
        ),
        (
            (*ONE_QUEUED, an_upload_started(), an_upload_failed(), an_upload_retried(), an_upload_started()),
            [7],
            "UploadStarted at 0-7 is of attempt 1, and 1 ended before it",
        ),
        (
            (*ONE_QUEUED, an_upload_succeeded()),
            [4],
            f"UploadSucceeded at 0-4 ends attempt 1 of upload {UPLOAD}, which is not in work",
        ),
        (
            (*ONE_QUEUED, an_upload_started(), an_upload_interrupted(), an_upload_failed()),
            [6],
            f"UploadFailed at 0-6 ends attempt 1 of upload {UPLOAD}, which is not in work",
        ),
    ],
    ids=[
        "three attempts",
        "a third attempt, cancelled",
        "two files at once",
        "two files at once after another batch was cancelled",
        "started twice",
        "a number left out",
        "a number used again",
        "the next number after an interruption",
        "numbered anew after a retry",
        "ended without a start",
        "ended after it was given back",
    ],
)
def test_attempts_that_nobody_may_make_are_caught(
    events: tuple[LogEvent, ...], effective: Sequence[int], said: str
) -> None:
    assert said in said_of_attempts(*events, effective=effective)


def test_attempts_are_part_of_what_is_looked_for() -> None:
    history = a_history(*TWO_QUEUED, an_upload_started(), *OTHER_WORKED)

    assert any("while the lane works on upload" in sentence for sentence in violations(history))
