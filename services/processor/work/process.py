"""The warm child process as the lane sees it: give it a file, get the result or a WorkError, never a hang or a crash.

One child works, a second one stands by warm. Whatever goes wrong inside (a segfault, an endless loop, memory run out)
ends that child by SIGKILL and costs the file in work one attempt; the next file goes to the spare within milliseconds.
One file at a time: the lane is sequential. What runs inside is `child`, this side's end of it `warm_child`, the way
they talk `frames`.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, TypeVar

from schemas.errors import WorkCode
from schemas.text import RESULT_BYTES_MAX, json_bytes, storable_json
from services.observability import logger
from services.processor.work.port import Job, WorkCancelled, WorkError, WorkerUnavailable
from services.processor.work.registry import installed_handlers
from services.processor.work.warm_child import ChildDiedError, OnProgress, WarmChild

MEMORY_BYTES_MAX: Final = 1 << 30
FILES_PER_PROCESS_MAX: Final = 1_000
START_TIMEOUT_S: Final = 30.0
_STARTS_MAX: Final = 3
_WORK_CODES: Final = frozenset(str(code) for code in WorkCode)

_log = logger("work")

_Value = TypeVar("_Value")


class WorkerProcess:
    """Works files in a child process: `start`, then `run` one after the other, `stop` at the end.

    `content_types` and `degraded` are known after `start`: what can be worked, and one sentence for each handler that
    is not running. `memory_bytes_max` is what one child may take beside what it holds when warm (0: no limit).
    """

    def __init__(
        self,
        *,
        handlers: Mapping[str, str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        memory_bytes_max: int = MEMORY_BYTES_MAX,
        files_per_process_max: int = FILES_PER_PROCESS_MAX,
    ) -> None:
        self.content_types: frozenset[str] = frozenset()
        self.degraded: tuple[str, ...] = ()
        self._start_message: dict[str, Any] = {
            "parent_pid": os.getpid(),
            "handlers": dict(installed_handlers() if handlers is None else handlers),
            "options": dict(options or {}),
            "memory_bytes_max": memory_bytes_max,
        }
        self._files_per_process_max = files_per_process_max
        self._current: asyncio.Task[WarmChild] | None = None
        self._spare: asyncio.Task[WarmChild] | None = None
        self._cancelling: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Warms the first child up and begins with the spare; raises WorkerUnavailable."""
        self._current = self._spawn()
        try:
            child = await self._warm_child()
        except BaseException:
            await self.stop()
            raise
        ready, failures = child.capabilities()
        self.content_types = frozenset(content_type for types in ready.values() for content_type in types)
        self.degraded = tuple(f"the handler {name!r} is not running: {why}" for name, why in sorted(failures.items()))
        self._spare = self._spawn()

    async def warm(self) -> None:
        """Returns when there is a warm child again; raises WorkerUnavailable."""
        await self._warm_child()

    async def run(self, job: Job, *, on_progress: OnProgress, timeout_s: float) -> dict[str, Any]:
        """The contract's result of one file. `on_progress` is called with (stage, percent) as the work reports them.

        Raises WorkError (the file failed; `final` says whether a second try makes sense), WorkCancelled (by `cancel` or
        `stop`), WorkerUnavailable (no child can be started; the file is unharmed).
        """
        assert self._cancelling is None, "the worker works one file at a time"
        self._cancelling = asyncio.get_running_loop().create_future()
        self._idle.clear()
        try:
            child = await self._warm_child()
            try:
                result = _result(await self._answer_to(child, job, on_progress=on_progress, timeout_s=timeout_s))
            except BaseException as error:
                await self._give_up(child, why=error)
                raise
            self._recycle(child)
        finally:
            self._cancelling = None
            self._idle.set()
        return result

    async def cancel(self) -> None:
        """Kills the file in work, if there is one, and returns when that is done; its `run` raises WorkCancelled."""
        if self._cancelling is not None and not self._cancelling.done():
            self._cancelling.set_result(None)
        await self._idle.wait()

    async def stop(self) -> None:
        """Ends the children; a file in work is cancelled. Stopping twice is fine."""
        await self.cancel()
        standing = [task for task in (self._current, self._spare) if task is not None]
        self._current = self._spare = None
        for task in standing:
            task.cancel()  # where it is still warming up; a warm one stays what it is
        children = await asyncio.gather(*standing, return_exceptions=True)
        await asyncio.gather(*(child.end() for child in children if isinstance(child, WarmChild)), *self._retiring)

    async def _warm_child(self) -> WarmChild:
        """The child to work with, warm; where one cannot be started, another is tried, a few times."""
        for _ in range(_STARTS_MAX):
            assert self._current is not None, "the worker is not started, or stopped"
            try:
                child = await self._until(self._current, START_TIMEOUT_S)
            except ChildDiedError as death:
                reason = str(death)
            except WorkError:
                reason = f"it was not ready within {START_TIMEOUT_S:g} s"
                self._current.cancel()
            except OSError as error:
                reason = f"it could not be started: {error}"
            else:
                if not child.is_gone:
                    return child
                reason = child.epitaph()
            _log.warning("worker_child_not_ready", reason=reason)
            self._promote_spare()
        raise WorkerUnavailable(f"No child process can be had for the work on files: {reason}.")

    async def _answer_to(
        self, child: WarmChild, job: Job, *, on_progress: OnProgress, timeout_s: float
    ) -> dict[str, Any]:
        try:
            return await self._until(child.ask(_command(job, timeout_s), on_progress), timeout_s)
        except ChildDiedError as death:
            raise WorkError(death.code, f"The process that worked on the file did not survive it: {death}.") from death

    async def _until(self, awaited: asyncio.Future[_Value], timeout_s: float) -> _Value:
        """What comes of it, unless the time is up (WorkError) or the file is cancelled (WorkCancelled) before."""
        waited: set[asyncio.Future[Any]] = {awaited} if self._cancelling is None else {awaited, self._cancelling}
        done, _ = await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if awaited in done:
            return awaited.result()
        if done:
            raise WorkCancelled
        raise WorkError(WorkCode.WORK_TIMEOUT, f"The work took longer than {timeout_s:g} seconds and was stopped.")

    async def _give_up(self, child: WarmChild, *, why: BaseException) -> None:
        """Puts the spare in the child's place; returns when nothing of the child is left that could still write."""
        if isinstance(why, WorkError) and child.answered and why.code is not WorkCode.OUT_OF_MEMORY:
            self._recycle(child)  # it said itself what is wrong with the file, and is as good as before
            return
        self._promote_spare()
        await child.kill()
        if not isinstance(why, WorkCancelled):
            _log.warning("worker_child_replaced", why=str(why) or type(why).__name__)
            _log.debug("worker_child_stderr", stderr=child.stderr_tail())

    def _recycle(self, child: WarmChild) -> None:
        """After so many files a fresh process takes over, so that what leaks in decoders stays small."""
        child.files += 1
        if child.files >= self._files_per_process_max:
            self._promote_spare()
            retiring = asyncio.create_task(child.end())
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    def _promote_spare(self) -> None:
        self._current, self._spare = self._spare or self._spawn(), self._spawn()

    def _spawn(self) -> asyncio.Task[WarmChild]:
        task = asyncio.create_task(WarmChild.spawn(self._start_message))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is asked when it is needed
        return task


def _command(job: Job, timeout_s: float) -> dict[str, Any]:
    plain = {field.name: getattr(job, field.name) for field in fields(job)}
    return {
        "job": {**plain, "path": str(job.path), "thumbnail_path": str(job.thumbnail_path)},
        "timeout_s": timeout_s,
    }


def _result(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The result the child answered with, or its error raised. What comes from there is checked like any input."""
    if "error" in answer:
        error = answer["error"]
        code = WorkCode(error["code"]) if error["code"] in _WORK_CODES else WorkCode.INTERNAL_ERROR
        raise WorkError(code, error["message"], final=bool(error["final"]))
    result = answer.get("result")
    if not isinstance(result, dict):
        raise WorkError(WorkCode.INTERNAL_ERROR, "The work ended without a result.")
    try:
        storable_json(result)
    except ValueError as error:
        raise WorkError(WorkCode.INTERNAL_ERROR, f"The work's result {error}.") from error
    if (size_bytes := json_bytes(result)) > RESULT_BYTES_MAX:
        raise WorkError(
            WorkCode.INTERNAL_ERROR, f"The work's result takes {size_bytes} bytes, {RESULT_BYTES_MAX} are allowed."
        )
    return result
