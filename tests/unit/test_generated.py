"""The committed documents are what the models say, complete, and true of what the notifier writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from schemas import generate
from schemas.errors import Code, RequestError
from schemas.events import LogEvent, type_of
from schemas.frames import (
    CLIENT_FRAMES,
    SERVER_FRAMES,
    Auth,
    ErrorFrame,
    EventFrame,
    Frame,
    Ping,
    Pong,
    ProgressFrame,
    Ready,
    SubscribeBatch,
    SubscribedBatch,
    SubscribeUser,
    Unsubscribe,
    Unsubscribed,
)
from schemas.position import Position
from services.notifier import messages
from tests.examples import (
    BATCH,
    LOG_ID,
    OPENING,
    START_MS,
    USER,
    a_batch_created,
    a_batch_deleted,
    an_upload_progressed,
    an_upload_queued,
    fold,
    log_of,
    one_of_each,
)

HERE = Position.of(LOG_ID, {0: 3})
STATE = fold(log_of(*OPENING, a_batch_created(), an_upload_queued()))


def references(document: Any) -> Iterator[str]:
    """Every `$ref` of a document."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(document, list):
        for value in document:
            yield from references(value)


def at(document: Any, reference: str) -> Any:
    """What a reference such as `#/components/schemas/Limits` points to."""
    for part in reference.removeprefix("#/").split("/"):
        document = document[part]
    return document


def test_the_committed_documents_are_what_the_models_say() -> None:
    assert generate.drifted() == [], "run: python -m schemas.generate"


def test_a_document_that_was_changed_or_lost_is_seen(tmp_path: Path) -> None:
    for name, document in generate.DOCUMENTS.items():
        (tmp_path / name).write_text(generate.text_of(document()), encoding="utf-8")
    assert generate.drifted(tmp_path) == []

    (tmp_path / "asyncapi.json").write_text("{}", encoding="utf-8")
    (tmp_path / "events.schema.json").unlink()

    assert set(generate.drifted(tmp_path)) == {"asyncapi.json", "events.schema.json"}


def test_wrong_use_is_said_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--chekc"]) == 2
    assert "usage" in capsys.readouterr().err
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize("name", generate.DOCUMENTS)
def test_every_reference_of_a_document_leads_somewhere(name: str) -> None:
    document = json.loads(generate.text_of(generate.DOCUMENTS[name]()))

    found = set(references(document))

    assert found
    assert all(at(document, reference) for reference in found)


def test_every_event_is_described_and_told_apart_by_its_header() -> None:
    document, schemas = generate.asyncapi(), generate.events_schema()["$defs"]

    for event_type, model in type_of.items():
        message = at(document, document["channels"]["log"]["messages"][model.__name__]["$ref"])
        assert message["headers"]["properties"]["ce_type"]["const"] == event_type
        assert message["summary"]
        assert schemas[model.__name__]["title"] == event_type
        assert "type" not in schemas[model.__name__]["properties"]


@pytest.mark.parametrize("event", one_of_each(), ids=lambda event: event.type)
def test_the_schema_of_an_event_names_the_members_it_has(event: LogEvent) -> None:
    schema = generate.events_schema()["$defs"][type(event).__name__]
    members = event.model_dump(exclude={"type"})

    assert set(members) <= set(schema["properties"])
    assert set(schema.get("required", [])) <= set(members)


def test_the_channels_are_the_log_the_progress_and_the_socket() -> None:
    channels = generate.asyncapi()["channels"]

    assert {channel["address"] for channel in channels.values()} == {"sluice.events", "sluice.progress", "/v1/ws"}
    frames = {model.__name__ for model in (*CLIENT_FRAMES, *SERVER_FRAMES)}
    assert set(channels["socket"]["messages"]) == frames


(FACT,) = log_of(an_upload_queued(), first_offset=3)
(DELETED,) = log_of(a_batch_deleted(), first_offset=4)
SAID: dict[str, tuple[type[Frame], str]] = {
    "ready": (Ready, messages.ready(user_id=USER, heartbeat_s=20, position=HERE)),
    "snapshot": (SubscribedBatch, messages.snapshot(STATE.batches[BATCH], log_id=LOG_ID, position=HERE)),
    "resumed": (SubscribedBatch, messages.resumed(batch_id=BATCH, position=HERE)),
    "event": (EventFrame, messages.event(FACT, time_ms=START_MS, position=HERE, batch=STATE.batches[BATCH])),
    "deleted": (EventFrame, messages.event(DELETED, time_ms=START_MS, position=HERE, batch=None)),
    "progress": (ProgressFrame, messages.progress(an_upload_progressed())),
    "error": (ErrorFrame, messages.error(RequestError(Code.NOT_FOUND, "there is no such batch"))),
    "pong": (Pong, messages.pong()),
}


@pytest.mark.parametrize(("model", "text"), SAID.values(), ids=SAID)
def test_what_the_notifier_says_has_the_described_shape(model: type[Frame], text: str) -> None:
    said = json.loads(text)

    shown = model.model_validate_json(text).model_dump(mode="json", exclude_unset=True)

    assert shown == said


HEARD: dict[str, Frame] = {
    "auth": Auth(type="auth", token="a token"),
    "batch": SubscribeBatch(type="subscribe", batch_id=BATCH, since=str(HERE)),
    "user": SubscribeUser(type="subscribe", user=True),
    "unsubscribe": Unsubscribe(type="unsubscribe", batch_id=BATCH),
    "ping": Ping(type="ping"),
}


@pytest.mark.parametrize("frame", HEARD.values(), ids=HEARD)
def test_the_notifier_understands_what_is_described(frame: BaseModel) -> None:
    text = frame.model_dump_json(exclude_none=True)

    understood = messages.understand(text)

    assert understood.model_dump(exclude_none=True) == frame.model_dump(exclude_none=True)


def test_an_unsubscription_is_confirmed_in_the_described_shape() -> None:
    wish = messages.understand('{"type":"unsubscribe","batch_id":"' + BATCH + '"}')
    assert isinstance(wish, messages.Unsubscribe)

    said = Unsubscribed.model_validate_json(messages.unsubscribed(wish))

    assert said == Unsubscribed(type="unsubscribed", batch_id=BATCH)
