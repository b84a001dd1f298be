"""What a watcher of one batch knows, folded from the notifier's messages: its files, counts, rate and time left.

Pure: no clock and no I/O. Rate and time left come from the times that facts carry, never from how long we have been
looking; what cannot be known is None and shown as unknown. Messages that were seen before change nothing, so a
reconnection may repeat some. Where messages come from: `watching.py`; how it looks: `display.py`.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from schemas.ids import partition_of
from schemas.position import Position

OUTCOMES_MAX = 50
"""How many of the newest outcomes the rate is taken from."""
ENDED = frozenset({"completed", "failed", "cancelled"})


@dataclass(slots=True)
class Item:
    """One file of the batch. `offset`: of the newest fact about it that is known here."""

    id: str
    filename: str | None = None
    size_bytes: int | None = None
    status: str = "queued"
    attempt: int = 0
    stage: str | None = None
    percent: int | None = None
    error: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    offset: int = -1

    @property
    def shown_name(self) -> str:
        return self.filename if self.filename is not None else self.id


@dataclass(frozen=True, slots=True, order=True)
class Outcome:
    """When a file came to its end (milliseconds since 1970), and its size."""

    time_ms: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rate:
    items_per_s: float
    bytes_per_s: float


@dataclass(slots=True)
class Board:
    """`counts` are the batch's as of `position`; empty until the first snapshot. `announced_files` and
    `announced_bytes` are what the sender said it will bring: they count until the batch is sealed."""

    batch_id: str
    announced_files: int = 0
    announced_bytes: int = 0
    counts: dict[str, Any] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    position: str | None = None
    deleted: bool = False
    _outcomes: deque[Outcome] = field(default_factory=lambda: deque(maxlen=OUTCOMES_MAX))
    _offset: int = -1

    def apply(self, message: Mapping[str, Any]) -> bool:
        """Fold one message of the notifier; whether anything changed. Other batches' messages change nothing."""
        match message.get("type"):
            case "subscribed" if message.get("batch") and message.get("batch_id") == self.batch_id:
                self._moved_to(message["position"])
                self.counts = dict(message["batch"])
                return True
            case "event" if message["event"]["data"].get("batch_id") == self.batch_id:
                return self._event(message)
            case "progress" if message["batch_id"] == self.batch_id:
                return self._progress(message)
            case _:
                return False

    def add_rows(self, uploads: Iterable[Mapping[str, Any]]) -> None:
        """Take over uploads as the api shows them, where they are newer than what is known here."""
        ended: list[Outcome] = []
        for row in uploads:
            item = self.items.setdefault(row["id"], Item(row["id"]))
            item.filename, item.size_bytes = row["filename"], row["size_bytes"]
            if (offset := self._offset_of(row["position"])) <= item.offset:
                continue
            item.offset, item.status, item.attempt = offset, row["status"], row["attempts"]
            item.error, item.result = row["error"], row["result"]
            if item.status in ("completed", "failed") and row["completed_at"]:
                ended.append(Outcome(_time_ms(row["completed_at"]), row["size_bytes"]))
        known = sorted([*ended, *self._outcomes])
        self._outcomes = deque(known[-OUTCOMES_MAX:], maxlen=OUTCOMES_MAX)

    @property
    def ended(self) -> bool:
        return self.deleted or self.counts.get("status") in ENDED

    @property
    def all_well(self) -> bool:
        """Whether the batch completed and no file of it failed."""
        return not self.deleted and self.counts.get("status") == "completed" and not self.counts["failed_uploads"]

    @property
    def total(self) -> int:
        queued = int(self.counts.get("total_uploads", 0))
        return queued if self._complete else max(queued, self.announced_files)

    @property
    def _complete(self) -> bool:
        """Whether no more files come."""
        return self.ended or bool(self.counts.get("sealed"))

    @property
    def done(self) -> int:
        return int(self.counts.get("processed_uploads", 0) + self.counts.get("cancelled_uploads", 0))

    @property
    def misses_rows(self) -> bool:
        """Whether the batch has files whose name and size were not told here."""
        known = sum(1 for item in self.items.values() if item.size_bytes is not None)
        return int(self.counts.get("total_uploads", 0)) > known

    @property
    def in_work(self) -> Item | None:
        return next((item for item in reversed(self.items.values()) if item.status == "processing"), None)

    @property
    def bytes_total(self) -> int | None:
        if self.misses_rows:
            return None
        queued = sum(item.size_bytes or 0 for item in self.items.values())
        return queued if self._complete else max(queued, self.announced_bytes)

    @property
    def bytes_done(self) -> int | None:
        if self.misses_rows:
            return None
        return sum(item.size_bytes or 0 for item in self.items.values() if item.status in ENDED)

    @property
    def rate(self) -> Rate | None:
        """Over the newest outcomes, from the first one's time to the last one's; None before there are two."""
        if len(self._outcomes) < 2:  # noqa: PLR2004  # a span has two ends
            return None
        first, *others = self._outcomes
        span_s = (others[-1].time_ms - first.time_ms) / 1000
        if span_s <= 0:
            return None
        return Rate(len(others) / span_s, sum(outcome.size_bytes for outcome in others) / span_s)

    @property
    def time_left_s(self) -> float | None:
        """At the rate of the newest outcomes; None where files may still be added or the rate is unknown."""
        rate = self.rate
        if self.ended:
            return 0.0
        if rate is None or not self.counts.get("sealed"):
            return None
        if self.bytes_total is not None and self.bytes_done is not None and rate.bytes_per_s > 0:
            return (self.bytes_total - self.bytes_done) / rate.bytes_per_s
        return (self.total - self.done) / rate.items_per_s

    def _event(self, message: Mapping[str, Any]) -> bool:
        offset = self._offset_of(message["position"])
        if offset <= self._offset:
            return False
        self._moved_to(message["position"])
        if message.get("batch"):
            self.counts |= message["batch"]
        event = message["event"]
        name, data = event["type"].split(".")[1], event["data"]
        if name == "BatchDeleted":
            self.deleted = True
        elif name == "BatchCancelled":
            self._cancelled(offset)
        elif data.get("upload_id"):
            self._upload_event(name, data, offset=offset, time_ms=_time_ms(event["time"]))
        return True

    def _upload_event(self, name: str, data: Mapping[str, Any], *, offset: int, time_ms: float) -> None:
        item = self.items.setdefault(data["upload_id"], Item(data["upload_id"]))
        if offset <= item.offset:
            return
        item.offset = offset
        match name:
            case "UploadQueued":
                item.filename, item.size_bytes = data["filename"], data["size_bytes"]
            case "UploadStarted":
                item.status, item.attempt = "processing", data["attempt"]
                item.stage = item.percent = None
            case "UploadInterrupted" | "UploadAttemptFailed" | "UploadRetried":
                item.status, item.error = "queued", data.get("error")
            case "UploadSucceeded":
                item.status, item.error, item.result = "completed", None, data["result"]
            case "UploadFailed":
                item.status, item.error = "failed", data["error"]
        if name in ("UploadSucceeded", "UploadFailed"):
            self._outcomes.append(Outcome(time_ms, item.size_bytes or 0))

    def _cancelled(self, offset: int) -> None:
        for item in self.items.values():
            if item.status in ("queued", "processing"):
                item.status, item.offset = "cancelled", offset

    def _progress(self, message: Mapping[str, Any]) -> bool:
        item = self.items.get(message["upload_id"])
        if item is None or item.status != "processing" or item.attempt != message["attempt"]:
            return False
        item.stage, item.percent = message["stage"], message["percent"]
        return True

    def _moved_to(self, position: str) -> None:
        self.position, self._offset = position, self._offset_of(position)

    def _offset_of(self, position: str) -> int:
        offset = Position.parse(position).offset(partition_of(self.batch_id))
        return -1 if offset is None else offset


def _time_ms(rfc3339: str) -> float:
    return datetime.fromisoformat(rfc3339).timestamp() * 1000
