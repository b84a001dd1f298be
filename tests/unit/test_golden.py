"""Logs recorded by earlier Sluices still mean what they meant then.

The files in tests/golden never change: if a test here fails, the code is wrong, for logs like these exist on other
people's machines. Their digests stand below, so that nobody mends the recording instead. A recorded member must keep
its value; views may have gained others since.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from schemas.batch import Ignored
from schemas.events import Fact, Undecodable, decode, type_of
from schemas.records import StoredRecord
from schemas.views import BatchView, UploadView
from tests.examples import State

GOLDEN = Path(__file__).parent.parent / "golden"
DIGESTS = {
    "v1.ndjson": "7f2298b976c1f05d82ca6b7c97af428e5e685df6d4e68e1eaa9dcbe5d825c3a0",
    "v1.expected.json": "9ea2a214a28c92b36ff1d9cd52e5714b158fd96fb752662ad87455d02cfe4692",
}


def recorded(name: str) -> list[StoredRecord]:
    return [_record(json.loads(line)) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


def _record(line: dict[str, Any]) -> StoredRecord:
    return StoredRecord(
        partition=line["partition"],
        offset=line["offset"],
        timestamp_ms=line["timestamp_ms"],
        key=_bytes(line["key"]),
        value=_bytes(line["value"]),
        headers=tuple((name, base64.b64decode(value)) for name, value in line["headers"]),
    )


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    return found


def folded(records: Iterable[StoredRecord]) -> tuple[State, list[str]]:
    """The state after the records, and of each what became of it."""
    state, outcomes = State(), []
    for record in records:
        fact = decode(record)
        outcome = state.apply(fact)
        said = str(outcome) if isinstance(outcome, Ignored) else "effective"
        outcomes.append("undecodable" if isinstance(fact, Undecodable) else said)
    return state, outcomes


@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_a_recorded_log_never_changes(name: str, digest: str) -> None:
    assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest


def test_the_recorded_log_has_every_event_of_version_1_and_means_something_by_it() -> None:
    records = recorded("v1.ndjson")
    _, outcomes = folded(records)

    effective = {
        fact.event.type
        for fact, outcome in zip(map(decode, records), outcomes, strict=True)
        if isinstance(fact, Fact) and outcome == "effective"
    }

    assert effective == {name for name in type_of if name.endswith(".v1")}


def test_each_record_of_the_log_is_effective_or_ignored_as_it_was() -> None:
    _, outcomes = folded(recorded("v1.ndjson"))

    assert outcomes == expected("v1.expected.json")["outcomes"]


def test_the_log_folds_to_the_states_it_folded_to() -> None:
    then = expected("v1.expected.json")
    state, _ = folded(recorded("v1.ndjson"))
    lane = state.lane

    assert {name: getattr(lane, name) for name in then["lane"]} == then["lane"]
    assert [batch.id for batch in state.batches.values() if batch.deleted] == then["deleted"]
    batches = {
        batch.id: BatchView.of_log(batch, log_id=lane.log_id).model_dump(mode="json")
        for batch in state.batches.values()
        if not batch.deleted
    }
    uploads = {
        upload.id: UploadView.of_log(upload, log_id=lane.log_id, partition=0).model_dump(mode="json")
        | {"place": upload.place, "queueing": upload.queueing}
        for upload in state.uploads.values()
    }
    assert _members_of(then["batches"], batches) == then["batches"]
    assert _members_of(then["uploads"], uploads) == then["uploads"]


def _members_of(then: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is shown now, without the members that were not there then."""
    return {key: {name: value for name, value in shown.items() if name in then[key]} for key, shown in now.items()}


def test_a_replay_in_two_parts_ends_the_same() -> None:
    records = recorded("v1.ndjson")
    whole, _ = folded(records)

    state, _ = folded(records[:30])
    for record in records[30:]:
        state.apply(decode(record))

    assert state == whole
