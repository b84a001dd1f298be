"""The child process: imports the handlers, warms them up, limits itself, then works one file after the other.

Started as `python -m services.processor.work.child` by `process`, which talks to it in frames over its standard input
and output. Those are taken away before anything else is imported, so that a decoder that prints cannot garble them.
It never outlives its parent: it ends when its input ends, is killed by the kernel when the parent dies, and by an alarm
when a file takes longer than the parent would have waited.
"""

import ctypes
import importlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import WorkCode
from services.processor.work import frames
from services.processor.work.port import Handler, Job, Progress, WorkError

_PR_SET_PDEATHSIG = 1
_ALARM_GRACE_S = 5


def main() -> None:
    commands, answers = _take_over_pipes()
    start = frames.read(commands)
    if start is None:
        return
    _tie_to_parent(start["parent_pid"])
    handlers, failures = load_handlers(start["handlers"], start["options"])
    limit_memory(start["memory_bytes_max"])
    ready = {name: sorted(handler.content_types) for name, handler in handlers.items()}
    frames.write(answers, frames.encode({"ready": ready, "failures": failures}))
    by_type = {content_type: handler for handler in handlers.values() for content_type in handler.content_types}
    while (command := frames.read(commands)) is not None:
        signal.alarm(int(command["timeout_s"]) + _ALARM_GRACE_S)
        frames.write(answers, answer(by_type, command["job"], progress_to(answers)))
        signal.alarm(0)


def load_handlers(
    references: Mapping[str, str], options: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Handler], dict[str, str]]:
    """Handlers by name, and why the others could not be had; one that is broken costs only itself."""
    handlers: dict[str, Handler] = {}
    failures: dict[str, str] = {}
    for name, reference in references.items():
        try:
            module, _, attribute = reference.partition(":")
            handler: Handler = getattr(importlib.import_module(module), attribute)
            handler.warm_up(options.get(name, {}))
            handlers[name] = handler
        except Exception as error:  # noqa: BLE001  # whatever a plug-in does wrong, the others work
            failures[name] = f"{type(error).__name__}: {error}"
    return handlers, failures


def limit_memory(bytes_max: int) -> None:
    """Lets the process grow by so much over what it holds now; 0 sets no limit, as do systems without /proc."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statistics = Path("/proc/self/statm")
    if bytes_max and statistics.exists():
        held_bytes = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held_bytes + bytes_max, held_bytes + bytes_max))


def answer(by_type: Mapping[str, Handler], raw: Mapping[str, Any], progress: Progress) -> bytes:
    """The frame that answers a job: its result, or the error it ended with."""
    job = Job(**{**raw, "path": Path(raw["path"]), "thumbnail_path": Path(raw["thumbnail_path"])})
    try:
        return frames.encode({"result": _worked(by_type, job, progress)})
    except WorkError as error:
        return _failed(error.code, error.message, final=error.final)
    except MemoryError:
        return _failed(WorkCode.OUT_OF_MEMORY, "The file needs more memory than one file may use.", final=False)
    except Exception as error:  # noqa: BLE001  # a handler's mistake costs one attempt, never the lane
        traceback.print_exc()
        return _failed(
            WorkCode.INTERNAL_ERROR, f"The work stumbled over its own mistake: {type(error).__name__}.", final=False
        )


def progress_to(answers: int) -> Progress:
    """Sends each stage and percentage once, and none that would go back."""
    furthest = ("", -1)

    def send(stage: str, percent: int) -> None:
        nonlocal furthest
        percent = min(100, max(furthest[1], percent))
        if (stage, percent) != furthest:
            furthest = (stage, percent)
            frames.write(answers, frames.encode({"progress": [stage, percent]}))

    return send


def _worked(by_type: Mapping[str, Handler], job: Job, progress: Progress) -> dict[str, Any]:
    handler = by_type.get(job.content_type)
    if handler is None:
        raise WorkError(WorkCode.INTERNAL_ERROR, f"No handler for {job.content_type} is running here.")
    try:
        size_bytes = job.path.stat().st_size
    except FileNotFoundError as error:
        raise WorkError(WorkCode.BLOB_MISSING, "The file's bytes are not in the blob store any more.") from error
    if size_bytes != job.size_bytes:
        raise WorkError(
            WorkCode.BLOB_MISSING, f"The blob store holds {size_bytes} of the file's {job.size_bytes} bytes."
        )
    return handler.work(job, progress)


def _failed(code: WorkCode, message: str, *, final: bool) -> bytes:
    return frames.encode({"error": {"code": str(code), "message": message, "final": final}})


def _take_over_pipes() -> tuple[int, int]:
    """Private copies of standard input and output; the names themselves now lead to nothing and to standard error."""
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return commands, answers


def _tie_to_parent(parent_pid: int) -> None:
    """Dies with the parent, and by nothing else that is meant for it: Ctrl-C and SIGTERM reach the whole group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before we asked
        sys.exit(0)


if __name__ == "__main__":
    main()
