"""Facts as bytes: what is written comes back, and what cannot be read is told apart with a reason, never an exception.

The headers and members are written out from the contract, so that a change of the wire is a change of this file.
"""

import dataclasses
import json
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from schemas.events import (
    EVENT,
    Envelope,
    Erased,
    EventView,
    Fact,
    LogEvent,
    Undecodable,
    decode,
    decode_progress,
    encode,
    public_data,
    type_of,
)
from schemas.records import NewRecord, StoredRecord
from tests.examples import (
    BATCH,
    LOG_ID,
    START_MS,
    UPLOAD,
    a_batch_completed,
    a_batch_created,
    a_batch_sealed,
    a_lane_claimed,
    a_log_created,
    a_request,
    an_erased,
    an_id,
    an_upload_progressed,
    an_upload_queued,
    an_upload_retried,
    an_upload_started,
    an_upload_succeeded,
    log_of,
    one_of_each,
    records_of,
    stored,
)

EVERY = {event.type: event for event in one_of_each()}
API = {"batch_id", "user_id"}
ATTEMPT = {"batch_id", "upload_id", "attempt", "epoch"}
MEMBERS: dict[str, tuple[set[str], set[str]]] = {
    "sluice.LogCreated.v1": ({"log_id"}, {"previous"}),
    "sluice.BatchCreated.v1": (API | {"name", "metadata", "limits"}, {"request", "expected_uploads"}),
    "sluice.UploadQueued.v1": (
        API | {"upload_id", "filename", "content_type", "size_bytes", "sha256", "blob"},
        {"request"},
    ),
    "sluice.BatchSealed.v1": (API, {"request", "reason"}),
    "sluice.BatchCancelled.v1": (API, {"request", "reason"}),
    "sluice.BatchDeleted.v1": (API, {"request", "reason"}),
    "sluice.UploadRetried.v1": (API | {"upload_id", "queueing"}, {"request"}),
    "sluice.LaneClaimed.v1": ({"worker_id", "after"}, set()),
    "sluice.UploadStarted.v1": (ATTEMPT, set()),
    "sluice.UploadInterrupted.v1": (ATTEMPT | {"reason"}, set()),
    "sluice.UploadAttemptFailed.v1": (ATTEMPT | {"error"}, set()),
    "sluice.UploadSucceeded.v1": (ATTEMPT | {"result", "duration_ms"}, set()),
    "sluice.UploadFailed.v1": (ATTEMPT | {"error"}, set()),
    "sluice.BatchCompleted.v1": (
        {
            "batch_id",
            "epoch",
            "status",
            "total_uploads",
            "successful_uploads",
            "failed_uploads",
            "cancelled_uploads",
        },
        set(),
    ),
}
"""Of each type the members its data always has, and those it may have."""


def record_of(event: LogEvent) -> StoredRecord:
    return records_of(event)[0]


def with_header(record: StoredRecord, name: str, value: bytes | None) -> StoredRecord:
    """The record with one header replaced, or left out."""
    headers = tuple((known, old) for known, old in record.headers if known != name)
    return dataclasses.replace(record, headers=headers if value is None else (*headers, (name, value)))


def with_data(record: StoredRecord, **changes: Any) -> StoredRecord:
    data = {**json.loads(record.value or b"{}"), **changes}
    return dataclasses.replace(record, value=json.dumps(data).encode())


def reason_of(record: StoredRecord) -> str:
    undecodable = decode(record)
    assert isinstance(undecodable, Undecodable)
    assert (undecodable.partition, undecodable.offset) == (record.partition, record.offset)
    assert undecodable.timestamp_ms == record.timestamp_ms
    return undecodable.reason


def test_there_is_an_example_and_a_table_row_of_every_event() -> None:
    assert set(EVERY) == set(type_of) == set(MEMBERS)
    assert len(type_of) == len(get_args(LogEvent))


@pytest.mark.parametrize("event", EVERY.values(), ids=EVERY)
def test_what_was_encoded_is_decoded_as_the_same_fact(event: LogEvent) -> None:
    fact = log_of(event, first_offset=7)[0]

    assert decode(stored(fact)) == fact


@pytest.mark.parametrize("event", EVERY.values(), ids=EVERY)
def test_data_has_the_members_of_the_contract(event: LogEvent) -> None:
    always, optional = MEMBERS[event.type]
    bare = event.model_copy(update=dict.fromkeys(optional))

    assert set(json.loads(record_of(bare).value or b"")) == always
    assert set(json.loads(record_of(event).value or b"")) <= always | optional
    assert decode(record_of(bare)) == log_of(bare)[0]


