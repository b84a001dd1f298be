"""What the simulated processes share: time, chance, the broker's and the database's disks, and where things fail.

Every call through a port comes by `World.reach` before and after it does what it is for; these are the points where
the plan lets it fail, wait, or end its process. Where it failed "before" nothing happened; where "after", it did, and
the caller is not told. `trace` tells a run in order: equal seeds have equal traces.
"""

import asyncio
import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Protocol, Self

from schemas.batch import Lane
from schemas.records import NewRecord, StoredRecord
from services.eventlog import LogIdentity
from tests.fakes_rows import Tables
from tests.faults.simulation.loop import NODE, ROOT, Node, SimulatedLoop

When = Literal["before", "during", "after"]
Fault = Literal["crash", "fail", "late", "twice", "pause", "away"]

EPOCH_S = 1_767_268_800.0
"""The date on the simulated clock at its zero."""
UNLIKE = 0.4
"""In so many of the runs, and of the outages, the processes do not fare alike."""
UNCOUNTED = frozenset({"log.ends", "database.positions", "database.listen", "lock.try", "lock.pin", "rows.idle"})
"""Calls that are made again and again whatever happens: a crash there is a crash at any time."""
SERVER_OF = {"log": "Kafka", "rows": "Postgres", "database": "Postgres", "lock": "Postgres", "blobs": "the disk"} | {
    "replay": "Postgres",
    "answer": "the network",
    "work": "the decoder",
}
"""What is away when calls of these names fail together."""
SERVERS = sorted(set(SERVER_OF.values()))


class Plan(Protocol):
    """Decides what breaks. Asked once for each point, in the order they are come by."""

    def at(self, world: "World", node: Node, name: str, when: When) -> Fault | None: ...


@dataclass
class CrashAt:
    """The processes that come by these points, counted from 1, die there; nothing else breaks."""

    points: frozenset[int]

    def at(self, world: "World", _node: Node, _name: str, _when: When) -> Fault | None:
        return "crash" if len(world.passed) in self.points else None


@dataclass
class AtRandom:
    """Everything breaks sometimes, until the world is healed. How often which call does, for all processes alike or for
    each in its own way, how appends go wrong and whether a whole server, or one process's way to it, goes away for a
    while, the seed says: some runs are quiet, some break one thing again and again, some everything."""

    seed: str
    _random: random.Random = field(init=False)
    _crash: float = field(init=False)
    _pause: float = field(init=False)
    _outage: float = field(init=False)
    _unlike: bool = field(init=False)
    _kinds: tuple[Fault, ...] = field(init=False)
    _rates: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed}/faults")
        self._crash = self._random.choice((0.0, 0.0, 0.002, 0.02))
        self._pause = self._random.choice((0.0, 0.0, 0.003))
        self._outage = self._random.choice((0.0, 0.0, 0.003))
        self._kinds = self._random.choice((("fail", "late", "twice"), ("late",), ("twice",), ("fail", "late")))
        self._unlike = self._random.random() < UNLIKE

    def at(self, world: "World", node: Node, name: str, when: When) -> Fault | None:
        if world.healed:
            return None
        rated = f"{name}/{node.process}" if self._unlike else name
        if rated not in self._rates:
            self._rates[rated] = random.Random(f"{self.seed}/{rated}").choice((0.0, 0.0, 0.02, 0.1, 0.4))
        drawn = self._random.random()
        if drawn < self._crash:
            return "crash"
        if drawn > 1 - self._pause:
            return "pause"
        if self._random.random() < self._outage:
            of = node.process if self._random.random() < UNLIKE else ""
            world.take_away(self._random.choice(SERVERS), of, seconds=self._random.uniform(0.1, 15.0))
        if drawn > self._crash + self._rates[rated]:
            return None
        return self._random.choice(self._kinds) if name == "log.append" and when == "before" else "fail"


@dataclass
class Broker:
    """One partition of the log, who waits for its next record, and what lands just after one of the next ones: after
    how many, and what."""

    partition: int
    records: list[StoredRecord] = field(default_factory=list)
    arrivals: dict[asyncio.Future[None], None] = field(default_factory=dict)
    stragglers: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return len(self.records)

    def land(self, records: list[NewRecord], now_ms: int) -> int:
        """What the broker does with a record batch; the offset of its first record."""
        first = self.end
        self.records += [
            StoredRecord(self.partition, first + index, now_ms, record.key, record.value, record.headers)
            for index, record in enumerate(records)
        ]
        for arrival in self.arrivals:
            if not arrival.done():
                arrival.set_result(None)
        self.arrivals.clear()
        return first

    def due(self) -> list[Callable[[], None]]:
        """What lands now that something else did."""
        due = [land for after, land in self.stragglers if after == 1]
        self.stragglers = [(after - 1, land) for after, land in self.stragglers if after > 1]
        return due


