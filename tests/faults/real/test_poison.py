"""Poison in the log while clients are at work: quarantined once, the rest goes on, and all three services agree."""

import uuid

import pytest

from schemas.batch import Ignored
from schemas.events import Envelope, UploadSucceeded, encode
from schemas.records import NewRecord
from tests.examples import BATCH, RESULT, UPLOAD
from tests.faults.checking.folded import fold_again
from tests.faults.real.poisons import poisons
from tests.faults.real.scene import ALL, Scene

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine


def an_outcome_for_nothing() -> NewRecord:
    event = UploadSucceeded(batch_id=BATCH, upload_id=UPLOAD, attempt=1, epoch=1, result=RESULT, duration_ms=1)
    return encode(event, Envelope(id=str(uuid.uuid4()), source="/tests", time="2026-01-01T12:00:00Z"))


async def test_poison_is_quarantined_once_and_the_rest_goes_on(scene: Scene) -> None:
    await scene.start(*ALL)
    (client, *_) = await scene.join()
    writer = scene.log.writer()
    for what, record in poisons().items():
        await writer.append(0, [record, an_outcome_for_nothing()], timeout_s=10)
        scene.strike(f"log: {what}")
        await client.open_batch(puts=1, posts=0)
    scene.strike("log: an outcome for nothing")
    await writer.close()
    scene.services["processor"].kill()
    await scene.settle()

    assert await scene.reckoning() == []
    folded = fold_again(scene.evidence.records)
    assert len(folded.undecodable) == len(scene.evidence.rows.quarantined) == len(poisons())
    assert list(folded.reasons.values()).count(Ignored.UNKNOWN) == len(poisons())
    assert {batch.status for batch in folded.state.batches.values()} == {"completed"}
