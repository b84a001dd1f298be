"""Each service is killed, stopped and terminated at named points while clients are at work: nothing is lost, nothing is
doubled, and it goes on by itself. `make drill` does the same in any order, and more often.
"""

from dataclasses import replace

import pytest

from tests.faults.checking.folded import fold_again
from tests.faults.real.scene import Places, Scene, a_scene, play

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine

KILLED = {
    "api": ("after_blob", "before_append", "after_append", "before_answer"),
    "processor": (
        *("after_lock", "after_claim", "before_commit", "in_commit", "after_commit", "before_start", "after_start"),
        *("in_work", "after_work", "before_outcome", "after_outcome"),
    ),
    "notifier": ("after_snapshot", "before_send", "after_replay"),
}
STOPPED_AND_TERMINATED = {
    "api": ("api.before_append:stop:3", "api.after_append:stop:6", "api.after_append:term:12"),
    "processor": (
        *("processor.in_commit:stop:5", "processor.in_work:stop:9", "processor.after_start:stop:7"),
        "processor.in_work:term:40",
    ),
    "processor-lane1": ("processor.in_work:stop:4", "processor.in_work:term:16"),
    "notifier": ("notifier.before_send:stop:5", "notifier.before_send:term:25"),
}


async def test_each_service_is_killed_at_every_point(scene: Scene) -> None:
    faults = {name: [f"{name}.{point}:kill" for point in points] for name, points in KILLED.items()}

    assert await play(scene, faults) == []


async def test_each_service_and_each_of_two_lanes_is_stopped_for_a_while_and_terminated(places: Places) -> None:
    faults = {name: [",".join(one_after_the_other)] for name, one_after_the_other in STOPPED_AND_TERMINATED.items()}

    async with a_scene(replace(places, partitions=2), seed=5) as scene:
        assert await play(scene, faults) == []
        assert all(code == 0 for service in scene.services.values() for code in service.exits)
        assert {fact.partition for fact in fold_again(scene.evidence.records).effective() if fact.upload_id} == {0, 1}
