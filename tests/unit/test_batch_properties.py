"""What holds for any log whatever: facts in any order, copied, delayed, under old epochs, of the wrong user.

`logs` writes logs of two batches by asking the state what could happen next, and now and then writes something else: an
earlier fact again, or one that never made sense. The invariants are asked after every fact.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from hypothesis import assume, event, given
from hypothesis import strategies as st

from schemas.batch import ATTEMPTS_PER_QUEUEING, Batch, Changed, Ignored, Upload, completion
from schemas.events import (
    BatchCompleted,
    BatchDeleted,
    Erased,
    Fact,
    LaneClaimed,
    LogEvent,
    OfBatch,
    UploadFailed,
    UploadInterrupted,
    UploadQueued,
    UploadRetried,
    UploadStarted,
    UploadSucceeded,
)
from schemas.views import BatchView, UploadView, progress_of
from tests.examples import (
    LIMITS,
    LOG_ID,
    OPENING,
    OTHER_USER,
    START_MS,
    STEP_MS,
    USER,
    State,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    a_log_created,
    a_request,
    an_erased,
    an_id,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    fold,
    log_of,
    stored,
)

UPLOADS_OF = {an_id("batch", b): [an_id("upload", b, u) for u in range(4)] for b in range(2)}
BATCHES = list(UPLOADS_OF)
UPLOADS = [upload_id for upload_ids in UPLOADS_OF.values() for upload_id in upload_ids]
BUCKETS = ("queued", "processing", "completed", "failed", "cancelled")
SMALL = LIMITS.model_copy(update={"files_max": 3, "batch_bytes_max": 2_500})
LENGTH_MAX = 40

numbers = st.integers(1, 4)
epochs = st.integers(0, LENGTH_MAX)
users = st.sampled_from([USER, USER, OTHER_USER])
requests = st.none() | st.builds(a_request, st.sampled_from("ab"), st.sampled_from("xy"))
batch_ids = st.sampled_from(BATCHES)
upload_ids = st.sampled_from(UPLOADS)
attempt = {"upload_id": upload_ids, "batch_id": batch_ids, "attempt": numbers, "epoch": epochs}
by_user = {"batch_id": batch_ids, "user_id": users, "request": requests}
completions = {"batch_id": batch_ids, "epoch": epochs, "total_uploads": numbers, "successful_uploads": numbers}

nonsense: st.SearchStrategy[LogEvent | Erased] = st.one_of(
    st.builds(an_erased, batch_ids, upload_ids, event=st.just("UploadQueued")),
    st.just(a_log_created()),
    st.builds(a_lane_claimed, st.none() | epochs),
    st.builds(a_batch_created, **by_user, expected_uploads=st.none() | st.integers(0, 3), limits=st.just(SMALL)),
    st.builds(an_upload_queued, upload_id=upload_ids, **by_user, size_bytes=st.integers(0, 3_000)),
    st.builds(a_batch_sealed, **by_user),
    st.builds(a_batch_cancelled, **by_user),
    st.builds(a_batch_deleted, **by_user),
    st.builds(an_upload_retried, upload_id=upload_ids, **by_user, queueing=st.integers(2, 4)),
    st.builds(an_upload_started, **attempt),
    st.builds(an_upload_interrupted, **attempt),
    st.builds(an_upload_attempt_failed, **attempt),
    st.builds(an_upload_succeeded, **attempt),
    st.builds(an_upload_failed, **attempt),
    st.builds(a_batch_completed, **completions, status=st.sampled_from(["completed", "failed"])),
)


Maker = Callable[[], LogEvent]
"""An event that could be appended, made only if it is chosen."""


def possible(state: State) -> list[Maker]:
    """What an honest api or processor could append now, in the ordinary course of things."""
    makers: list[Maker] = []
    for batch_id in BATCHES:
        batch = state.batches.get(batch_id)
        if batch is None:
            makers.append(partial(a_batch_created, batch_id, limits=SMALL, request=a_request("create")))
            makers.append(partial(a_batch_created, batch_id, limits=SMALL, expected_uploads=2))
        elif not batch.deleted:
            makers += _possible_in(batch, state)
    return makers


def _possible_in(batch: Batch, state: State) -> Iterable[Maker]:
    epoch = state.lane.epoch
    if epoch is not None:
        if batch.completable:
            yield partial(completion, batch, epoch=epoch)
        for upload in state.uploads_of(batch.id):
            yield from _possible_of(upload, epoch, batch_cancelled=batch.status == "cancelled")
    if not (batch.sealed or batch.ended):
        yield partial(a_batch_sealed, batch.id)
        yield from (partial(an_upload_queued, u, batch.id) for u in UPLOADS_OF[batch.id] if u not in state.uploads)


def _possible_of(upload: Upload, epoch: int, *, batch_cancelled: bool) -> Iterable[Maker]:
    if upload.status == "queued":
        yield partial(an_upload_started, upload.id, upload.batch_id, attempt=upload.attempts + 1, epoch=epoch)
    elif upload.status == "processing":
        makers: list[Callable[..., LogEvent]] = [an_upload_interrupted, an_upload_succeeded, an_upload_failed]
        if upload.attempts_of_queueing < ATTEMPTS_PER_QUEUEING:
            makers.append(an_upload_attempt_failed)
        for make in makers:
            yield partial(make, upload.id, upload.batch_id, attempt=upload.attempts, epoch=epoch)
    elif upload.status == "failed" and not batch_cancelled:
        yield partial(an_upload_retried, upload.id, upload.batch_id, queueing=upload.queueing + 1)


def incisive(state: State) -> list[Maker]:
    """What else could be appended, and ends much: seldom, or nothing would ever come to its end by itself."""
    live = [batch for batch in state.batches.values() if not batch.deleted]
    return [
        partial(a_lane_claimed, after=state.lane.epoch),
        *(partial(a_batch_cancelled, batch.id) for batch in live if not batch.ended),
        *(partial(a_batch_deleted, batch.id) for batch in live),
    ]


@st.composite
def logs(draw: st.DrawFn, *, honest: bool = False) -> list[Fact]:
    """A log of `OPENING` and up to 40 facts; clocks may step back. `honest`: only what could happen."""
    state = fold(log_of(*OPENING))
    facts = log_of(*OPENING)
    for offset in range(len(facts), len(facts) + draw(st.integers(0, LENGTH_MAX))):
        sources = ["possible"] * 15 + ["incisive"] + ([] if honest else ["again", "nonsense"] * 2)
        said: LogEvent | Erased
        match draw(st.sampled_from(sources)):
            case "possible":
                said = draw(st.sampled_from(possible(state) or incisive(state)))()
            case "incisive":
                said = draw(st.sampled_from(incisive(state)))()
            case "again":
                said = draw(st.sampled_from([fact.event for fact in facts]))
            case _:
                said = draw(nonsense)
        time_ms = START_MS + draw(st.integers(-STEP_MS, 10 * STEP_MS))
        (fact,) = log_of(said, first_offset=offset, first_ms=time_ms)
        state.apply(fact)
        facts.append(fact)
    return facts


def relogged(events: Iterable[LogEvent | Erased], *, after: Sequence[Fact]) -> list[Fact]:
    """These events appended to a log, a second apart."""
    return log_of(*events, first_offset=len(after), first_ms=after[-1].timestamp_ms + STEP_MS)


def content(state: State) -> str:
    """All of a state that facts change, but for the place and time of the newest record."""
    lanes = [dataclasses.replace(lane, next_offset=0, time_ms=0) for lane in state.lanes.values()]
    return repr((lanes, sorted(state.batches.items()), sorted(state.uploads.items())))


def check_counts(state: State) -> None:
    for batch in state.batches.values():
        if batch.deleted:
            assert not state.uploads_of(batch.id)
            continue
        found: Counter[str] = Counter(upload.status for upload in state.uploads_of(batch.id))
        assert {bucket: getattr(batch, bucket) for bucket in BUCKETS} == {bucket: found[bucket] for bucket in BUCKETS}
        assert batch.total == found.total() <= batch.files_max
        assert batch.size_bytes == sum(upload.size_bytes for upload in state.uploads_of(batch.id))
        assert batch.size_bytes <= batch.batch_bytes_max


def check_views(state: State) -> None:
    for batch in state.batches.values():
        view = BatchView.of_log(batch, log_id=LOG_ID)
        assert view.processed_uploads == view.successful_uploads + view.failed_uploads
        waiting = batch.queued + batch.processing
        assert view.total_uploads == view.processed_uploads + view.cancelled_uploads + waiting
        assert 0 <= progress_of(batch) <= 1
    for upload in state.uploads.values():
        assert UploadView.of_log(upload, log_id=LOG_ID, partition=0).attempts >= 0


def check_ends(state: State) -> None:
    for batch in state.batches.values():
        assert batch.ended == (batch.completed_ms is not None)
        if batch.deleted or not batch.ended:
            continue
        assert batch.queued == batch.processing == 0
        assert progress_of(batch) == 1
        assert batch.sealed or batch.status == "cancelled"
        assert (batch.status == "failed") == (batch.error_message is not None)
    for upload in state.uploads.values():
        assert upload.ended == (upload.completed_ms is not None)
        assert (upload.status == "completed") == (upload.result is not None)
        assert 0 <= upload.attempts_of_queueing <= upload.attempts
        assert upload.place <= upload.offset <= state.batches[upload.batch_id].offset


@given(logs())
def test_after_every_fact_the_counts_add_up_and_what_ended_is_whole(log: list[Fact]) -> None:
    state = State()
    for fact in log:
        state.apply(fact)
        check_counts(state)
        check_views(state)
        check_ends(state)
    for batch in state.batches.values():
        event(f"a batch ends up {'deleted' if batch.deleted else batch.status}")


@given(
    logs(honest=True).flatmap(lambda log: st.permutations([fact.event for fact in log])),
    st.randoms(use_true_random=False),
)
def test_facts_in_any_order_and_number_keep_the_counts(events: list[LogEvent | Erased], chance: random.Random) -> None:
    state = State()
    for fact in log_of(*events, *chance.choices(events, k=len(events))):
        state.apply(fact)
        check_counts(state)
        check_ends(state)


@given(logs())
def test_an_ignored_fact_changes_nothing_and_an_effective_one_is_where_it_says(log: list[Fact]) -> None:
    state = State()
    for fact in log:
        before = content(state)
        outcome = state.apply(fact)
        if isinstance(outcome, Ignored):
            assert content(state) == before
        elif outcome is not None and outcome.batch is not None:
            assert outcome.batch.offset == fact.offset
            assert outcome.upload is None or outcome.upload.offset == fact.offset


@given(logs())
def test_each_queueing_has_at_most_one_effective_outcome(log: list[Fact]) -> None:
    outcomes: Counter[tuple[str, int]] = Counter()
    state = State()
    for fact in log:
        changed = state.apply(fact)
        if isinstance(fact.event, UploadSucceeded | UploadFailed) and isinstance(changed, Changed):
            assert changed.upload is not None
            outcomes[changed.upload.id, changed.upload.queueing] += 1

    assert not outcomes or max(outcomes.values()) == 1
    for upload in state.uploads.values():
        assert outcomes[upload.id, upload.queueing] == (upload.status in ("completed", "failed"))


@given(logs())
def test_what_ended_stays_ended_but_for_a_retry(log: list[Fact]) -> None:
    state = State()
    for fact in log:
        ended = {batch.id: batch.status for batch in state.batches.values() if batch.ended}
        deleted = {batch.id for batch in state.batches.values() if batch.deleted}
        uploads = {upload.id: upload.status for upload in state.uploads.values() if upload.ended}
        state.apply(fact)
        retried = fact.event if isinstance(fact.event, UploadRetried) else None
        for batch_id, status in ended.items():
            if state.batches[batch_id].status != status:
                assert retried is not None
                assert (retried.batch_id, status in ("completed", "failed")) == (batch_id, True)
        assert all(state.batches[batch_id].deleted for batch_id in deleted)
        for upload_id in uploads.keys() & state.uploads.keys():
            if state.uploads[upload_id].status != uploads[upload_id]:
                assert retried is not None
                assert (retried.upload_id, uploads[upload_id]) == (upload_id, "failed")


@given(logs())
def test_facts_under_any_epoch_but_the_newest_are_ignored(log: list[Fact]) -> None:
    state = State()
    for fact in log:
        epoch = state.lanes[0].epoch if state.lanes else None
        outcome = state.apply(fact)
        if getattr(fact.event, "epoch", epoch) != epoch:
            assert isinstance(outcome, Ignored)
        if isinstance(fact.event, LaneClaimed) and isinstance(outcome, Changed):
            assert fact.event.after == epoch
            assert state.lane.epoch == fact.offset


@given(logs(), st.integers(0, LENGTH_MAX))
def test_folding_a_part_and_then_the_rest_is_folding_all(log: list[Fact], cut: int) -> None:
    prefix = fold(log[:cut])

    assert fold(log[cut:], onto=prefix) == fold(log)
    assert prefix == fold(log[:cut])


@given(logs())
def test_folding_the_bytes_is_folding_the_facts(log: list[Fact]) -> None:
    assert fold(stored(fact) for fact in log) == fold(log)


@given(logs())
def test_a_log_whose_effective_facts_are_all_appended_again_ends_in_the_same_state(log: list[Fact]) -> None:
    once = fold(log)
    effective = [fact.event for fact, said in zip(log, once.outcomes, strict=True) if isinstance(said, Changed)]
    claimed = relogged([a_lane_claimed(after=once.lane.epoch)], after=log)

    twice = fold([*log, *claimed, *relogged(effective, after=[*log, *claimed])])

    assert content(twice) == content(fold([*log, *claimed]))


@given(logs(), st.data())
def test_a_copy_of_an_effective_fact_is_ignored_at_once_and_later(log: list[Fact], data: st.DataObject) -> None:
    """But for two kinds: an attempt's number is used again after an interruption, so within one epoch a copy of its
    start is its next start; and a batch that was retried and ended alike completes in the same words."""
    state = fold(log)
    effective = [fact for fact, said in zip(log, state.outcomes, strict=True) if isinstance(said, Changed)]
    fact = data.draw(st.sampled_from(effective))
    later = log[: data.draw(st.integers(fact.offset + 1, len(log)))]
    assume(not isinstance(fact.event, UploadStarted | UploadInterrupted) or not _interrupted(later, fact))
    assume(not isinstance(fact.event, BatchCompleted) or not _retried(later, fact))

    copied = fold([*later, *relogged([fact.event], after=later)])

    assert isinstance(copied.last, Ignored)


def _interrupted(log: Iterable[Fact], by: Fact) -> bool:
    return any(isinstance(fact.event, UploadInterrupted) and fact.upload_id == by.upload_id for fact in log)


def _retried(log: Iterable[Fact], by: Fact) -> bool:
    return any(isinstance(fact.event, UploadRetried) and fact.batch_id == by.batch_id for fact in log)


@given(logs())
def test_the_batches_of_a_log_do_not_touch_each_other(log: list[Fact]) -> None:
    """Each batch's facts alone, with the lane's, give the same batch and uploads: so it can be folded by itself.
    That no upload's id is queued in two batches is the word of those who make ids."""
    queued = [fact.event for fact in log if isinstance(fact.event, UploadQueued)]
    assume(all(said.upload_id in UPLOADS_OF[said.batch_id] for said in queued))
    whole = fold(log)
    for batch_id in BATCHES:
        others = [fact.offset for fact in log if isinstance(fact.event, OfBatch) and fact.batch_id != batch_id]
        alone = fold(_blanked(fact) if fact.offset in others else fact for fact in log)
        assert alone.batches.get(batch_id) == whole.batches.get(batch_id)
        assert alone.uploads_of(batch_id) == whole.uploads_of(batch_id)


def _blanked(fact: Fact) -> Fact:
    """A fact that means nothing, in the same place."""
    return dataclasses.replace(fact, event=a_batch_deleted(an_id("no batch")))


@given(logs(honest=True))
def test_what_could_happen_is_effective_but_for_limits(log: list[Fact]) -> None:
    """Holds the generator to its word: were it to write nonsense only, the other properties would say little."""
    assert set(fold(log).ignored) <= {Ignored.TOO_MANY_FILES, Ignored.BATCH_TOO_LARGE}


@given(logs())
def test_after_a_deletion_nothing_but_the_tombstone_is_left(log: list[Fact]) -> None:
    state = fold(log)
    deleted = [fact.batch_id for fact in log if isinstance(fact.event, BatchDeleted)]
    for batch_id in deleted:
        batch = state.batches.get(batch_id or "")
        if batch is not None and batch.deleted:
            later = relogged([an_upload_queued(UPLOADS_OF[batch.id][0], batch.id)], after=log)
            assert fold(later, onto=state).last in (Ignored.DELETED, Ignored.FOREIGN)
