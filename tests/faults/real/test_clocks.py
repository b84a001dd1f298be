"""Clocks of running processes are set an hour ahead and an hour behind: what is accepted is worked, nothing is done too
early or hours late, and only tokens, which are a matter of time, are taken or refused by them.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from schemas.events import BatchSealed
from services.auth import make_token
from tests.faults.checking.folded import fold_again
from tests.faults.real.clocks import INSTALL, Clocks
from tests.faults.real.scene import ALL, SECRET, USERS, Places, Scene, a_scene
from tests.faults.real.services import Service

pytestmark = pytest.mark.timeout(300)  # many processes start and die, which takes its time on a busy machine

HALF_AN_HOUR_S = 1_800
NOTICED_WITHIN_S = 10.0
ROUNDS = (
    {"api": 1, "notifier": -1, "processor": 1},
    {"api": -1, "notifier": 1, "processor": -1},
    {"api": 0, "notifier": 0, "processor": 0},
)
"""By how many hours each clock is wrong."""
TOKEN_SAID = {1: "the token has expired", -1: "the token is not valid yet", 0: None}


@pytest.fixture
def clocks(tmp_path: Path) -> Iterator[Clocks]:
    with Clocks.kept_in(tmp_path) as found:
        if found is None:
            pytest.skip(INSTALL)
        yield found


async def test_clocks_that_jump_by_hours_change_nothing(places: Places, clocks: Clocks) -> None:
    settings = {"SLUICE_IDLE_SEAL_S": str(HALF_AN_HOUR_S)}
    async with a_scene(replace(places, clocks=clocks, settings=settings), seed=8) as scene:
        # Given work, and a batch that its user leaves open for a moment
        await scene.start(*ALL)
        (client, *_) = await scene.join(users=USERS[:2])
        left_open = await client.create()
        assert left_open is not None
        async with scene.looking(), httpx.AsyncClient(trust_env=False, timeout=5) as http:
            async with scene.lively():
                for round_ in ROUNDS:
                    # When the clocks jump, then the work goes on
                    for name, hours in round_.items():
                        scene.set_clock(name, hours_ahead=hours)
                    for name, hours in round_.items():
                        await until_it_is(http, scene.services[name], hours_ahead=hours)
                    await client.open_batch(puts=2, posts=1)
                    await scene.even()
                    assert await said_of_a_new_token(http, scene) == TOKEN_SAID[round_["api"]]
            await client.put(left_open)
            await client.tell(left_open, "seal")
            await scene.settle()

        # And nothing was lost, nobody ended or began anew, and no batch was sealed before its time
        assert await scene.reckoning() == []
        assert not any(service.exits for service in scene.services.values())
        lines = [line for service in scene.services.values() for line in service.lines]
        assert not [line for line in lines if "producer_replaced" in line or "part_lost" in line]
        facts = fold_again(await scene.records()).facts.values()
        assert {fact.event.reason for fact in facts if isinstance(fact.event, BatchSealed)} == {None}


async def until_it_is(http: httpx.AsyncClient, service: Service, *, hours_ahead: int) -> None:
    """Wait until the service dates its answers by the clock that was set."""
    async with asyncio.timeout(NOTICED_WITHIN_S):
        while abs(await ahead_s(http, service) - hours_ahead * 3600) > HALF_AN_HOUR_S:  # noqa: ASYNC110  # asked for
            await asyncio.sleep(0.1)


async def ahead_s(http: httpx.AsyncClient, service: Service) -> float:
    answer = await http.get(f"{service.url}/livez")
    return parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()


async def said_of_a_new_token(http: httpx.AsyncClient, scene: Scene) -> str | None:
    """Why the api refuses a token that was made just now and is good for half an hour; None where it does not."""
    token = make_token("ada", SECRET, ttl_s=HALF_AN_HOUR_S)
    answer = await http.get(f"{scene.services['api'].url}/v1/batches", headers={"Authorization": f"Bearer {token}"})
    return None if answer.is_success else str(answer.json()["detail"]).partition(";")[0]
