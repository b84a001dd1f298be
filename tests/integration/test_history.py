"""A batch's past is what folding the log up to there gives, wherever the read models and the tail stand.

Real Kafka and Postgres: a log of two partitions with all kinds of facts, effective and ignored ones, claims and
records that say nothing, of which the read models include a part.
"""

import contextlib
import os
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from schemas.errors import Code, RequestError
from schemas.events import Envelope, Fact, LogEvent, decode, encode
from schemas.ids import new_id
from schemas.position import Position
from schemas.records import NewRecord, StoredRecord
from services.database import Database
from services.eventlog import EventLog, LogSettings, LogUnavailable, LogWriter
from services.history import History, Past, TooMuchPastError
from services.processor.projection import Projection
from services.processor.rows import Rows
from services.tail import Tail
from tests.examples import (
    OTHER_USER,
    USER,
    State,
    a_batch_cancelled,
    a_batch_completed,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    a_request,
    an_id,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    fold,
)

PARTITIONS = 2
JUNK = NewRecord(key=None, value=b"junk", headers=())


@dataclass
class Scene:
    """A log, what was appended to it, and the read models, which include what `project` was told."""

    log: EventLog
    log_id: str
    writer: LogWriter
    database: Database

    async def append(self, *events: LogEvent, partition: int = 0) -> Position:
        """Append each by itself, so that times may differ; the position of the last."""
        for event in events:
            offset = await self.writer.append(partition, [encode(event, an_envelope())], timeout_s=10)
        return Position.of(self.log_id, {partition: offset})

    async def records(self) -> list[StoredRecord]:
        """The whole log, in order within each partition."""
        reader = self.log.reader(range(PARTITIONS))
        for partition in range(PARTITIONS):
            await reader.seek(partition, 0)
        end = sum((await reader.ends()).values())
        records: list[StoredRecord] = []
        while len(records) < end:
            records += await reader.read(records_max=10_000, timeout_ms=1_000)
        await reader.close()
        return sorted(records, key=lambda record: (record.partition, record.offset))

    async def project(self, records: Sequence[StoredRecord]) -> None:
        """Have the read models include these first records of their partitions."""
        for partition in range(PARTITIONS):
            projection = await Projection.open(await Rows.live(self.database), partition=partition, log_id=self.log_id)
            own = [record for record in records if record.partition == partition]
            await projection.fold(own[projection.lane.next_offset :])
            await projection.flush()

    @contextlib.asynccontextmanager
    async def history(self) -> AsyncIterator[History]:
        """The history as a service has it whose tail has read all."""
        past = Past(log=self.log, log_id=self.log_id, database=self.database)
        async with Tail.open(
            log=self.log, database=self.database, log_id=self.log_id, partitions=PARTITIONS, past=past.before
        ) as tail:
            await tail.caught_up()
            yield History(past=past, tail=tail)


@pytest.fixture
async def scene(kafka: str, database_url: str, unique: str) -> AsyncIterator[Scene]:
    settings = LogSettings(bootstrap_servers=kafka, topic=unique, progress_topic=f"{unique}.progress")
    database = await Database.open(database_url)
    await database.migrate()
    async with EventLog.open(settings) as log:
        await log.ensure_topics(partitions=PARTITIONS)
        identity = await log.ensure_created(partitions=PARTITIONS, source="/sluice/tests")
        yield Scene(log, identity.log_id, log.writer(), database)
    await database.close()


def an_envelope() -> Envelope:
    return Envelope(id=new_id(now_ms=0, random=os.urandom(9)), source="/sluice/tests", time="2026-01-01T12:00:00Z")


def a_story(seed: int, *, partition: int, steps: int) -> tuple[list[str], list[LogEvent | None]]:
    """Batch ids, and facts about them that make sense about half of the time; None for a record of junk."""
    chance = random.Random(seed)
    batches = [an_id("batch", seed, number, partition=partition) for number in range(3)]
    uploads = {batch: [an_id("upload", batch, number, partition=partition) for number in range(3)] for batch in batches}
    epoch = 1
    story: list[LogEvent | None] = [a_lane_claimed(), *(a_batch_created(batch) for batch in batches)]
    for offset in range(len(story) + 1, steps):
        batch = chance.choice(batches)
        upload = chance.choice(uploads[batch])
        of_work = {"epoch": chance.choice((epoch, epoch, epoch, 1)), "attempt": chance.choice((1, 1, 2, 3))}
        user = {"user_id": chance.choice((USER, USER, USER, OTHER_USER))}
        story.append(
            chance.choice(
                (
                    None,
                    a_lane_claimed(after=chance.choice((epoch, epoch, 0)), worker_id=str(offset)),
                    a_batch_created(batch, request=a_request("another")),
                    *[an_upload_queued(upload, batch, **user)] * 3,
                    a_batch_sealed(batch, **user),
                    an_upload_retried(upload, batch, queueing=chance.choice((2, 3)), **user),
                    *[an_upload_started(upload, batch, **of_work)] * 6,
                    an_upload_interrupted(upload, batch, **of_work),
                    an_upload_attempt_failed(upload, batch, **of_work),
                    an_upload_succeeded(upload, batch, **of_work),
                    an_upload_failed(upload, batch, **of_work),
                    a_batch_completed(batch, epoch=epoch),
                )
            )
        )
        last = story[-1]
        if last is not None and last.type == "sluice.LaneClaimed.v1" and last.after == epoch:  # type: ignore[union-attr]
            epoch = offset
    story += [a_batch_cancelled(batches[1]), a_batch_sealed(batches[1])]
    return batches, story


