"""The stories: what clients and operators do, each short enough to be told once for every point where it may break.

A story ends when its clients have their answers; what must be true by then and after is said in `checks`, not here.
Every story asks two replicas; two processors stand ready, and two partitions are worked, where it says so.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from schemas.events import Fact, LaneClaimed, decode
from schemas.ids import partition_of
from tests.faults.simulation.clients import Client, History, Wish
from tests.faults.simulation.processes import Process
from tests.faults.simulation.world import World

CLAIM_S_MAX = 30.0


@dataclass(slots=True)
class Scene:
    """What a story works with."""

    world: World
    history: History
    replicas: Sequence[Process]
    processors: Sequence[Process]
    replayer: Process
    watched: list[str]

    def client(self, user_id: str) -> Client:
        return Client(self.world, self.history, self.replicas, user_id=user_id)

    def batch_of(self, wish: Wish) -> str | None:
        """The batch a wish made, which is watched from here on; None where it was not granted."""
        if wish.outcome != "ok":
            return None
        body = wish.answer.body
        batch_id = str(body["batch"]["id"] if "batch" in body else body["id"])
        if batch_id not in self.watched:
            self.watched.append(batch_id)
        return batch_id

    async def read_at(self, client: Client, wish: Wish, batch_id: str) -> None:
        """Have every replica say what a batch is as of what a wish came to, where it was granted."""
        position = wish.answer.position if wish.outcome == "ok" else None
        for replica in self.replicas:
            one = Client(self.world, self.history, [replica], user_id=client.user_id)
            await one.read(f"/v1/batches/{batch_id}", min_position=position)

    def working(self, batch_id: str | None) -> Process | None:
        """The processor that holds the lane of a batch."""
        node, _ = self.world.locks.get(partition_of(batch_id) if batch_id else 0, (None, 0.0))
        return next((each for each in self.processors if each.node is node and not each.node.dead), None)

    async def taken_from(self, process: Process, batch_id: str | None, *, seconds: float) -> None:
        """Wait until another processor holds the lane of a batch, for so long at most."""
        deadline_s = self.world.loop.now_s + seconds
        while self.working(batch_id) in (process, None) and self.world.loop.now_s < deadline_s:  # noqa: ASYNC110  # nobody is told who holds a lock
            await asyncio.sleep(0.004)

    async def claimed(self, *, since: int) -> str | None:
        """Who claims the first lane next, from an offset on, the moment that it lands; None where nobody does."""
        broker = self.world.brokers[0]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLAIM_S_MAX):
                while True:
                    for record in broker.records[since:]:
                        if isinstance(fact := decode(record), Fact) and isinstance(fact.event, LaneClaimed):
                            return fact.event.worker_id
                    since = broker.end
                    broker.arrivals[landed := self.world.loop.create_future()] = None
                    await landed
        return None

    async def pause(self, seconds: float) -> None:
        """Some time passes, about so much."""
        await asyncio.sleep(seconds * (0.5 + self.world.choices.random()))


Story = Callable[[Scene], Awaitable[None]]


async def bad_file_and_retry(scene: Scene) -> None:
    """A batch with a file that fails twice; once the cause is mended, a retry takes the batch up again."""
    ada = scene.client("ada")
    batch_id = scene.batch_of(await ada.post_batch("good", "bad", "broken", "good", key="k1"))
    if batch_id is None:
        return
    if await ada.until_ended(batch_id) is None:
        return
    scene.world.mended = True
    retried = await ada.retry_batch(batch_id, key="k2")
    await scene.read_at(ada, retried, batch_id)
    await ada.until_ended(batch_id)
    await ada.read(f"/v1/batches/{batch_id}/uploads")


async def cancelled_in_work(scene: Scene) -> None:
    """An open batch gets files, one of them slow, and is cancelled while that is in work."""
    ada = scene.client("ada")
    batch_id = scene.batch_of(await ada.create(key="k1"))
    if batch_id is None:
        return
    await ada.post_uploads(batch_id, "slow", "good", key="k2")
    await ada.put(batch_id, "good-own.jpg", "own")
    await scene.pause(0.6)
    await ada.cancel(batch_id)
    await ada.post_uploads(batch_id, "good", key="k3")
    await scene.read_at(ada, await ada.retry_batch(batch_id, key="k4"), batch_id)


async def deleted(scene: Scene) -> None:
    """A batch is deleted while it is worked, another one after it ended and while one replica cannot read the log."""
    ada = scene.client("ada")
    first = scene.batch_of(await ada.post_batch("slow", "good", key="k1"))
    second = scene.batch_of(await ada.post_batch("good"))
    await scene.pause(0.3)
    if first is not None:
        await scene.read_at(ada, await ada.delete(first), first)
    if second is not None:
        await ada.until_ended(second)
        scene.world.take_away("Kafka", scene.replicas[0].name, seconds=1.5)
        await scene.read_at(ada, await ada.delete(second), second)
    carl = scene.client("carl")
    only = scene.batch_of(await carl.post_batch("good"))
    if only is not None:
        await carl.delete(only)
    repeated = await ada.post_batch("good", key="k5")
    scene.batch_of(repeated)
    await ada.repeat(repeated)


async def two_users(scene: Scene) -> None:
    """Two users at once, one with files that come one by one until there are as many as were announced."""

    async def ada_s() -> None:
        ada = scene.client("ada")
        batch_id = scene.batch_of(await ada.create(key="k1", expected=2))
        if batch_id is not None:
            await ada.put(batch_id, "good-own-1.jpg", "one")
            await scene.pause(0.1)
            await ada.put(batch_id, "bad-own-2.jpg", "two")
            await ada.until_ended(batch_id)

    async def bob_s() -> None:
        bob = scene.client("bob")
        batch_id = scene.batch_of(await bob.post_batch("good", "good"))
        if batch_id is not None:
            await bob.read(f"/v1/batches/{batch_id}")
            await bob.until_ended(batch_id)

    await asyncio.gather(ada_s(), bob_s())


async def decoder_away(scene: Scene) -> None:
    """No file can be worked for a while: each is started and given back again and again, unharmed."""
    ada = scene.client("ada")
    scene.world.take_away("the decoder", seconds=6.0)
    batch_id = scene.batch_of(await ada.post_batch("good", "bad", key="k1"))
    if batch_id is not None:
        await ada.until_ended(batch_id)


async def zombie(scene: Scene) -> None:
    """The processor is paused in mid work until another has taken the lane, and goes on later: some time, or when the
    other one has just taken it, or has just claimed it."""
    ada = scene.client("ada")
    batch_id = scene.batch_of(await ada.post_batch("slow", "good", key="k1"))
    await scene.pause(0.4)
    if (paused := scene.working(batch_id)) is not None:
        node, ended = paused.node, scene.world.brokers[0].end
        goes_on = scene.world.choices.choice(("some time", "taken", "claimed"))
        scene.world.pause(node, seconds=scene.world.choices.uniform(1.0, 8.0) if goes_on == "some time" else 8.0)
        if goes_on == "taken":
            await scene.taken_from(paused, batch_id, seconds=6.0)
            await asyncio.sleep(scene.world.choices.uniform(0.0, 0.01))
        elif goes_on == "claimed":
            await scene.claimed(since=ended)
        if goes_on != "some time":
            scene.world.loop.resume(node)
        await scene.pause(5.0)
    if batch_id is not None:
        await ada.until_ended(batch_id)


async def claimed_and_paused(scene: Scene) -> None:
    """A deployed processor is paused when its claim has just landed, until another one has claimed the lane and waits
    for work: it reads both claims at once, when it goes on."""
    world = scene.world
    ended = world.brokers[0].end
    if (told := scene.working(None)) is not None:
        told.stop.set()
    claimed = await scene.claimed(since=ended)
    if (node := next((each.node for each in scene.processors if each.node.name == claimed), None)) is not None:
        world.pause(node, seconds=world.choices.uniform(4.0, 5.5))
    await asyncio.sleep(6.0)
    ada = scene.client("ada")
    batch_id = scene.batch_of(await ada.post_batch("good", "slow", "good", key="k1"))
    if batch_id is not None:
        await ada.until_ended(batch_id)


async def deploy(scene: Scene) -> None:
    """The processor that works is told to stop, and another goes on: nobody loses an attempt."""
    ada = scene.client("ada")
    batch_id = scene.batch_of(await ada.post_batch("slow", "slow", "good", key="k1"))
    for _ in range(2):
        await scene.pause(0.5)
        if (told := scene.working(batch_id)) is not None:
            scene.world.tell("sigterm", told.name)
            told.stop.set()
    if batch_id is not None:
        await ada.until_ended(batch_id)


async def duplicates(scene: Scene) -> None:
    """The same request several times at once, on any replica, and another one under the same key."""
    ada = scene.client("ada")
    first = asyncio.create_task(ada.post_batch("good", "bad", key="k1"))
    await asyncio.sleep(0)
    others = [asyncio.create_task(ada.repeat(scene.history.wishes[0])) for _ in range(2)]
    other = asyncio.create_task(ada.post_batch("good", key="k1"))
    wishes = await asyncio.gather(first, *others, other)
    batches = {batch_id for wish in wishes if (batch_id := scene.batch_of(wish)) is not None}
    for batch_id in sorted(batches):
        await ada.until_ended(batch_id)
        await asyncio.gather(ada.retry_batch(batch_id, key="k2"), ada.retry_batch(batch_id, key="k2"))


async def last_place(scene: Scene) -> None:
    """Files race for the last places of a batch, for a name, and against its seal."""
    ada = scene.client("ada")
    batch_id = scene.batch_of(await ada.create(key="k1"))
    if batch_id is None:
        return
    await ada.post_uploads(batch_id, "good", "good", key="k2")
    await asyncio.gather(
        ada.put(batch_id, "good-a.jpg", "one"),
        ada.put(batch_id, "good-a.jpg", "two"),
        ada.put(batch_id, "good-b.jpg", "one"),
        ada.put(batch_id, "good-c.jpg", "one"),
        ada.post_uploads(batch_id, "good"),
        _after(0.02, ada.seal(batch_id)),
    )
    await ada.until_ended(batch_id)


async def rebuilt(scene: Scene) -> None:
    """The read models are rebuilt beside the live ones, and switched to, while files come and are worked; or while the
    processors cannot reach Postgres."""
    ada, bob = scene.client("ada"), scene.client("bob")
    first = scene.batch_of(await ada.post_batch("good", "bad", key="k1"))
    scene.replayer.start()
    second = scene.batch_of(await bob.post_batch("slow", "good", key="k2"))
    for each in scene.processors if scene.world.choices.random() < 0.5 else ():
        scene.world.take_away("Postgres", each.name, seconds=1.5)
    if first is not None:
        await ada.until_ended(first)
        await scene.read_at(ada, await ada.retry_batch(first, key="k3"), first)
    if second is not None:
        await bob.until_ended(second)
        await scene.read_at(bob, await bob.delete(second), second)


async def _after(seconds: float, awaited: Awaitable[Wish]) -> Wish:
    await asyncio.sleep(seconds)
    return await awaited


@dataclass(frozen=True, slots=True)
class Scenario:
    """A story, into how many partitions its log is divided, and how many processors stand ready for each."""

    story: Story
    processors: int = 1
    partitions: int = 1


SCENARIOS: dict[str, Scenario] = {
    "bad_file_and_retry": Scenario(bad_file_and_retry),
    "cancelled_in_work": Scenario(cancelled_in_work),
    "deleted": Scenario(deleted, partitions=2),
    "two_users": Scenario(two_users, partitions=2),
    "decoder_away": Scenario(decoder_away),
    "zombie": Scenario(zombie, processors=2),
    "claimed_and_paused": Scenario(claimed_and_paused, processors=2),
    "deploy": Scenario(deploy, processors=2),
    "duplicates": Scenario(duplicates, partitions=2),
    "last_place": Scenario(last_place),
    "rebuilt": Scenario(rebuilt, partitions=2),
}