class World:
    """See the module's text. `passed` names the processes that came by a point, in order; `crashes`, `failures` and
    `paused` are what was done to them."""

    def __init__(self, *, seed: str, plan: Plan, folder: Path, partitions: int, steps_max: int = 150_000) -> None:
        self.seed = seed
        self.plan = plan
        self.folder = folder
        self.loop = SimulatedLoop(seed=seed, steps_max=steps_max)
        self.delays = random.Random(f"{seed}/delays")
        self.choices = random.Random(f"{seed}/choices")
        self._ids = random.Random(f"{seed}/ids")
        self.brokers = [Broker(number) for number in range(partitions)]
        self.generations = {"gen_1": Tables()}
        self.live = "gen_1"
        self.positions_held: tuple[Node, float] | None = None
        self.rebuilder: Node | None = None
        self.locks: dict[int, tuple[Node, float]] = {}
        self.identity = LogIdentity("", {})
        self.mended = False
        self.healed = False
        self.passed: list[str] = []
        self.crashes: list[tuple[str, str]] = []
        self.failures = 0
        self.paused = 0
        self.trace: list[tuple[float, str, str, str]] = []
        self.violations: list[str] = []
        self.on_death: dict[Node, Callable[[], None]] = {}
        self.away_until_s: dict[tuple[str, str], float] = {}
        """By server and process; all processes where that is empty."""

    @property
    def log_id(self) -> str:
        return self.identity.log_id

    @property
    def tables(self) -> Tables:
        """The read models that are live."""
        return self.generations[self.live]

    def lane_of_rows(self, partition: int) -> Lane:
        """Where these stand; a lane nobody projected yet begins at 0."""
        return self.tables.lanes.setdefault(partition, Lane(partition, self.log_id))

    @property
    def records(self) -> list[StoredRecord]:
        """All there are, partition after partition."""
        return [record for broker in self.brokers for record in broker.records]

    # Time and chance

    def time_ns(self) -> int:
        return int((EPOCH_S + self.loop.now_s) * 1_000_000_000)

    def now_ms(self) -> int:
        return self.time_ns() // 1_000_000

    def time(self) -> float:
        return self.time_ns() / 1e9

    def token(self, size: int) -> str:
        return self.random_bytes(size).hex()

    def random_bytes(self, size: int) -> bytes:
        return self._ids.randbytes(size)

    def tell(self, what: str, details: object = "") -> None:
        self.trace.append((round(self.loop.now_s, 6), NODE.get().name, what, str(details)))

    # Where things fail

    def calling(self, name: str, lost: type[Exception], unknown: type[Exception] | None = None) -> "Call":
        """A call through a port: `lost` is raised where it fails before, `unknown` where it fails after."""
        return Call(self, name, lost, unknown or lost)

    async def reach(self, name: str, when: When, error: type[Exception]) -> Fault | None:
        """Come by a point: wait a little, then fail, die, or go on; returns what the caller is to bring about."""
        node = NODE.get()
        fault = self._fault(node, name, when)
        delay_s = self._delay_s() if when == "before" or self.delays.random() < 0.3 else None
        if delay_s is not None and fault != "crash":  # who dies here does so, though the call be given up
            await asyncio.sleep(delay_s)
        if fault is None:
            return None
        self.tell(f"{fault} {when} {name}")
        if fault == "crash":
            await self.die(f"{when} {name}")
        if fault == "away":
            raise error(f"{name}: {SERVER_OF[name.partition('.')[0]]} is away")
        self.failures += 1
        if fault == "pause":
            await self._pause(node)
        if fault == "fail":
            raise error(f"{name} failed {when}, on purpose")
        return fault

    def take_away(self, server: str, process: str = "", *, seconds: float) -> None:
        """For so long, calls to a server fail: those of one process, or everybody's."""
        assert server in SERVERS, f"{server} is none of {SERVERS}"
        self.tell("away", f"{server} {process}")
        self.away_until_s[server, process] = self.loop.now_s + seconds

    def _is_away(self, node: Node, name: str) -> bool:
        server = SERVER_OF[name.partition(".")[0]]
        until_s = max(self.away_until_s.get((server, process), 0.0) for process in ("", node.process))
        return not self.healed and self.loop.now_s < until_s

    def pause(self, node: Node, *, seconds: float) -> None:
        """SIGSTOP, and SIGCONT some seconds later."""
        self.tell("pause", f"{node.name} for {seconds:.1f} s")
        self.paused += 1
        self.loop.pause(node)
        self.loop.call_later(seconds, self.loop.resume, node, context=contextvars.Context())

    async def _pause(self, node: Node) -> None:
        self.pause(node, seconds=self.delays.uniform(0.5, 8.0))
        await asyncio.sleep(0)

    def in_flight(self, name: str) -> bool:
        """Come by the point in the middle of a call: whether its sender dies there, what it sent being under way."""
        return self._fault(NODE.get(), name, "during") == "crash"

    def _fault(self, node: Node, name: str, when: When) -> Fault | None:
        if node is ROOT:
            return None
        if name not in UNCOUNTED:
            self.passed.append(node.process)
        elif isinstance(self.plan, CrashAt):
            return "away" if self._is_away(node, name) else None
        return self.plan.at(self, node, name, when) or ("away" if self._is_away(node, name) else None)

    def _delay_s(self) -> float:
        drawn = self.delays.random()
        if self.healed or drawn < 0.9:
            return 0.0002 + drawn * 0.003
        return 0.01 + (drawn - 0.9) * (20.0 if drawn > 0.995 and not isinstance(self.plan, CrashAt) else 0.5)

    async def die(self, where: str) -> NoReturn:
        """The process that runs this ends here, by SIGKILL."""
        self.crash(NODE.get(), where)
        await self.loop.create_future()
        raise AssertionError("the dead do not go on")

    def crash(self, node: Node, where: str) -> None:
        """SIGKILL of a process: its connections are gone, what it sent is not."""
        if node.dead:
            return
        self.tell("crash", f"{node.name} {where}")
        self.crashes.append((node.name, where))
        self.loop.kill(node)
        self.on_death.pop(node)()


class Call:
    """`async with` around what a port does."""

    __slots__ = ("_error", "_name", "_unknown", "_world", "fault")

    def __init__(self, world: World, name: str, error: type[Exception], unknown: type[Exception]) -> None:
        self._world = world
        self._name = name
        self._error = error
        self._unknown = unknown
        self.fault: Fault | None = None

    async def __aenter__(self) -> Self:
        self.fault = await self._world.reach(self._name, "before", self._error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        if kind is None:
            await self._world.reach(self._name, "after", self._unknown)
