"""How often files were tried, counted from what the read models call effective, without the fold."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from schemas.events import (
    BatchCancelled,
    BatchDeleted,
    Fact,
    LaneClaimed,
    OfAttempt,
    UploadInterrupted,
    UploadQueued,
    UploadRetried,
    UploadStarted,
)
from tests.faults.checking.folded import FoldedLog, Place
from tests.faults.checking.history import Evidence

ATTEMPTS_MAX = 2
"""Of a queueing, as the contract has it; not what the services' own constant says."""


@dataclass(slots=True)
class _Tried:
    """An upload: how many attempts ended, of all its queueings and of the newest one."""

    batch_id: str
    ended: int = 0
    ended_of_queueing: int = 0


@dataclass(slots=True)
class _Attempts:
    """What was tried so far. `copies`: where copies of earlier starts stand; `in_work`: the number of each upload's
    attempt that began and did not end; `working`: the upload each lane works on."""

    copies: frozenset[Place]
    uploads: dict[str, _Tried] = field(default_factory=dict)
    in_work: dict[str, int] = field(default_factory=dict)
    working: dict[int, str] = field(default_factory=dict)

    def leave(self, upload_id: str) -> None:
        """It is in work no longer."""
        self.in_work.pop(upload_id, None)
        self.working = {lane: each for lane, each in self.working.items() if each != upload_id}


def violations(evidence: Evidence, folded: FoldedLog) -> Iterator[str]:
    """Two attempts a queueing at most, numbered one after the other over all queueings (an interrupted one's number is
    used again); and a lane works on one file at a time."""
    attempts = _Attempts(_copies(folded))
    for place in folded.called_effective(evidence.rows.verdicts):
        event = folded.facts[place].event
        if isinstance(event, LaneClaimed):  # who worked here does so no longer; the new holder says how that ended
            attempts.working.pop(place[0], None)
        elif isinstance(event, BatchCancelled | BatchDeleted):
            for upload_id in list(attempts.in_work):
                if attempts.uploads[upload_id].batch_id == event.batch_id:
                    attempts.leave(upload_id)
        elif isinstance(event, UploadQueued):
            attempts.uploads.setdefault(event.upload_id, _Tried(event.batch_id))
        elif isinstance(event, UploadRetried) and event.upload_id in attempts.uploads:
            attempts.uploads[event.upload_id].ended_of_queueing = 0
        elif isinstance(event, OfAttempt) and event.upload_id in attempts.uploads:
            tried = attempts.uploads[event.upload_id]
            if event.attempt != tried.ended + 1:
                yield f"{folded.named(place)} is of attempt {event.attempt}, and {tried.ended} ended before it"
            step = _begun if isinstance(event, UploadStarted) else _ended
            yield from (f"{folded.named(place)} {wrong}" for wrong in step(attempts, folded.facts[place]))


def _copies(folded: FoldedLog) -> frozenset[Place]:
    """Where a start stands that was in the log before, effective or not."""
    first: dict[str, Place] = {}
    starts = ((place, fact.id) for place, fact in folded.facts.items() if isinstance(fact.event, UploadStarted))
    return frozenset(place for place, fact_id in starts if first.setdefault(fact_id, place) != place)


def _begun(attempts: _Attempts, fact: Fact) -> Iterator[str]:
    """A late copy of a start that was given back counts once more until it is given back too: nobody works on it."""
    event = fact.event
    assert isinstance(event, UploadStarted)
    ended = attempts.uploads[event.upload_id].ended_of_queueing
    if ended >= ATTEMPTS_MAX:
        yield f"begins attempt {ended + 1} of one queueing of upload {event.upload_id}, at most {ATTEMPTS_MAX} are made"
    if (number := attempts.in_work.get(event.upload_id)) is not None:
        yield f"begins upload {event.upload_id}, whose attempt {number} is in work"
    attempts.in_work[event.upload_id] = event.attempt
    if (fact.partition, fact.offset) in attempts.copies:
        return
    if (other := attempts.working.get(fact.partition, event.upload_id)) != event.upload_id:
        yield f"begins upload {event.upload_id} while the lane works on upload {other}"
    attempts.working[fact.partition] = event.upload_id


def _ended(attempts: _Attempts, fact: Fact) -> Iterator[str]:
    event = fact.event
    assert isinstance(event, OfAttempt)
    tried = attempts.uploads[event.upload_id]
    if attempts.in_work.get(event.upload_id) != event.attempt:
        yield f"ends attempt {event.attempt} of upload {event.upload_id}, which is not in work"
    attempts.leave(event.upload_id)
    if isinstance(event, UploadInterrupted):
        return
    tried.ended += 1
    tried.ended_of_queueing += 1
    if tried.ended_of_queueing > ATTEMPTS_MAX:
        number = tried.ended_of_queueing
        yield f"ends attempt {number} of one queueing of upload {event.upload_id}, at most {ATTEMPTS_MAX} are made"
