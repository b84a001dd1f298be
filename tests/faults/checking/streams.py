"""What clients heard against the log: from its snapshot on, a stream tells every effective fact of what it follows
once, in order, with the counts after it, however often it was cut and resumed, and ends in what GET gives there.

A stream follows one batch, or all of a user's. A position is the whole vector: whatever it includes must have been told
by then, of every partition, and it never goes back.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from schemas.ids import partition_of
from schemas.position import Position
from tests.faults.checking.folded import FoldedLog, Place, Told
from tests.faults.checking.history import Evidence, Stream

View = Mapping[str, Any] | None
"""A batch as somebody showed it; None for one that is deleted."""
ENDED = ("completed", "failed", "cancelled")


def violations(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    answers = {(answer.batch_id, answer.position): answer.batch for answer in evidence.answers}
    for number, stream in enumerate(evidence.streams):
        followed = f"batch {stream.batch_id}" if stream.batch_id else f"all batches of {stream.user_id}"
        for sentence in (*_of_messages(stream, folded), *_of_end(stream, folded), *_of_answers(stream, answers)):
            yield f"stream {number} of {followed} over {stream.by}: {sentence}"


def at_the_end(stream: Stream) -> tuple[str | None, dict[str, View]]:
    """Where the client was told to be at last, and each batch as it was last told of it."""
    position: str | None = None
    known: dict[str, View] = {}
    for message in _positioned(stream):
        position = message["position"]
        if message["type"] == "event":
            known[_batch_of(message)] = message["batch"]
        elif not message["recovered"]:
            known = _shown(message)
    return position, known


def untold(stream: Stream, folded: FoldedLog) -> list[Place]:
    """The facts of what it follows that the client's last position does not include."""
    position, _ = at_the_end(stream)
    return _beyond(None if position is None else Position.parse(position), _facts(stream, folded))


def _of_messages(stream: Stream, folded: FoldedLog) -> Iterator[str]:
    facts = _facts(stream, folded)
    at: Position | None = None
    for message in _positioned(stream):
        here = Position.parse(message["position"])
        if message["type"] == "event":
            yield from _of_event(message, facts, at=at, here=here)
        elif message["recovered"]:
            if at is None or not here.includes(at):
                yield f"it was resumed at {_offsets(here)}, the client was at {_offsets(at)}"
            continue  # what it passed over was told later, or never
        else:
            if at is not None and not here.includes(at):
                yield f"the snapshot at {_offsets(here)} goes back, the client was at {_offsets(at)}"
            yield from _of_snapshot(message, _followed(stream, folded), folded, here)
        at = here


def _of_event(
    message: Mapping[str, Any], facts: Mapping[Place, Told], *, at: Position | None, here: Position
) -> Iterator[str]:
    partition = partition_of(_batch_of(message))
    offset = here.offset(partition)
    assert offset is not None
    place, named = (partition, offset), f"the fact at {partition}-{offset}"
    if at is None:
        yield f"{named} came before any snapshot"
        return
    if not here.includes(at) or _includes(at, place):
        yield f"{named} came again or out of order, the client was at {_offsets(at)}"
    if skipped := [each for each in _between(at, here, facts) if each != place]:
        yield f"between {_offsets(at)} and {_offsets(here)} the facts at {_places(skipped)} were not told"
    fact = facts.get(place)
    if fact is None:
        yield f"{named} was told, and is no effective fact of what it follows"
    elif fact.event_id != message["event"]["id"]:
        yield f"at {partition}-{offset} the fact {message['event']['id']} was told, the log has {fact.event_id}"
    else:
        yield from _same(message["batch"], fact.counts, named)


def _of_snapshot(message: Mapping[str, Any], followed: list[str], folded: FoldedLog, here: Position) -> Iterator[str]:
    """Each batch as it was; none is left out, but of a long list those that ended."""
    shown = _shown(message)
    where = f"the snapshot at {_offsets(here)}"
    for batch_id in followed:
        expected = folded.counts_at(batch_id, here.offset(partition_of(batch_id)) or 0)
        if batch_id in shown:
            yield from _same(shown[batch_id], expected, where)
        elif expected is not None and not (message.get("truncated") and expected["status"] in ENDED):
            yield f"{where} leaves out batch {batch_id}"
    for batch_id in sorted(shown.keys() - followed):
        yield f"{where} shows batch {batch_id}, which is none of those it follows"