def test_headers_are_cloudevents_in_kafka_binary_mode() -> None:
    envelope = Envelope(
        id=an_id("event"),
        source="/sluice/api",
        time="2026-01-01T12:00:00Z",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )

    assert dict(encode(an_upload_queued(), envelope).headers) == {
        "ce_specversion": b"1.0",
        "ce_id": an_id("event").encode(),
        "ce_source": b"/sluice/api",
        "ce_type": b"sluice.UploadQueued.v1",
        "ce_subject": UPLOAD.encode(),
        "ce_time": b"2026-01-01T12:00:00Z",
        "content-type": b"application/json",
        "traceparent": b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }


@pytest.mark.parametrize("event", EVERY.values(), ids=EVERY)
def test_the_subject_is_the_upload_or_else_the_batch_and_the_key_is_the_batch(event: LogEvent) -> None:
    upload_id, batch_id = getattr(event, "upload_id", None), getattr(event, "batch_id", None)
    subject = upload_id or batch_id

    record = record_of(event)

    assert record.key == (batch_id.encode() if batch_id else None)
    assert dict(record.headers).get("ce_subject") == (subject.encode() if subject else None)
    assert "traceparent" not in dict(record.headers)


@pytest.mark.parametrize("event_type", [name for name, event in EVERY.items() if hasattr(event, "batch_id")])
def test_an_erased_fact_keeps_its_ids_and_its_type(event_type: str) -> None:
    erased = Erased(event_type, BATCH, UPLOAD if "upload_id" in type_of[event_type].model_fields else None)
    fact = log_of(erased)[0]

    assert decode(stored(fact)) == fact
    assert (fact.batch_id, fact.upload_id) == (BATCH, erased.upload_id)


def test_members_of_a_newer_version_are_passed_over() -> None:
    assert decode(with_data(record_of(a_batch_sealed()), colour="blue")) == log_of(a_batch_sealed())[0]


def test_a_null_in_metadata_is_kept() -> None:
    created = a_batch_created(metadata={"note": None, "inner": {"also": None}})

    assert decode(record_of(created)) == log_of(created)[0]


def test_a_content_type_need_not_be_named() -> None:
    assert isinstance(decode(with_header(record_of(a_batch_sealed()), "content-type", None)), Fact)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ce_specversion", None, "ce_specversion is None, not '1.0'"),
        ("ce_specversion", b"0.3", "ce_specversion is '0.3', not '1.0'"),
        ("ce_type", None, "ce_type None is not known to this version"),
        ("ce_type", b"sluice.BatchSealed.v2", "ce_type 'sluice.BatchSealed.v2' is not known to this version"),
        ("ce_type", b"sluice.UploadProgressed.v1", "ce_type 'sluice.UploadProgressed.v1' is not known to this version"),
        ("ce_type", b"a\0b", r"ce_type 'a\x00b' is not known to this version"),
        ("ce_id", None, "ce_id None is not a UUID"),
        ("ce_id", b"7", "ce_id '7' is not a UUID"),
        ("ce_id", b"\xff", "the header ce_id is not UTF-8"),
        ("content-type", b"text/plain", "content-type is 'text/plain', not 'application/json'"),
    ],
)
def test_a_record_with_a_wrong_header_is_undecodable(name: str, value: bytes | None, reason: str) -> None:
    assert reason_of(with_header(record_of(a_batch_sealed()), name, value)) == reason


def test_a_header_that_stands_twice_is_undecodable() -> None:
    record = record_of(a_batch_sealed())
    twice = dataclasses.replace(record, headers=(*record.headers, ("ce_type", b"sluice.BatchDeleted.v1")))

    assert reason_of(twice) == "the header ce_type stands twice"


def test_a_tombstone_is_undecodable() -> None:
    assert reason_of(dataclasses.replace(record_of(a_batch_sealed()), value=None)).startswith("a tombstone")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"user_id": "\\ud800"}', "Invalid JSON"),
        (b"[]", "data: Input should be an object"),
        (b"null", "data: Input should be an object"),
        (b"{}", "batch_id: Field required"),
        (b"[" * 100_000, "Invalid JSON"),
    ],
)
def test_a_value_that_is_not_the_data_of_its_type_is_undecodable(value: bytes, reason: str) -> None:
    assert reason in reason_of(dataclasses.replace(record_of(a_batch_sealed()), value=value))


