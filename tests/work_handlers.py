"""Handlers for tests of the child process: the file says, in a word, how its work is to go wrong."""

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from schemas.errors import WorkCode
from services.processor.work.port import Job, Progress, WorkError

CONTENT_TYPE = "test/word"


class WordHandler:
    """Does what the word in the file says; its results always name the process and what it was warmed up with."""

    content_types = frozenset({CONTENT_TYPE})
    options: Mapping[str, Any] = {}

    def warm_up(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def work(self, job: Job, progress: Progress) -> dict[str, Any]:
        progress("started", 1)
        word, _, argument = job.path.read_text().partition(" ")
        return {"pid": os.getpid(), "options": dict(self.options), **WORDS[word](argument, progress)}


class BrokenHandler:
    content_types = frozenset({"test/broken"})

    def warm_up(self, _options: Mapping[str, Any]) -> None:
        raise RuntimeError("the model file is missing")


class DeadlyHandler:
    content_types = frozenset({"test/deadly"})

    def warm_up(self, _options: Mapping[str, Any]) -> None:
        os._exit(3)


class EndlessHandler:
    content_types = frozenset({"test/endless"})

    def warm_up(self, _options: Mapping[str, Any]) -> None:
        time.sleep(600)


def _sleep_for_ever(_argument: str, _progress: Progress) -> dict[str, Any]:
    while True:
        time.sleep(60)


def _spin_for_ever(_argument: str, _progress: Progress) -> dict[str, Any]:
    while True:
        pass


def _die_by(argument: str, _progress: Progress) -> dict[str, Any]:
    if argument == "SEGV":
        ctypes.string_at(0)
    if argument == "exit":
        os._exit(7)
    if argument == "bad_alloc":
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()
    os.kill(os.getpid(), signal.Signals[f"SIG{argument}"])
    time.sleep(60)
    return {}


def _take(argument: str, _progress: Progress) -> dict[str, Any]:
    megabytes = int(argument)
    taken = bytearray(megabytes << 20)
    return {"taken": len(taken)}


def _map(argument: str, _progress: Progress) -> dict[str, Any]:
    try:
        mmap.mmap(-1, int(argument) << 20).close()
    except OSError as error:
        raise MemoryError from error
    return {}


def _say(argument: str, progress: Progress) -> dict[str, Any]:
    print("on standard output, where the answers go", flush=True)  # noqa: T201  # decoders do such things
    os.write(1, b"\0\0\0\5hello" * 100)
    os.write(2, b"noise " * 50_000)
    progress("said", 50)
    return {"said": argument, "input": sys.stdin.read()}


def _step(_argument: str, progress: Progress) -> dict[str, Any]:
    for percent in (10, 40, 30, 40, 90, 250):
        progress("stepping", percent)
    return {}


def _fail(argument: str, _progress: Progress) -> dict[str, Any]:
    if argument == "final":
        raise WorkError(WorkCode.CORRUPT_MEDIA, "not\0 a \ud800 film" + "!" * 2_000, final=True)
    if argument == "oddly":
        raise WorkError("no_such_code", "an invention")  # type: ignore[arg-type]  # as a plug-in without types may
    raise KeyError(argument)


def _return(argument: str, _progress: Progress) -> dict[str, Any]:
    return {"nan": {"x": float("nan")}, "nul": {"x": "a\0b"}, "huge": {"x": "y" * 40_000}, "set": {"x": {1}}}[argument]


def _environment(_argument: str, _progress: Progress) -> dict[str, Any]:
    return {"names": sorted(os.environ), "descriptors": sorted(path.name for path in Path("/proc/self/fd").iterdir())}


def _endure(_argument: str, _progress: Progress) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return {"endured": True}


WORDS: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "hello": lambda argument, _progress: {"hello": argument},
    "sleep": _sleep_for_ever,
    "spin": _spin_for_ever,
    "die": _die_by,
    "take": _take,
    "map": _map,
    "say": _say,
    "step": _step,
    "fail": _fail,
    "return": _return,
    "environment": _environment,
    "endure": _endure,
}

handler = WordHandler()
broken = BrokenHandler()
deadly = DeadlyHandler()
endless = EndlessHandler()
