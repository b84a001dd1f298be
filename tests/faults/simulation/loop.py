"""The event loop of the simulation: no selector, no threads, no real time.

Each simulated process is a `Node` with a queue of its own, first in first out as asyncio promises; the seed decides
which node's next callback runs. When none is ready, the clock jumps to the next timer. A node can be killed (its
callbacks never run again, its tasks simply stop being) and paused (they wait, while time goes on).
"""

import asyncio
import contextlib
import contextvars
import heapq
import random
import sys
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TICK_S = 2e-6
"""How long a callback takes: something, so that nothing spins in no time."""


_CLOSES_MAX = 30


class Stuck(Exception):  # noqa: N818  # named for what it says
    """The simulation cannot go on, or does not come to an end."""


class Node:
    """One process, from its start to its end."""

    __slots__ = ("dead", "name", "paused", "ready")

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.paused = False
        self.ready: deque[asyncio.Handle] = deque()

    @property
    def process(self) -> str:
        """Whose life it is: the same for all lives of a process."""
        return self.name.partition(".")[0]

    def __repr__(self) -> str:
        return self.name


ROOT = Node("world")
NODE: contextvars.ContextVar[Node] = contextvars.ContextVar("node", default=ROOT)


class SimulatedLoop(asyncio.BaseEventLoop):
    """See the module's text. `complaints` collects what asyncio's exception handler is told."""

    def __init__(self, *, seed: str, steps_max: int) -> None:
        super().__init__()
        self.now_s = 1_000.0
        self.steps = 0
        self.complaints: list[str] = []
        self.root = Node("world")
        self._steps_max = steps_max
        self._random = random.Random(f"{seed}/turns").random
        self._runnable: list[Node] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_made = 0
        self._tasks: list[asyncio.Task[Any]] = []

    # What asyncio asks of a loop

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._queue(handle)
        return handle

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def create_task(self, coro: Any, *, name: Any = None, context: contextvars.Context | None = None) -> Any:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # a killed process does not end its tasks
        self._tasks.append(task)
        if len(self._tasks) > 1_000:
            self._tasks = [each for each in self._tasks if not each.done()]
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if "never retrieved" not in context["message"]:  # said whenever memory is cleared, so at no time in particular
            self.complaints.append(f"{context['message']}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        """It is dropped when its time comes."""

    def _queue(self, handle: asyncio.Handle) -> None:
        node = handle._context.get(NODE, ROOT)  # type: ignore[attr-defined]
        if node is ROOT:
            node = self.root
        if node.dead:
            return
        if not node.ready and not node.paused:
            self._runnable.append(node)
        node.ready.append(handle)

    # Running

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run until `main` ends; raises Stuck where nothing is left that could happen, or far too much happens."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._step()
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def _step(self) -> None:
        timers, runnable = self._timers, self._runnable
        while timers and (timers[0][0] <= self.now_s or not runnable):
            when, _, timer = heapq.heappop(timers)
            if not timer._cancelled:
                self.now_s = max(self.now_s, when)
                self._queue(timer)
        if not runnable:
            raise Stuck("nothing is left that could happen")
        index = 0 if len(runnable) == 1 else int(self._random() * len(runnable))
        node = runnable[index]
        handle = node.ready.popleft()
        if not node.ready:
            runnable[index] = runnable[-1]
            runnable.pop()
        if not handle._cancelled:  # type: ignore[attr-defined]
            handle._run()
        self.now_s += TICK_S
        self.steps += 1
        if self.steps > self._steps_max:
            raise Stuck(f"after {self.steps} callbacks, at {self.now_s:.1f} s, it has not come to rest")

    # Nodes

    def spawn(self, node: Node, coro: Coroutine[Any, Any, T], *, name: str) -> "asyncio.Task[T]":
        """A task of this node."""
        context = contextvars.copy_context()
        context.run(NODE.set, node)
        task: asyncio.Task[T] = self.create_task(coro, name=name, context=context)
        return task

    def kill(self, node: Node) -> None:
        """SIGKILL: nothing of this node runs again, no `finally` either."""
        node.dead = True
        node.ready.clear()
        self._not_runnable(node)

    def pause(self, node: Node) -> None:
        """SIGSTOP."""
        node.paused = True
        self._not_runnable(node)

    def resume(self, node: Node) -> None:
        """SIGCONT."""
        if node.paused and not node.dead:
            node.paused = False
            if node.ready:
                self._runnable.append(node)

    def _not_runnable(self, node: Node) -> None:
        with contextlib.suppress(ValueError):
            self._runnable.remove(node)

    def dispose(self) -> None:
        """Close what is still suspended, so that nothing of it is left to be told about later."""
        told, sys.unraisablehook = sys.unraisablehook, lambda _: None  # whatever the dying say, nobody listens
        try:
            for task in self._tasks:
                if not task.done():
                    _close(task.get_coro())
            self._tasks.clear()
            self._timers.clear()
            self.close()
        finally:
            sys.unraisablehook = told


def _close(coro: Any) -> None:
    """Close a suspended coroutine and what it awaits, innermost first: an outer one would leave those behind that want
    to wait once more while they end."""
    chain = []
    while hasattr(coro, "close"):
        chain.append(coro)
        coro = getattr(coro, "cr_await", None)
    for each in reversed(chain):
        for _ in range(_CLOSES_MAX):
            try:
                each.close()
            except BaseException:  # noqa: BLE001  # it wants to wait once more: close that too
                continue
            break