@pytest.mark.parametrize(
    ("event", "changes", "reason"),
    [
        (a_batch_sealed(), {"user_id": "a\0b"}, "user_id: Value error, holds a NUL character"),
        (a_batch_sealed(), {"user_id": ""}, "user_id: String should have at least 1 character"),
        (a_batch_sealed(), {"batch_id": BATCH.upper()}, "batch_id: String should match pattern"),
        (a_batch_sealed(), {"batch_id": BATCH + "\n"}, "batch_id: String should match pattern"),
        (a_batch_sealed(), {"type": "sluice.BatchDeleted.v1"}, "type: Input should be 'sluice.BatchSealed.v1'"),
        (a_batch_sealed(), {"request": {"key_hash": "0" * 64}}, "request.body_hash: Field required"),
        (a_batch_created(), {"name": "x" * 201}, "name: String should have at most 200 characters"),
        (a_batch_created(), {"metadata": {"x": "x" * 16_000}}, "metadata: Value error, takes 16008 bytes as JSON"),
        (a_batch_created(), {"metadata": {"n": float("nan")}}, "metadata: Value error, holds nan"),
        (a_batch_created(), {"expected_uploads": -1}, "expected_uploads: Input should be greater than"),
        (a_batch_created(), {"limits": None}, "limits: Input should be an object"),
        (an_upload_queued(), {"filename": "é" * 128}, "filename: Value error, takes 256 bytes"),
        (an_upload_queued(), {"size_bytes": "1"}, "size_bytes: Input should be a valid integer"),
        (an_upload_queued(), {"size_bytes": 1.0}, "size_bytes: Input should be a valid integer"),
        (an_upload_queued(), {"size_bytes": 2**63}, "size_bytes: Input should be less than"),
        (an_upload_retried(), {"queueing": 1}, "queueing: Input should be greater than or equal to 2"),
        (an_upload_started(), {"attempt": 0}, "attempt: Input should be greater than or equal to 1"),
        (an_upload_succeeded(), {"result": {"x": "x" * 32_000}}, "result: Value error, takes 32008 bytes as JSON"),
        (a_batch_completed(), {"status": "cancelled"}, "status: Input should be 'completed' or 'failed'"),
        (a_lane_claimed(), {"after": -1}, "after: Input should be greater than or equal to 0"),
        (a_log_created(), {"log_id": "log"}, "log_id: String should match pattern"),
        (a_log_created(), {"previous": [{"log_id": LOG_ID}]}, "previous.0.next_offset: Field required"),
        (
            a_log_created(),
            {"erased": True, "batch_id": BATCH, "log_id": None},
            "log_id: Input should be a valid string",
        ),
    ],
)
def test_a_member_out_of_its_bounds_is_undecodable_and_named(
    event: LogEvent, changes: dict[str, Any], reason: str
) -> None:
    assert reason in reason_of(with_data(record_of(event), **changes))


def test_a_required_member_may_be_null_but_not_missing() -> None:
    record = dataclasses.replace(record_of(a_lane_claimed()), value=b'{"worker_id": "w"}')

    assert "after: Field required" in reason_of(record)


def test_an_erased_fact_that_still_says_something_is_undecodable() -> None:
    record = stored(log_of(an_erased())[0])

    assert reason_of(with_data(record, name="still here"))


@pytest.mark.parametrize("event", [a_batch_sealed(), an_erased(event="BatchSealed")], ids=["event", "erased"])
def test_a_record_under_the_key_of_another_batch_is_undecodable(event: LogEvent | Erased) -> None:
    record = stored(log_of(event)[0])

    assert BATCH in reason_of(dataclasses.replace(record, key=an_id("batch", 99).encode()))
    assert BATCH in reason_of(dataclasses.replace(record, key=None))
    assert BATCH in reason_of(dataclasses.replace(record, key=b"\xff\0"))


def test_a_claim_with_a_key_is_undecodable() -> None:
    assert reason_of(dataclasses.replace(record_of(a_lane_claimed()), key=b"")).startswith("the record's key")


def test_a_batch_in_a_lane_that_is_not_its_own_is_undecodable() -> None:
    assert reason_of(dataclasses.replace(record_of(a_batch_sealed()), partition=1)).endswith("belongs to partition 0")


