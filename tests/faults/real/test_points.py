"""Each service is killed, stopped and terminated at named points while clients are at work: nothing is lost, nothing is
doubled, and it goes on by itself. `make drill` does the same in any order, and more often.
"""

import pytest

from tests.faults.real.scene import Scene, play

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
        *("processor.in_commit:stop:5", "processor.in_work:stop:9", "processor.after_start:stop:14"),
        "processor.in_work:term:60",
    ),
    "notifier": ("notifier.before_send:stop:5", "notifier.before_send:term:25"),
}


async def test_each_service_is_killed_at_every_point(scene: Scene) -> None:
    faults = {name: [f"{name}.{point}:kill" for point in points] for name, points in KILLED.items()}

    assert await play(scene, faults) == []


async def test_each_service_is_stopped_for_a_while_and_terminated(scene: Scene) -> None:
    faults = {name: [",".join(one_after_the_other)] for name, one_after_the_other in STOPPED_AND_TERMINATED.items()}

    assert await play(scene, faults) == []
    assert all(code == 0 for service in scene.services.values() for code in service.exits)
