"""Have the jars of Kafka on this machine: fetched once, checked, and used by every later start without a network.

They live in one folder of the user's cache (`SLUICE_CACHE_DIR`, else `$XDG_CACHE_HOME/sluice`, else `~/.cache/sluice`).
Invariants: the folder carries its final name only when every jar in it has the size and SHA-256 of `locked.py`; an
interrupted fetch goes on where it stopped; of several processes that need the jars at once, one fetches.
What is done with the jars: `kafka.py`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.embedded.errors import EmbeddedError
from services.embedded.folders import LOCK_POLL_S, make_folder, try_lock
from services.embedded.locked import COORDINATES, KAFKA_VERSION, LOCKED

if TYPE_CHECKING:
    from jgo.maven import MavenContext

DOWNLOADS_AT_ONCE = 4
NETWORK_TIMEOUT_S = 30
GIVEN_UP = "the fetch of Kafka was given up; the next start goes on with it."


@dataclass(frozen=True, slots=True)
class Jar:
    coordinate: str  # group:artifact:version
    size_bytes: int
    sha256: str

    @property
    def filename(self) -> str:
        _, artifact, version = self.coordinate.split(":")
        return f"{artifact}-{version}.jar"


@functools.cache
def locked_jars() -> tuple[Jar, ...]:
    rows = (line.split() for line in LOCKED.strip().splitlines())
    return tuple(Jar(coordinate, int(size), sha256) for coordinate, size, sha256 in rows)


def default_cache_dir() -> Path:
    if named := os.environ.get("SLUICE_CACHE_DIR"):
        return Path(named)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "sluice"
    try:
        return Path("~/.cache/sluice").expanduser()
    except RuntimeError as error:
        raise EmbeddedError(
            "you have no home folder to keep Kafka's jars in: name a folder in SLUICE_CACHE_DIR."
        ) from error


async def ensure_jars(cache_dir: Path, log: Callable[[str], None]) -> Path:
    """The folder with every jar, fetched if need be (seconds, 45 MB). Raises EmbeddedError."""
    folder = cache_dir / f"kafka-{KAFKA_VERSION}"
    if not is_complete(folder):
        make_folder(cache_dir, purpose="the cache of Kafka's jars (another one: SLUICE_CACHE_DIR)")
        given_up = threading.Event()
        try:
            await asyncio.to_thread(ensure_complete, folder, log, given_up)
        except asyncio.CancelledError:
            given_up.set()  # the thread ends with the jars that are on their way
            raise
    return folder


def ensure_complete(folder: Path, log: Callable[[str], None], given_up: threading.Event) -> None:
    with one_at_a_time(folder.with_name("fetch.lock"), log, given_up):
        if not is_complete(folder):
            fetch_all(folder, log, given_up)


def classpath(folder: Path) -> str:
    """In a fixed order, since a class archive is valid for the class path it was made from only."""
    return os.pathsep.join(str(folder / jar.filename) for jar in locked_jars())


def is_complete(folder: Path) -> bool:
    return all(_has_size(folder / jar.filename, jar.size_bytes) for jar in locked_jars())


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except OSError:
        return False


@contextmanager
def one_at_a_time(lock_file: Path, log: Callable[[str], None], given_up: threading.Event) -> Iterator[None]:
    with lock_file.open("w") as handle:
        if not try_lock(handle.fileno()):
            log("another process is fetching Kafka; waiting for it")
            while not try_lock(handle.fileno()):
                if given_up.wait(LOCK_POLL_S):
                    raise EmbeddedError(GIVEN_UP)
        yield


def fetch_all(folder: Path, log: Callable[[str], None], given_up: threading.Event) -> None:
    """Fetch into a folder beside `folder`, several at once, and give it its name when all is there and right."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    missing = [jar for jar in locked_jars() if not _is_right(partial / jar.filename, jar)]
    total_mb = sum(jar.size_bytes for jar in missing) / 1e6
    log(f"fetching Kafka {KAFKA_VERSION} from Maven Central, once: {len(missing)} jars, {total_mb:.0f} MB")
    maven = maven_central(partial / "maven")
    with ThreadPoolExecutor(max_workers=DOWNLOADS_AT_ONCE, thread_name_prefix="fetch-kafka") as downloads:
        pending = [downloads.submit(fetch_one, maven, jar, partial / jar.filename) for jar in missing]
        try:
            report_progress(as_completed(pending), total_mb, log, given_up)
        except BaseException:
            downloads.shutdown(wait=True, cancel_futures=True)
            raise
    shutil.rmtree(partial / "maven", ignore_errors=True)
    if folder.exists():  # incomplete, or we would not be here: a jar was removed or cut
        for jar in locked_jars():
            (partial / jar.filename).replace(folder / jar.filename)
    else:
        partial.rename(folder)


