"""When a lane counts as worked by nobody, and what is said of the processors that are there."""

from typing import Any

from schemas.views import ProcessorView
from services.api.lanes import LEFT_ALONE_S, Lanes


def a_processor(**changes: Any) -> ProcessorView:
    return ProcessorView(
        **{
            "partition": 0,
            "worker_id": "host-7",
            "state": "working",
            "since": "2026-01-31T12:00:00.000Z",
            "heard_s": 0.5,
            "epoch": 12,
            "working_since": None,
            "attempt": None,
            "degraded": [],
            "problems": [],
            **changes,
        }
    )


def test_a_lane_that_is_worked_is_no_reason_to_complain() -> None:
    lanes = Lanes(1, now_s=0.0)

    lanes.see([a_processor()], now_s=100.0)

    assert lanes.degraded(now_s=100.0 + LEFT_ALONE_S) == []
    assert [each.worker_id for each in lanes.processors] == ["host-7"]


def test_a_lane_that_nobody_works_is_said_after_a_while() -> None:
    lanes = Lanes(1, now_s=0.0)
    lanes.see([a_processor()], now_s=100.0)

    lanes.see([], now_s=101.0)

    assert lanes.degraded(now_s=104.0) == []
    (said,) = lanes.degraded(now_s=112.0)
    assert said.startswith("no processor works: for 12 s none was heard")


def test_a_processor_that_was_not_heard_for_long_is_not_there() -> None:
    lanes = Lanes(1, now_s=0.0)

    lanes.see([a_processor(heard_s=5.5)], now_s=6.0)

    assert lanes.processors == []
    assert "no processor works" in lanes.degraded(now_s=6.0)[0]


def test_each_of_several_lanes_needs_its_own() -> None:
    lanes = Lanes(2, now_s=0.0)

    lanes.see([a_processor(), a_processor(partition=1, worker_id="host-8", state="standing by")], now_s=10.0)

    (said,) = lanes.degraded(now_s=10.0)
    assert said.startswith("no processor works lane 1: ")


def test_one_that_reads_the_log_first_is_named() -> None:
    lanes = Lanes(1, now_s=0.0)

    lanes.see([a_processor(state="catching up")], now_s=10.0)

    (said,) = lanes.degraded(now_s=10.0)
    assert said.startswith("no processor works yet: host-7 reads the log into the read models first")


def test_while_the_database_gives_no_answer_nobody_is_accused() -> None:
    lanes = Lanes(1, now_s=0.0)
    lanes.see([a_processor()], now_s=1.0)

    lanes.see_nothing(now_s=60.0)

    assert lanes.degraded(now_s=60.0 + LEFT_ALONE_S) == []
    assert lanes.processors == ()


def test_what_a_processor_lacks_is_said() -> None:
    lanes = Lanes(1, now_s=0.0)

    lanes.see([a_processor(degraded=["the handler 'video' is not running"], problems=["no Kafka"])], now_s=1.0)

    assert lanes.degraded(now_s=1.0) == [
        "host-7, which works lane 0: no Kafka",
        "host-7 goes on without a part: the handler 'video' is not running",
    ]