async def told(scene: Scene, seed: int) -> tuple[list[str], list[StoredRecord]]:
    """Append a story to each partition; its batches and the whole log."""
    ids: list[str] = []
    for partition in range(PARTITIONS):
        batches, story = a_story(seed, partition=partition, steps=70)
        ids += batches
        records = [JUNK if event is None else encode(event, an_envelope()) for event in story]
        for begin in range(0, len(records), 7):
            await scene.writer.append(partition, records[begin : begin + 7], timeout_s=10)
    return ids, await scene.records()


@pytest.mark.parametrize("projected", [0.0, 0.5, 1.0], ids=["nothing", "half", "all"])
async def test_the_state_at_every_position_is_what_folding_up_to_there_gives(scene: Scene, projected: float) -> None:
    ids, records = await told(scene, seed=int(projected * 10))
    await scene.project(
        [record for record in records if record.offset < projected * max(each.offset + 1 for each in records)]
    )

    state, effects = State(), 0
    async with scene.history() as history:
        for record in records:
            state.apply(decode(record))
            at = Position.of(scene.log_id, {record.partition: record.offset})
            for batch_id in ids:
                if int(batch_id[-2:], 16) != record.partition:
                    continue
                expected = state.batches.get(batch_id)
                if expected is None:
                    with pytest.raises(RequestError, match="did not exist then"):
                        await history.state_at(batch_id, user_id=USER, at=at)
                    continue
                batch, uploads, newest = await history.state_at(batch_id, user_id=USER, at=at)
                assert batch == expected
                assert uploads == {upload.id: upload for upload in state.uploads_of(batch_id)}
                assert newest.offset(record.partition) == expected.offset
                effects += expected.offset == record.offset

    assert effects > 15
    assert len(set(state.ignored)) > 4


@pytest.mark.parametrize("projected", [0.0, 0.5, 1.0], ids=["nothing", "half", "all"])
async def test_the_events_are_all_facts_of_the_batch_with_what_became_of_them_page_by_page(
    scene: Scene, projected: float
) -> None:
    ids, records = await told(scene, seed=3)
    await scene.project([record for record in records if record.offset <= projected * 70])
    expected: dict[str, list[tuple[Fact, int, str | None]]] = {batch_id: [] for batch_id in ids}
    state = State()
    for record in records:
        fact = decode(record)
        outcome = state.apply(fact)
        if isinstance(fact, Fact) and fact.batch_id is not None:
            reason = outcome if isinstance(outcome, str) else None
            expected[fact.batch_id].append((fact, state.lanes[fact.partition].time_ms, reason))

    async with scene.history() as history:
        for batch_id in ids:
            found, after = [], None
            while page := await history.events(batch_id, user_id=USER, after=after, limit=7):
                assert len(page) <= 7
                found += page
                after = page[-1].fact.offset

            assert [(each.fact, each.time_ms, each.ignored) for each in found] == expected[batch_id]


async def test_the_state_at_a_time_includes_all_facts_up_to_it(scene: Scene) -> None:
    batch_id = an_id("by time")
    uploads = [an_id("by time", number) for number in range(20)]
    await scene.append(a_batch_created(batch_id), *(an_upload_queued(upload_id, batch_id) for upload_id in uploads))
    records = await scene.records()
    await scene.project([record for record in records if record.offset < 12])
    times_ms = sorted({record.timestamp_ms for record in records if record.partition == 0 and record.offset > 0})

    async with scene.history() as history:
        for at_ms in times_ms:
            batch, found, _ = await history.state_at(batch_id, user_id=USER, at=at_ms)
            state = fold(record for record in records if record.timestamp_ms <= at_ms and record.partition == 0)
            assert (batch, found) == (state.batches[batch_id], state.uploads)
        with pytest.raises(RequestError, match="did not exist then"):
            await history.state_at(batch_id, user_id=USER, at=times_ms[0] - 1)

    assert len(times_ms) > 1


