"""How fast Sluice is here and now: `make bench`. Real Kafka, Postgres, api and processor, on this machine.

A machine of few and shared cores is never the same twice, so every figure also stands as a ratio to a yardstick
(SHA-256 over a fixed amount of bytes) that is measured around it: compare ratios, and only those of one run. Each case
runs `--rounds` times; the table has the median and the span. Nothing here is a test and nothing fails for being slow.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from schemas.events import Fact, LogEvent, decode
from services.demo import PICTURES
from services.embedded import EmbeddedKafka, EmbeddedPostgres
from services.folding import Held
from services.observability import configure_logging
from services.settings import Settings
from tests.examples import (
    BATCH,
    LOG_ID,
    a_batch_created,
    a_lane_claimed,
    a_log_created,
    an_id,
    an_upload_queued,
    an_upload_started,
    an_upload_succeeded,
    records_of,
)
from tests.integration.api_client import (
    Person,
    a_picture,
    api_beside,
    api_settings,
    ended,
    person_at,
    processor_beside,
)

YARDSTICK_BYTES = 64 * 1024 * 1024
FORM_FILES, FORM_FILE_BYTES = 500, 10_000
PUT_FILES, PUT_CONNECTIONS = 400, 8
WORKED_FILES = 150
FOLDED_UPLOADS = 5_000


@dataclass(slots=True)
class Case:
    """One thing that is measured. `per_s`: how much of `unit` a second, of each round; `ratios`: the same by the
    yardstick's megabytes a second around it."""

    name: str
    unit: str
    per_s: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Here:
    """What the cases are measured on."""

    settings: Settings
    ada: Person


def yardstick() -> float:
    """Megabytes a second that this machine hashes just now."""
    content = bytes(YARDSTICK_BYTES)
    began = time.perf_counter()
    hashlib.sha256(content).digest()
    return YARDSTICK_BYTES / 1e6 / (time.perf_counter() - began)


async def decode_and_fold(_here: Here) -> float:
    """Facts a second: bytes to facts, facts to the state of one large batch."""
    events: list[LogEvent] = [a_log_created(), a_lane_claimed(), a_batch_created()]
    for number in range(FOLDED_UPLOADS):
        upload_id = an_id("bench", number)
        events += [an_upload_queued(upload_id), an_upload_started(upload_id), an_upload_succeeded(upload_id)]
    records = records_of(*events)
    began = time.perf_counter()
    held = Held(BATCH, None, {}, folded_to=0)
    for record in records:
        fact = decode(record)
        assert isinstance(fact, Fact)
        if fact.batch_id is not None:
            held.fold(fact, log_id=LOG_ID, epoch=1, time_ms=fact.timestamp_ms)
    took_s = time.perf_counter() - began
    assert held.batch is not None
    assert held.batch.completed + held.batch.processing + held.batch.queued > 0
    return len(records) / took_s


async def one_form(here: Here) -> float:
    """Files a second of one multipart request, from the first byte to the answer."""
    files = {f"{number}.jpg": a_picture(FORM_FILE_BYTES) for number in range(FORM_FILES)}
    began = time.perf_counter()
    answer = await here.ada.send("/v1/batches", files)
    took_s = time.perf_counter() - began
    assert (answer.status_code, len(answer.json()["accepted"])) == (202, FORM_FILES), answer.text[:500]
    return FORM_FILES / took_s


async def single_puts(here: Here) -> float:
    """Requests a second: a file each, over several connections at once."""
    batch_id = await here.ada.opens_batch()
    names = iter(range(PUT_FILES))

    async def connection() -> None:
        for number in names:
            answer = await here.ada.put(batch_id, f"{number}.jpg", a_picture(FORM_FILE_BYTES))
            assert answer.status_code == 202, answer.text[:500]

    began = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(PUT_CONNECTIONS)))
    return PUT_FILES / (time.perf_counter() - began)


async def worked_pictures(here: Here) -> float:
    """Files a second through the lane, from the first start to the batch's completion."""
    picture = (PICTURES / "cat.png").read_bytes()
    made = await here.ada.send("/v1/batches", {f"{number}.png": picture for number in range(WORKED_FILES)})
    batch = await ended(here.ada, made.json()["batch"]["id"])
    assert batch["successful_uploads"] == WORKED_FILES, batch
    return WORKED_FILES / (_seconds(batch["completed_at"]) - _seconds(batch["started_at"]))


CASES: tuple[tuple[str, str, Callable[[Here], Awaitable[float]]], ...] = (
    ("decode and fold", "facts", decode_and_fold),
    (f"one form of {FORM_FILES} files of {FORM_FILE_BYTES} bytes", "files", one_form),
    (f"single PUTs, {PUT_CONNECTIONS} connections", "requests", single_puts),
    ("pictures worked, one lane", "files", worked_pictures),
)


async def measured(here: Here, rounds: int, on_step: Callable[[str], None]) -> list[Case]:
    cases: list[Case] = []
    for name, unit, run in CASES:
        case = Case(name, unit)
        for number in range(rounds):
            on_step(f"{name}, round {number + 1} of {rounds}")
            before = yardstick()
            speed = await run(here)
            case.per_s.append(speed)
            case.ratios.append(speed / ((before + yardstick()) / 2))
        cases.append(case)
    return cases


@contextlib.asynccontextmanager
async def a_place() -> AsyncIterator[Here]:
    """Servers and services of our own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        async with contextlib.AsyncExitStack() as stack:
            kafka = await stack.enter_async_context(EmbeddedKafka(data_dir=Path(folder) / "kafka"))
            postgres = await stack.enter_async_context(EmbeddedPostgres(data_dir=Path(folder) / "postgres"))
            settings = api_settings(
                kafka=kafka.bootstrap_servers,
                database_url=postgres.url,
                unique=f"b{uuid.uuid4().hex[:12]}",
                blobs=Path(folder) / "blobs",
                tail_lag_max_s=30,
                log_level="error",
            )
            url = await stack.enter_async_context(api_beside(settings))
            await stack.enter_async_context(processor_beside(settings))
            yield Here(settings, await stack.enter_async_context(person_at(url, "ada")))


def table(cases: list[Case]) -> Table:
    drawn = Table("case", "unit", box=None, pad_edge=False, header_style="bold")
    for heading in ("a second", "least", "most", "ratio"):
        drawn.add_column(heading, justify="right")
    for case in cases:
        figures = (statistics.median(case.per_s), min(case.per_s), max(case.per_s))
        drawn.add_row(
            case.name, case.unit, *(f"{each:,.0f}" for each in figures), f"{statistics.median(case.ratios):.3g}"
        )
    return drawn


def _seconds(rfc3339: str) -> float:
    return datetime.fromisoformat(rfc3339).timestamp()


async def main(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    os.environ["SLUICE_LOG_LEVEL"] = "error"  # the services' own, too
    configure_logging(service="bench", log_format="console", log_level="error")
    async with a_place() as here:
        cases = await measured(here, arguments.rounds, lambda step: console.print(f"measuring: {step}", markup=False))
    if arguments.json:
        found: list[dict[str, Any]] = [
            {"case": case.name, "unit": case.unit, "per_s": case.per_s, "ratios": case.ratios} for case in cases
        ]
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        Console().print(table(cases))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure how fast Sluice is here.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case runs (3)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    asyncio.run(main(parser.parse_args()))