def report_progress(
    finished: Iterator[Future[Jar]], total_mb: float, log: Callable[[str], None], given_up: threading.Event
) -> None:
    done_mb, told = 0.0, 0
    for future in finished:
        if given_up.is_set():
            raise EmbeddedError(GIVEN_UP)
        done_mb += future.result().size_bytes / 1e6
        if (quarters := int(4 * done_mb / total_mb)) > told:
            told = quarters
            log(f"fetching Kafka: {done_mb:.0f} of {total_mb:.0f} MB")


def maven_central(repository: Path) -> MavenContext:
    """The view that jgo has of Maven Central, or of the mirrors that the user's jgo configuration names."""
    from jgo.config import GlobalSettings  # noqa: PLC0415  # most of a second, and needed for the first start only
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415
    from jgo.maven import MavenContext  # noqa: PLC0415

    remote = GlobalSettings.load().repositories | {"central": MAVEN_CENTRAL_URL}
    return MavenContext(repo_cache=repository, local_repos=[], remote_repos=remote, timeout=NETWORK_TIMEOUT_S)


def fetch_one(maven: MavenContext, jar: Jar, destination: Path) -> Jar:
    """Fetch, compare, and only then give the jar its place. Raises EmbeddedError."""
    group, artifact, version = jar.coordinate.split(":")
    fetched = maven.project(group, artifact).at_version(version).artifact()
    assert fetched.cached_path is not None
    fetched.cached_path.unlink(missing_ok=True)  # what an interrupted fetch left would be taken as it is
    try:
        path = fetched.resolve()
    except Exception as error:  # jgo raises what requests raises, RuntimeError and OSError
        raise EmbeddedError(
            f"Kafka's {jar.filename} could not be fetched from Maven Central ({innermost(error)}). The first start "
            f"needs the network: look at the connection (a proxy is taken from HTTPS_PROXY), then start again, and it "
            f"goes on where it stopped. Or use a Kafka of your own: SLUICE_KAFKA_BOOTSTRAP_SERVERS=host:port."
        ) from error
    if not _is_right(path, jar):
        path.unlink()
        raise EmbeddedError(
            f"what was fetched as {jar.coordinate} is not the jar that Sluice was built with (its SHA-256 is not "
            f"{jar.sha256}), and was not kept. Something between here and Maven Central changes what is downloaded: "
            f"start again from another network, or without the proxy."
        )
    path.replace(destination)
    return jar


def innermost(error: BaseException) -> BaseException:
    """What happened at the bottom, as "Connection refused": HTTP clients wrap it in sentences about their pools."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _is_right(path: Path, jar: Jar) -> bool:
    if not _has_size(path, jar.size_bytes):
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == jar.sha256


def resolve_anew() -> Iterator[Jar]:
    """What `COORDINATES` stand for today, with everything they depend on."""
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        maven = maven_central(Path(scratch))
        named, transitive = maven.resolver.resolve([maven.create_dependency(each) for each in COORDINATES])
        for dependency in [*named, *(each for each in transitive if each.scope in {"compile", "runtime"})]:
            artifact = dependency.artifact
            content = artifact.resolve().read_bytes()
            coordinate = f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}"
            yield Jar(coordinate, len(content), hashlib.sha256(content).hexdigest())


if __name__ == "__main__":
    for found in resolve_anew():
        sys.stdout.write(f"{found.coordinate} {found.size_bytes} {found.sha256}\n")
