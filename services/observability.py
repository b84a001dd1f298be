"""Logging and metrics: structured lines through structlog, every metric's name in one place.

A line names what happened in the past tense and carries the position it stands for. No token, secret or file content
is ever logged.
"""

import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import structlog
from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from schemas.errors import PartError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

# They are a line more for every series, and tell nothing that is asked here.
disable_created_metrics()  # type: ignore[no-untyped-call]  # as the library has it

FACTS_FOLDED = Counter("sluice_facts_folded_total", "Facts folded, by effect", ["effect"])
TASKS = Gauge("sluice_tasks", "Tasks of the event loop")
RECORDS_QUARANTINED = Counter("sluice_records_quarantined_total", "Records that could not be decoded")
PROJECTED_OFFSET = Gauge("sluice_projected_offset", "Next offset of the read models", ["partition"])
LOG_LAG = Gauge("sluice_log_lag_records", "Records of the log not read yet", ["partition"])
OLDEST_UNFINISHED = Gauge("sluice_oldest_unfinished_seconds", "Age of the oldest unfinished upload or batch")
COMMIT_SECONDS = Histogram("sluice_commit_seconds", "One transaction of the projection")
WORK_SECONDS = Histogram(
    "sluice_work_seconds",
    "Work on one file, by outcome",
    ["outcome"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
UPLOADS_WORKED = Counter("sluice_uploads_worked_total", "Attempts that came to an end, by outcome", ["outcome"])
APPEND_SECONDS = Histogram("sluice_append_seconds", "Append to the log until acknowledged")
READ_BACK_SECONDS = Histogram("sluice_read_back_seconds", "Append to the log until folded by the own tail")
BYTES_RECEIVED = Counter("sluice_bytes_received_total", "Bytes of files received")
FILES_RECEIVED = Counter("sluice_files_received_total", "Files received, by outcome", ["outcome"])
HTTP_SECONDS = Histogram(
    "sluice_http_seconds",
    "Requests answered; status is a class such as 2xx",
    ["method", "route", "status"],
    buckets=(0.005, 0.025, 0.1, 0.5, 2.5, 10),  # few: there is a line for each, times method, route and status
)
CLIENTS = Gauge("sluice_clients", "Progress connections")
FRAMES_SENT = Counter("sluice_frames_sent_total", "Frames sent to progress clients")
CLIENTS_CLOSED = Counter("sluice_clients_closed_total", "Progress connections closed by us, by reason", ["reason"])
TAIL_FACTS_HELD = Gauge("sluice_tail_facts_held", "Facts held that the read models do not have yet")
TAIL_BATCHES_HELD = Gauge("sluice_tail_batches_held", "Batches held in memory")


def configure_logging(*, service: str, log_format: str, log_level: str) -> None:
    """Send the log lines of this process, libraries' included, to standard error."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=44)
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = logging.getLevelNamesMapping()[log_level.upper()]
    logging.getLogger("sluice").setLevel(level)
    root.setLevel(max(level, logging.WARNING))  # below that, libraries show what they carry: frames, headers, EXIF
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it repeats ten times a second what we say once
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)


def logger(name: str) -> "FilteringBoundLogger":
    """A logger whose lines are `log.info("what_happened", key=value)`."""
    return cast("FilteringBoundLogger", structlog.stdlib.get_logger(f"sluice.{name}"))


def say_change(log: "FilteringBoundLogger", part: str, before: str | None, now: PartError | None) -> str | None:
    """Say once that a part was lost, and why, and once that it is back.

    `before`: what this returned the last time, which is what callers may be told: what is away, and since when.
    """
    if now is not None and before is None:
        log.warning("part_lost", part=part, reason=str(now))
    elif before is not None and now is None:
        log.info("part_back", part=part)
    if now is None or (before or "").startswith(now.told):
        return None if now is None else before
    return f"{now.told} (since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ})"
