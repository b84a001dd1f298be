"""What the log says, read from its first record and folded here, apart from every service: the judge of answers."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from schemas.batch import Batch, Changed, Ignored, Upload, evolve, step
from schemas.batch import Lane as LaneState
from schemas.events import Fact, LaneClaimed, LogCreated, LogEvent, Undecodable, decode
from schemas.position import Position
from schemas.views import BatchView, UploadView
from services.eventlog import EventLog, LogSettings
from services.folding import Held
from services.settings import Settings


@dataclass
class Judge:
    """`became`: each fact of a batch with the reason it was ignored for, None for an effective one."""

    log_id: str = ""
    batches: dict[str, Held] = field(default_factory=dict)
    became: list[tuple[Fact, Ignored | None]] = field(default_factory=list)

    def batch(self, batch_id: str) -> Batch:
        batch = self.batches[batch_id].batch
        assert batch is not None
        return batch

    def uploads(self, batch_id: str) -> list[Upload]:
        return list(self.batches[batch_id].uploads.values())

    def view(self, batch_id: str) -> dict[str, object]:
        """The batch as the api must show it."""
        return BatchView.of_log(self.batch(batch_id), log_id=self.log_id).model_dump(mode="json")

    def upload_view(self, upload: Upload) -> dict[str, object]:
        partition = self.batch(upload.batch_id).partition
        return UploadView.of_log(upload, log_id=self.log_id, partition=partition).model_dump(mode="json")

    def facts(self, kind: type[LogEvent], batch_id: str) -> Iterator[tuple[Fact, Ignored | None]]:
        """The facts of this kind of a batch, with why they were ignored."""
        return (each for each in self.became if isinstance(each[0].event, kind) and each[0].batch_id == batch_id)

    def effective(self, kind: type[LogEvent], batch_id: str) -> int:
        return sum(ignored is None for _, ignored in self.facts(kind, batch_id))

    def position(self, fact: Fact) -> str:
        return str(Position.of(self.log_id, {fact.partition: fact.offset}))


async def judge(settings: Settings, *, upto: Position | None = None) -> Judge:
    """Everything that is in the log now, or up to a position."""
    found = Judge()
    log_settings = LogSettings(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        topic=settings.log_topic,
        progress_topic=settings.progress_topic,
        request_timeout_ms=30_000,  # a busy machine is no reason to judge nothing
        silence_ms_max=30_000,
    )
    async with EventLog.open(log_settings) as log:
        for partition in range(settings.partitions):
            reader = log.reader([partition])
            await reader.seek(partition, 0)
            end = (await reader.ends())[partition]
            last = end - 1 if upto is None else (upto.offset(partition) or 0)
            lane = LaneState(partition)
            while lane.next_offset <= last:
                for record in await reader.read(records_max=10_000, timeout_ms=1_000):
                    if record.offset <= last:
                        _take(found, lane, decode(record))
            await reader.close()
    return found


def _take(found: Judge, lane: LaneState, fact: Fact | Undecodable) -> None:
    assert isinstance(fact, Fact), "nobody wrote anything else"
    step(lane, fact.offset, fact.timestamp_ms)
    if isinstance(fact.event, LogCreated | LaneClaimed) or fact.batch_id is None:
        evolve(lane, None, None, fact)
        found.log_id = found.log_id or str(getattr(fact.event, "log_id", ""))
        lane.log_id = found.log_id
        return
    held = found.batches.setdefault(fact.batch_id, Held(fact.batch_id, None, {}, folded_to=0))
    outcome = held.fold(fact, log_id=found.log_id, epoch=lane.epoch, time_ms=lane.time_ms)
    found.became.append((fact, None if isinstance(outcome, Changed) else outcome))