async def test_of_a_position_of_several_partitions_the_batchs_own_counts(scene: Scene) -> None:
    batch_id, upload_id = an_id("second", partition=1), an_id("upload", partition=1)
    await scene.append(a_batch_created(batch_id), an_upload_queued(upload_id, batch_id), partition=1)

    async with scene.history() as history:
        batch, uploads, newest = await history.state_at(
            batch_id, user_id=USER, at=Position.of(scene.log_id, {0: 0, 1: 1})
        )
        with pytest.raises(RequestError, match="did not exist then"):
            await history.state_at(batch_id, user_id=USER, at=Position.of(scene.log_id, {0: 0}))

    assert (batch.total, uploads) == (0, {})
    assert newest == Position.of(scene.log_id, {1: 1})


async def test_what_is_given_out_is_the_callers_own(scene: Scene) -> None:
    batch_id = an_id("own")
    last = await scene.append(a_batch_created(batch_id), an_upload_queued(an_id("u"), batch_id))

    async with scene.history() as history:
        batch, uploads, _ = await history.state_at(batch_id, user_id=USER, at=last)
        batch.queued = 99
        uploads[an_id("u")].status = "failed"
        again, uploads_again, _ = await history.state_at(batch_id, user_id=USER, at=last)

    assert (again.queued, uploads_again[an_id("u")].status) == (1, "queued")


@pytest.mark.parametrize("projected", [False, True])
async def test_unknown_foreign_and_deleted_batches_are_not_found(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, *, projected: bool
) -> None:
    monkeypatch.setattr("services.history.END_TIMEOUT_S", 60.0)
    gone, kept = an_id("gone"), an_id("kept")
    await scene.append(a_batch_created(gone), a_batch_created(kept), a_batch_deleted(gone))
    if projected:
        await scene.project(await scene.records())

    async with scene.history() as history:
        for batch_id, user_id in ((gone, USER), (an_id("nobody"), USER), (kept, OTHER_USER), ("no-id", USER)):
            with pytest.raises(RequestError) as asked_events:
                await history.events(batch_id, user_id=user_id, limit=10)
            with pytest.raises(RequestError) as asked_state:
                await history.state_at(batch_id, user_id=user_id, at=Position.of(scene.log_id, {0: 1}))
            assert (asked_events.value.code, asked_state.value.code) == (Code.NOT_FOUND, Code.NOT_FOUND)


async def test_nobody_is_told_not_found_while_the_log_cannot_be_read_to_its_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_tail: Tail, _timeout_s: float) -> bool:
        return False

    async with scene.history() as history:
        monkeypatch.setattr(Tail, "reached_end", away)
        with pytest.raises(LogUnavailable, match="ask again"):
            await history.events(an_id("made elsewhere"), user_id=USER, limit=10)


async def test_a_position_of_another_log_or_beyond_the_end_is_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.history.END_TIMEOUT_S", 0.2)
    batch_id = an_id("here")
    last = await scene.append(a_batch_created(batch_id))

    async with scene.history() as history:
        with pytest.raises(RequestError) as another:
            await history.state_at(batch_id, user_id=USER, at=Position.of("00000000", {0: 1}))
        with pytest.raises(RequestError) as beyond:
            await history.state_at(batch_id, user_id=USER, at=last.at(0, 1_000))

    assert (another.value.code, beyond.value.code) == (Code.POSITION_OF_ANOTHER_LOG, Code.PROJECTION_BEHIND)


async def test_a_replay_tells_each_effective_fact_with_the_batch_after_it_the_deletion_too(scene: Scene) -> None:
    batch_id, upload_id = an_id("replayed"), an_id("u")
    await scene.append(a_lane_claimed(), a_batch_created(batch_id), an_upload_queued(upload_id, batch_id))
    await scene.append(an_upload_started(upload_id, batch_id, attempt=9), a_batch_sealed(batch_id))
    await scene.project(await scene.records())
    await scene.append(an_upload_started(upload_id, batch_id), a_batch_deleted(batch_id), a_batch_sealed(batch_id))

    async with scene.history() as history:
        replay = history.replayed(batch_id, after=2, upto=8, facts_max=8)
        heard = [(past.fact.offset, batch.sealed, batch.processing, batch.deleted) async for past, batch in replay]
        with pytest.raises(TooMuchPastError):
            await anext(history.replayed(batch_id, after=2, upto=8, facts_max=6))

    assert heard == [(3, False, 0, False), (5, True, 0, False), (6, True, 1, False), (7, True, 1, True)]
