"""What tests of replay, verify and quarantine share: a log with a bit of everything in it, rows as Postgres has them.

`a_story` makes facts that are mostly plausible, some ignored, from a seed; `Ground` is a log in Kafka with a database;
`rows_of` shows every row of a generation as text, so that two of them are equal byte for byte or not at all.
"""

import contextlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from schemas.batch import completion
from schemas.events import Envelope, LogEvent, encode
from schemas.records import NewRecord
from services.database import Database
from services.eventlog import EventLog, Log, LogSettings
from services.migrating import tables
from services.processor.projection import Projection
from services.processor.replay import Replay, Replayed
from services.processor.rows import Rows
from services.processor.verifying import Verification, Verified
from tests.examples import (
    State,
    a_batch_cancelled,
    a_batch_created,
    a_batch_deleted,
    a_batch_sealed,
    a_lane_claimed,
    a_log_created,
    a_request,
    an_id,
    an_upload_attempt_failed,
    an_upload_failed,
    an_upload_interrupted,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    log_of,
)

POISON = NewRecord(key=b"\xff\xfe", value=b"\x00not json\xff", headers=(("ce_type", b"sluice.BatchCreated.v1"),))
USERS = ("ada", "grace", "jo")


def a_story(seed: int, *, facts: int, partition: int = 0) -> list[LogEvent]:
    """So many facts for the end of a log that holds LogCreated only: a claim, and then what users and a worker do."""
    chance = random.Random(seed)
    batches = [an_id("story", seed, number, partition=partition) for number in range(9)]
    owner = {batch_id: USERS[number % len(USERS)] for number, batch_id in enumerate(batches)}
    uploads = {b: [an_id("story upload", b, n, partition=partition) for n in range(5)] for b in batches}
    story: list[LogEvent] = [a_lane_claimed()]
    state = State()
    for fact in log_of(a_log_created(), *story, partition=partition):
        state.apply(fact)
    while len(story) < facts:
        batch_id = chance.choice(batches)
        event = _next(state, batch_id, chance.choice(uploads[batch_id]), owner[batch_id], chance)
        (fact,) = log_of(event, partition=partition, first_offset=len(story) + 1)
        state.apply(fact)
        story.append(event)
    return story


def _next(  # noqa: PLR0911  # one return a thing that may happen
    state: State, batch_id: str, upload_id: str, user_id: str, chance: random.Random
) -> LogEvent:
    """Something that may happen to this upload, or to its batch."""
    batch, upload = state.batches.get(batch_id), state.uploads.get(upload_id)
    if batch is None:
        return a_batch_created(batch_id, user_id=user_id, metadata={"trip": "Ísland", "n": 1.5})
    rare = chance.random()
    if rare < 0.02:
        return a_batch_deleted(batch_id, user_id=user_id)
    if rare < 0.05:
        return a_batch_cancelled(batch_id, user_id=user_id)
    if rare < 0.15 and batch.completable:
        return completion(batch, epoch=1)
    if rare < 0.2:
        return a_batch_sealed(batch_id, user_id=user_id)
    if upload is None:
        return an_upload_queued(upload_id, batch_id, user_id=user_id)
    if upload.status == "queued":
        return an_upload_started(upload_id, batch_id, attempt=upload.attempts + 1, epoch=1)
    if upload.status == "failed":
        request = a_request(f"retry of {upload_id}") if chance.random() < 0.5 else None
        return an_upload_retried(upload_id, batch_id, queueing=upload.queueing + 1, user_id=user_id, request=request)
    ended = chance.choice([an_upload_succeeded, an_upload_failed, an_upload_attempt_failed, an_upload_interrupted])
    return ended(upload_id, batch_id, attempt=upload.attempts or 1, epoch=1)


