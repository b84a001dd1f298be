"""The simulation's event loop: virtual time, turns by seed, first in first out within a process, death and pause."""

import asyncio

import pytest

from tests.faults.simulation.loop import Node, SimulatedLoop, Stuck


def a_loop(seed: str = "1", *, steps_max: int = 10_000) -> SimulatedLoop:
    return SimulatedLoop(seed=seed, steps_max=steps_max)


async def say(said: list[str], name: str, *, times: int = 3, pause_s: float = 0.0) -> None:
    for number in range(times):
        said.append(f"{name}{number}")
        await asyncio.sleep(pause_s)


def turns(seed: str) -> list[str]:
    """Who spoke when, of three processes that have the same to do."""
    loop = a_loop(seed)
    said: list[str] = []

    async def main() -> None:
        await asyncio.gather(*(loop.spawn(Node(name), say(said, name), name=name) for name in "abc"))

    loop.run(main())
    loop.dispose()
    return said


def test_time_is_virtual() -> None:
    loop = a_loop()

    async def main() -> float:
        await asyncio.sleep(3_600)
        return loop.time()

    ended_s = loop.run(main())
    loop.dispose()

    assert 4_600 <= ended_s < 4_601


def test_a_timeout_ends_what_waits_in_vain() -> None:
    loop = a_loop()

    async def main() -> None:
        async with asyncio.timeout(5):
            await loop.create_future()

    with pytest.raises(TimeoutError):
        loop.run(main())
    loop.dispose()


def test_the_seed_decides_whose_turn_it_is() -> None:
    orders = {tuple(turns(str(seed))) for seed in range(20)}

    assert len(orders) > 5
    assert turns("1") == turns("1")


def test_a_process_keeps_its_own_order() -> None:
    for seed in range(10):
        said = turns(str(seed))

        assert [word for word in said if word[0] == "a"] == ["a0", "a1", "a2"]


def test_the_dead_do_nothing_more_not_even_in_finally() -> None:
    loop, said, node = a_loop(), [], Node("a")

    async def dying() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            said.append("cleaned up")

    async def main() -> None:
        loop.spawn(node, dying(), name="a")
        await asyncio.sleep(1)
        loop.kill(node)
        await asyncio.sleep(60)
        assert said == []

    loop.run(main())
    loop.dispose()

    assert loop.complaints == []


def test_the_paused_go_on_where_they_were() -> None:
    loop, said, node = a_loop(), [], Node("a")

    async def main() -> None:
        speaking = loop.spawn(node, say(said, "a", pause_s=1), name="a")
        await asyncio.sleep(0.5)
        loop.pause(node)
        await asyncio.sleep(100)
        assert said == ["a0"]
        loop.resume(node)
        await speaking

    loop.run(main())
    loop.dispose()

    assert said == ["a0", "a1", "a2"]


def test_a_loop_with_nothing_left_to_do_says_so() -> None:
    loop = a_loop()

    async def main() -> None:
        await loop.create_future()

    with pytest.raises(Stuck, match="nothing is left"):
        loop.run(main())
    loop.dispose()


def test_a_loop_that_never_rests_says_so() -> None:
    loop = a_loop(steps_max=500)

    async def main() -> None:
        while True:  # noqa: ASYNC110  # that nothing comes of it is the point
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="not come to rest"):
        loop.run(main())
    loop.dispose()


def test_what_a_callback_raises_is_told() -> None:
    loop = a_loop()

    async def main() -> None:
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    loop.run(main())
    loop.dispose()

    assert any("ZeroDivisionError" in complaint for complaint in loop.complaints)