def test_an_upload_whose_id_names_another_lane_is_undecodable() -> None:
    elsewhere = an_id("upload", 1, partition=3)

    assert reason_of(record_of(an_upload_started(elsewhere))) == f"upload {elsewhere} belongs to partition 3"


headers = st.lists(
    st.tuples(
        st.sampled_from(["ce_specversion", "ce_type", "ce_id", "content-type", "ce_time", "other"]),
        st.binary(max_size=12)
        | st.sampled_from([b"1.0", b"application/json", BATCH.encode(), *(name.encode() for name in type_of)]),
    ),
    max_size=6,
).map(tuple)
json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([BATCH, UPLOAD]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["batch_id", "upload_id", "erased", "user_id", "metadata", "x"]), inner)
    ),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())


@given(
    st.builds(
        StoredRecord,
        partition=st.integers(0, 255),
        offset=st.integers(0, 2**63 - 1),
        timestamp_ms=st.integers(-1, 2**63 - 1),
        key=st.none() | st.binary(max_size=40) | st.just(BATCH.encode()),
        value=st.none() | st.binary(max_size=60) | json_texts,
        headers=headers,
    )
)
@example(StoredRecord(0, 0, 0, None, b'{"log_id":' + b"[" * 10_000, ((("ce_type"), b"sluice.LogCreated.v1"),)))
def test_no_bytes_make_decoding_raise_and_a_reason_can_always_be_stored(record: StoredRecord) -> None:
    decoded = decode(record)

    assert decoded == decode(record)
    assert (decoded.partition, decoded.offset) == (record.partition, record.offset)
    if isinstance(decoded, Undecodable):
        assert decoded.reason
        assert len(decoded.reason) <= 500
        assert "\0" not in decoded.reason.encode().decode()


@given(st.sampled_from(list(EVERY.values())), st.integers(0, 2_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_value_is_the_data_of_a_fact_or_undecodable(event: LogEvent, place: int, damage: bytes) -> None:
    record = record_of(event)
    value = record.value or b""
    at = place % len(value)

    decoded = decode(dataclasses.replace(record, value=value[:at] + damage + value[at + len(damage) :]))

    assert isinstance(decoded, Fact | Undecodable)


@pytest.mark.parametrize("event", EVERY.values(), ids=EVERY)
def test_events_are_frozen_and_the_union_tells_them_apart(event: LogEvent) -> None:
    assert EVENT.validate_python(event.model_dump()) == event
    assert EVENT.validate_json(event.model_dump_json()) == event
    with pytest.raises(ValidationError, match="frozen"):
        event.type = "x"  # type: ignore[assignment]


@pytest.mark.parametrize("model", [*type_of.values()], ids=[*type_of])
def test_every_event_can_be_described_as_json_schema(model: type[BaseModel]) -> None:
    assert model.model_json_schema()["properties"]


def test_progress_comes_back_from_its_topic_and_nonsense_is_none() -> None:
    progressed = an_upload_progressed()
    new = encode(progressed, Envelope(id=an_id("event"), source="/sluice/processor", time="2026-01-01T12:00:00Z"))
    record = StoredRecord(0, 0, START_MS, new.key, new.value, new.headers)

    assert new.key == BATCH.encode()
    assert dict(new.headers)["ce_type"] == b"sluice.UploadProgressed.v1"
    assert decode_progress(record) == progressed
    for nonsense in (None, b"", b"\xff", b"{}", b"[" * 100_000, with_data(record, percent=101).value):
        assert decode_progress(dataclasses.replace(record, value=nonsense)) is None


def test_callers_never_see_blobs_or_fingerprints() -> None:
    fact = log_of(an_upload_queued(request=a_request()))[0]

    view = EventView.of(fact, time="2026-01-01T12:00:00.000Z")

    assert (view.id, view.type) == (fact.id, "sluice.UploadQueued.v1")
    assert set(view.data) == MEMBERS[fact.event.type][0] - {"blob"}
    assert public_data(an_erased()) == {"erased": True, "batch_id": BATCH, "upload_id": None}


@given(st.sampled_from(list(EVERY.values())))
def test_the_size_of_a_record_is_never_less_than_its_bytes(event: LogEvent) -> None:
    record = record_of(event)
    new = NewRecord(record.key, record.value, record.headers)
    least = sum(len(name) + len(value) for name, value in new.headers) + len(new.value or b"") + len(new.key or b"")

    assert least < new.size_bytes < least + 200
