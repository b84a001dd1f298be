"""Two processors on one lane: the work is done once, the second takes over in time, and what a paused first one says
when it goes on again changes nothing, wherever it was paused.
"""

import time

import pytest

from schemas.events import LaneClaimed, OfAttempt, UploadAttemptFailed, UploadStarted, UploadSucceeded
from tests.faults.checking.folded import FoldedLog, fold_again
from tests.faults.real.scene import Scene

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]  # many processes start and die, which takes its time

TAKEN_OVER_WITHIN_S = 10.0
BOTH = ("processor-1", "processor-2")


async def test_two_replicas_started_by_mistake_do_the_work_once_and_one_takes_over_in_time(scene: Scene) -> None:
    await scene.start("api", "api-2", "notifier", *BOTH)
    (client, *_) = await scene.join()
    scene.strike("processor: two at once")
    for _ in range(4):
        await client.open_batch(puts=3, posts=2)
    await scene.settle()
    before = fold_again(await scene.records())

    holder = scene.holder_of(before)
    killed_ms = time.time() * 1000
    scene.services[holder].kill()
    scene.strike("processor: the holder of the lane killed")
    await scene.until_claimed(since=len(before.facts))
    await client.open_batch(puts=2, posts=0)
    await scene.settle()
    after = fold_again(await scene.records())

    assert await scene.reckoning() == []
    assert all(upload.attempts == 1 for upload in before.state.uploads.values())
    assert not any(isinstance(fact.event, UploadAttemptFailed) for fact in before.effective())
    taken_ms = [fact.timestamp_ms for fact in after.effective() if isinstance(fact.event, LaneClaimed)][-1]
    assert taken_ms - killed_ms < TAKEN_OVER_WITHIN_S * 1000


@pytest.mark.parametrize("point", ["in_work", "in_commit"])
async def test_a_processor_that_was_paused_while_another_took_the_lane_changes_nothing(
    scene: Scene, point: str
) -> None:
    # Given a processor that is going to be paused in mid work, and another one standing by
    scene.pause_s = 14.0
    await scene.start("api", "notifier", "processor-1", faults={"processor-1": [f"processor.{point}:stop:3"]})
    await scene.start("processor-2")
    (client, *_) = await scene.join()
    zombie = scene.services["processor-1"]

    # When it is paused, the other takes the lane and works on, and then it is continued
    async with scene.looking():
        async with scene.lively():
            await zombie.until_struck()
            paused_ms = time.time() * 1000
            claims = await scene.until_claimed_by("processor-2")
            await zombie.until(lambda: bool(zombie.exits), "the end of the zombie")
            await client.open_batch(puts=2, posts=0)
        await scene.settle()
    folded = fold_again(await scene.records())

    # Then its word is ignored, it left by itself, and all is well
    assert await scene.reckoning() == []
    assert zombie.exits[0] == 1
    assert claims[-1].timestamp_ms - paused_ms < TAKEN_OVER_WITHIN_S * 1000
    assert None not in said_by_the_zombie(folded, claims[-1].offset)
    assert all(upload.attempts <= 2 for upload in folded.state.uploads.values())


def said_by_the_zombie(folded: FoldedLog, newer: int) -> set[str | None]:
    """What became of the facts with an older epoch that stand after the newer claim."""
    return {
        folded.reasons[place]
        for place, fact in folded.facts.items()
        if place[1] > newer and isinstance(fact.event, OfAttempt | UploadStarted | UploadSucceeded)
        if fact.event.epoch < newer
    }
