"""The words of the progress protocol, and that docs/protocol.md shows them as they are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import frames
from schemas.batch import Batch, Changed
from schemas.errors import Code, RequestError
from schemas.position import Position
from services.notifier import messages, streams
from services.notifier.hub import Frame
from services.notifier.sessions import RESTARTING
from tests.examples import (
    BATCH,
    LOG_ID,
    OPENING,
    USER,
    State,
    a_batch_created,
    a_batch_deleted,
    an_upload_progressed,
    an_upload_queued,
    an_upload_started,
    fold,
    log_of,
)

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
OF_CLIENTS = ("auth", "subscribe", "unsubscribe", "ping")
STORY = log_of(*OPENING, a_batch_created(expected_uploads=1), an_upload_queued(), an_upload_started())

words = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
anything = st.recursive(st.none() | words | st.integers(), lambda each: st.dictionaries(words, each, max_size=4))


def at(offset: int) -> Position:
    return Position.of(LOG_ID, {0: offset})


def the_batch(*, after: int) -> Batch:
    """The story's batch as of an offset."""
    state = State()
    for fact in STORY[: after + 1]:
        state.apply(fact)
    return state.batches[BATCH]


def the_event(offset: int) -> str:
    """What is told of the story's fact at this offset."""
    fact = STORY[offset]
    return messages.event(fact, time_ms=fact.timestamp_ms, position=at(offset), batch=the_batch(after=offset))


def documented() -> list[Any]:
    """Every JSON value in the document's examples."""
    blocks = re.findall(r"```json\n(.*?)```", PROTOCOL.read_text(), re.DOTALL)
    return [value for block in blocks for value in _values(block)]


def _values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:]


def test_the_document_shows_what_the_notifier_says_word_for_word() -> None:
    said = [
        messages.ready(user_id=USER, heartbeat_s=20.0, position=at(2)),
        messages.snapshot(the_batch(after=2), log_id=LOG_ID, position=at(2)),
        the_event(3),
        the_event(4),
        messages.progress(an_upload_progressed()),
        messages.user_snapshot([the_batch(after=2)], truncated=False, log_id=LOG_ID, position=at(2)),
        messages.resumed(batch_id=BATCH, position=at(3)),
        messages.user_resumed(position=at(3)),
        messages.unsubscribed(messages.Unsubscribe(type="unsubscribe", batch_id=BATCH)),
        messages.pong(),
        messages.error(RequestError(Code.NOT_FOUND, f"There is no batch {BATCH}"), batch_id=BATCH),
    ]

    told_by_server = [value for value in documented() if value["type"] not in OF_CLIENTS]

    assert told_by_server == [json.loads(text) for text in said]


def test_the_document_shows_messages_of_clients_that_are_understood() -> None:
    said_by_clients = [value for value in documented() if value["type"] in OF_CLIENTS]

    understood = [type(messages.understand(json.dumps(value))).__name__ for value in said_by_clients]

    assert understood == ["Auth", *["Subscribe"] * 4, "Unsubscribe", "Ping"]


def test_the_document_shows_streams_as_they_are() -> None:
    told = [
        Frame.of(messages.resumed(batch_id=BATCH, position=at(3)), position=str(at(3))),
        Frame.of(f'{{"type":"event","position":"{at(4)}","event":{{…}},"batch":{{…}}}}', position=str(at(4))),
        Frame.of(messages.progress(an_upload_progressed())),
    ]

    stream = (
        streams.opening() + streams.events(told) + streams.COMMENT + streams.closing(RESTARTING.code, RESTARTING.text)
    )

    assert f"```\n{stream.rstrip()}\n```" in PROTOCOL.read_text()
    assert the_event(4).startswith(f'{{"type":"event","position":"{at(4)}","event":{{')


def test_what_is_told_has_the_shapes_that_are_published() -> None:
    told = {
        frames.SubscribedUser: [
            messages.user_snapshot([the_batch(after=2)], truncated=True, log_id=LOG_ID, position=at(2)),
            messages.user_resumed(position=at(3)),
        ],
        frames.SubscribedBatch: [
            messages.snapshot(the_batch(after=2), log_id=LOG_ID, position=at(2)),
            messages.resumed(batch_id=BATCH, position=at(3)),
        ],
        frames.EventFrame: [the_event(4)],
        frames.ProgressFrame: [messages.progress(an_upload_progressed())],
    }

    for shape, texts in told.items():
        for text in texts:
            assert shape.model_validate_json(text).model_dump(mode="json", exclude_unset=True) == json.loads(text)


def test_members_that_are_not_known_are_passed_over() -> None:
    understood = messages.understand('{"type":"subscribe","batch_id":"b","since":null,"of_a_newer_client":1}')

    assert understood == messages.Subscribe(type="subscribe", batch_id="b")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "JSON"),
        ("null", ""),
        ('{"kind":"ping"}', "type"),
        ('{"type":"dance"}', "dance"),
        ('{"type":"auth"}', "token"),
        ('{"type":"auth","token":5}', "token"),
        ('{"type":"subscribe"}', "batch_id"),
        ('{"type":"subscribe","batch_id":"b","user":true}', "batch_id"),
        ('{"type":"subscribe","batch_id":"b","since":7}', "since"),
        ('{"type":"unsubscribe","user":false}', "user"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages.understand(text)

    assert caught.value.code == Code.INVALID_REQUEST
    assert complaint in caught.value.detail


@given(st.text() | anything.map(json.dumps) | st.text(min_size=500).map(lambda text: json.dumps({"type": text})))
def test_whatever_a_client_sends_is_understood_or_refused_in_a_few_words(text: str) -> None:
    refusal = refusal_of(text)

    assert len(refusal or "") < 400


def refusal_of(text: str) -> str | None:
    try:
        messages.understand(text)
    except RequestError as error:
        return error.detail
    return None


def test_a_token_is_never_repeated_in_an_error() -> None:
    secret = "eyJhbGciOiJIUzI1NiJ9.secret"

    for text in (f'{{"type":"auth","token":"{secret}"', f'{{"type":"auth","token":["{secret}"]}}'):
        with pytest.raises(RequestError) as caught:
            messages.understand(text)

        assert secret not in caught.value.detail


def test_a_deleted_batch_has_no_counts() -> None:
    state = State()
    facts = log_of(*OPENING, a_batch_created(), a_batch_deleted())
    outcomes = [state.apply(fact) for fact in facts]
    assert isinstance(outcomes[-1], Changed)

    told = json.loads(messages.event(facts[-1], time_ms=0, position=at(3), batch=outcomes[-1].batch))

    assert told["batch"] is None
    assert told["event"]["type"] == "sluice.BatchDeleted.v1"


@given(words, st.dictionaries(words, words, max_size=3))
def test_no_message_holds_a_newline_whatever_users_call_their_things(name: str, metadata: dict[str, str]) -> None:
    facts = log_of(*OPENING, a_batch_created(name=name, metadata=metadata))
    batch = fold(facts).batches[BATCH]

    snapshot = messages.snapshot(batch, log_id=LOG_ID, position=at(2))
    event = messages.event(facts[2], time_ms=0, position=at(2), batch=batch)

    assert messages.split(messages.joined([snapshot, event])) == [snapshot, event]
    assert json.loads(snapshot)["batch"]["metadata"] == metadata
    assert json.loads(event)["event"]["data"]["name"] == name


def test_several_messages_are_one_frame_and_the_same_messages_again() -> None:
    texts = [the_event(3), messages.pong(), the_event(4)]

    frame = messages.joined(texts)

    assert messages.split(frame) == texts
    assert messages.split("\n\n  \n") == []