@dataclass
class Ground:
    """A log and a database that may hold its read models."""

    log: Log
    log_id: str
    partitions: int
    database: Database

    async def append(self, *events: LogEvent | NewRecord, partition: int = 0) -> int:
        """Append one after the other, in one group; the offset of the first."""
        writer = self.log.writer()
        records = [
            event
            if isinstance(event, NewRecord)
            else encode(event, Envelope(id=an_id("envelope", number, event.type), source="test", time=""))
            for number, event in enumerate(events)
        ]
        try:
            return await writer.append(partition, records, timeout_s=10)
        finally:
            await writer.close()

    async def project(
        self, *, poll: int = 7, quarantined: Mapping[int, str] | None = None, upto: int | None = None
    ) -> None:
        """What the processors of all lanes do, so many records a transaction, to the log's end."""
        for number in range(self.partitions):
            rows = await Rows.live(self.database)
            forced = await rows.quarantined(number, log_id=self.log_id, first=0)
            projection = await Projection.open(
                rows, partition=number, log_id=self.log_id, quarantined={**forced, **(quarantined or {})}
            )
            reader = self.log.reader([number])
            await reader.seek(number, projection.lane.next_offset)
            end = (await reader.ends())[number] if upto is None else upto
            while (left := end - projection.lane.next_offset) > 0:
                await projection.fold(await reader.read(records_max=min(poll, left), timeout_ms=1_000))
                await projection.flush()
            await reader.close()

    async def replay(self, **options: object) -> Replayed:
        replay = Replay(
            log=self.log,
            log_id=self.log_id,
            partitions=self.partitions,
            database=self.database,
            on_step=lambda _progress: None,
            **options,  # type: ignore[arg-type]  # whichever the test is about
        )
        return await replay.run()

    async def verify(self, **options: object) -> Verified:
        verification = Verification(
            log=self.log,
            log_id=self.log_id,
            database=self.database,
            on_step=lambda _progress: None,
            **options,  # type: ignore[arg-type]  # whichever the test is about
        )
        return await verification.run()

    async def live(self) -> str:
        return await self.database.generation(fresh=True)

    async def rows(self) -> dict[str, list[str]]:
        return await rows_of(self.database, await self.live())

    async def quarantine(self) -> list[tuple[int, int]]:
        async with self.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT partition, record_offset FROM sluice_ops.quarantine WHERE log_id = $1 ORDER BY 1, 2",
                self.log_id,
            )
        return [(row["partition"], row["record_offset"]) for row in rows]

    async def schemas(self) -> list[str]:
        """The schemas of read models, live or not."""
        async with self.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT nspname FROM pg_namespace WHERE nspname ~ '^gen_' OR nspname = 'verification' ORDER BY 1"
            )
        return [row["nspname"] for row in rows]

    async def execute(self, statement: str) -> None:
        async with self.database.connection() as connection:
            await connection.execute(statement)


async def rows_of(database: Database, schema: str) -> dict[str, list[str]]:
    """Every row of every table, as Postgres writes it."""
    async with database.connection() as connection:
        return {
            table: [
                row["shown"]
                for row in await connection.fetch(
                    f"SELECT each::text AS shown FROM {schema}.{table} AS each ORDER BY 1"
                )
            ]
            for table in tables()
        }


@contextlib.asynccontextmanager
async def a_ground(
    *, kafka: str, database_url: str, topic: str, partitions: int = 1, stories: Sequence[Sequence[LogEvent]] = ()
) -> AsyncIterator[Ground]:
    """A log that holds these stories, one a partition, and a database whose tables are empty."""
    settings = LogSettings(bootstrap_servers=kafka, topic=topic, progress_topic=f"{topic}.progress")
    async with EventLog.open(settings) as log:
        await log.ensure_topics(partitions=partitions)
        identity = await log.ensure_created(partitions=partitions, source="test")
        database = await Database.open(database_url)
        try:
            await database.migrate()
            ground = Ground(log, identity.log_id, partitions, database)
            for number, story in enumerate(stories):
                await ground.append(*story, partition=number)
            yield ground
        finally:
            await database.close()
