"""What clients heard against the log: from its snapshot on, a stream tells every effective fact of its batch once, in
order, with the counts after it, however often it was cut and resumed; and it ends in what GET gives at that position.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from schemas.ids import partition_of
from schemas.position import Position
from tests.faults.checking.folded import FoldedLog, Told
from tests.faults.checking.history import Evidence, Stream


def violations(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    answers = {(answer.batch_id, answer.position): answer.batch for answer in evidence.answers}
    for number, stream in enumerate(evidence.streams):
        for sentence in _of_stream(stream, folded, answers):
            yield f"stream {number} of batch {stream.batch_id}: {sentence}"


def _of_stream(
    stream: Stream, folded: FoldedLog, answers: Mapping[tuple[str, str], Mapping[str, Any] | None]
) -> Iterator[str]:
    partition = partition_of(stream.batch_id)
    told = folded.told[stream.batch_id]
    at: int | None = None
    last: tuple[str, Mapping[str, Any] | None] | None = None
    for message in stream.messages:
        if message["type"] not in ("subscribed", "event"):
            continue
        here = Position.parse(message["position"]).offset(partition)
        assert here is not None
        if message["type"] == "event":
            yield from _of_event(message, told, at=at, here=here)
            at, last = here, (message["position"], message["batch"])
        elif message["recovered"]:
            if at is None or here < at:
                yield f"it was resumed at {here}, the client was at {at}"
        else:
            if at is not None and here < at:
                yield f"the snapshot at {here} goes back, the client was at {at}"
            yield from _same(message["batch"], folded.counts_at(stream.batch_id, here), f"the snapshot at {here}")
            at, last = here, (message["position"], message["batch"])
    if stream.to_the_end:
        yield from _of_end(stream, told, at)
    if last is not None and (stream.batch_id, last[0]) in answers:
        yield from _same(last[1], answers[stream.batch_id, last[0]], f"the end at {last[0]}", other="GET gives")


def _of_event(message: Mapping[str, Any], told: list[Told], *, at: int | None, here: int) -> Iterator[str]:
    event_id = message["event"]["id"]
    if at is None:
        yield f"the fact at {here} came before any snapshot"
        return
    if here <= at:
        yield f"the fact at {here} came again or out of order, the client was at {at}"
    yield from _skipped(told, at, here)
    fact = next((each for each in told if each.offset == here), None)
    if fact is None:
        yield f"the fact at {here} was told, and is no effective fact of this batch"
    elif fact.event_id != event_id:
        yield f"at {here} the fact {event_id} was told, the log has {fact.event_id}"
    else:
        yield from _same(message["batch"], fact.counts, f"the fact at {here}")


def _skipped(told: list[Told], at: int, here: int) -> Iterator[str]:
    if skipped := [each.offset for each in told if at < each.offset < here]:
        yield f"between {at} and {here} the facts at {', '.join(map(str, skipped))} were not told"


def _same(
    said: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, where: str, *, other: str = "the fold has"
) -> Iterator[str]:
    if said is None or expected is None:
        if said is not expected:
            yield f"{where} says {'a deleted batch' if said is None else 'a batch'}, {other} the contrary"
        return
    names = said.keys() & expected.keys()
    if wrong := [f"{name} {said[name]} for {expected[name]}" for name in sorted(names) if said[name] != expected[name]]:
        yield f"{where} says {', '.join(wrong)} ({other})"


def _of_end(stream: Stream, told: list[Told], at: int | None) -> Iterator[str]:
    if not told:
        return
    if at is None:
        yield "nothing was ever told"
    elif at < told[-1].offset:
        yield f"it ended at {at}, and the batch's last fact stands at {told[-1].offset}"