def _of_end(stream: Stream, folded: FoldedLog) -> Iterator[str]:
    facts = _facts(stream, folded)
    if not stream.to_the_end or not facts:
        return
    told = [message for message in _positioned(stream) if message["type"] == "event" or not message["recovered"]]
    if not told:
        yield f"nothing was ever told ({_instead(stream)})"
        return
    at = Position.parse(told[-1]["position"])
    if beyond := _beyond(at, facts):
        yield f"it ended at {_offsets(at)}, and facts stand at {_places(beyond)} ({_instead(stream)})"


def _of_answers(stream: Stream, answers: Mapping[tuple[str, str], View]) -> Iterator[str]:
    position, known = at_the_end(stream)
    for batch_id, view in known.items():
        if position is not None and (batch_id, position) in answers:
            where = f"the end at {position}" + (f" of batch {batch_id}" if stream.batch_id is None else "")
            yield from _same(view, answers[batch_id, position], where, other="GET gives")


def _same(said: View, expected: View, where: str, *, other: str = "the fold has") -> Iterator[str]:
    if said is None or expected is None:
        if said is not expected:
            yield f"{where} says {'a deleted batch' if said is None else 'a batch'}, {other} the contrary"
        return
    names = said.keys() & expected.keys()
    if wrong := [f"{name} {said[name]} for {expected[name]}" for name in sorted(names) if said[name] != expected[name]]:
        yield f"{where} says {', '.join(wrong)} ({other})"


# What a stream follows, and what it says


def _followed(stream: Stream, folded: FoldedLog) -> list[str]:
    return [stream.batch_id] if stream.batch_id is not None else folded.batches_of(stream.user_id or "")


def _facts(stream: Stream, folded: FoldedLog) -> dict[Place, Told]:
    """Every fact of what it follows, from the beginning of the log."""
    return {
        (partition_of(batch_id), told.offset): told
        for batch_id in _followed(stream, folded)
        for told in folded.told[batch_id]
    }


def _positioned(stream: Stream) -> list[dict[str, Any]]:
    return [message for message in stream.messages if message["type"] in ("subscribed", "event")]


def _batch_of(message: Mapping[str, Any]) -> str:
    return str(message["event"]["data"]["batch_id"])


def _shown(snapshot: Mapping[str, Any]) -> dict[str, View]:
    """The batches of a snapshot."""
    return {batch["id"]: batch for batch in snapshot.get("batches", [snapshot.get("batch")]) if batch is not None}


def _instead(stream: Stream) -> str:
    """What the client heard besides, for whoever has to find out why it was not told."""
    refused = [message["code"] for message in stream.messages if message["type"] == "error"]
    cuts = [message["reason"] for message in stream.messages if message["type"] == "cut"]
    return f"refused {len(refused)} times, last {refused[-1:]}; cut {len(cuts)} times, last {cuts[-1:]}"


# Places


def _includes(position: Position, place: Place) -> bool:
    offset = position.offset(place[0])
    return offset is not None and offset >= place[1]


def _between(at: Position, here: Position, facts: Mapping[Place, Told]) -> list[Place]:
    before, now = dict(at.offsets), dict(here.offsets)
    return [place for place in facts if before.get(place[0], -1) < place[1] <= now.get(place[0], -1)]


def _beyond(at: Position | None, facts: Mapping[Place, Told]) -> list[Place]:
    return [place for place in facts if at is None or not _includes(at, place)]


def _offsets(position: Position | None) -> str:
    """The position without the log's name."""
    return (
        "nowhere" if position is None else ".".join(f"{partition}-{offset}" for partition, offset in position.offsets)
    )


def _places(places: list[Place]) -> str:
    return ", ".join(f"{partition}-{offset}" for partition, offset in sorted(places))
