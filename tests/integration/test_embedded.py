"""The embedded Kafka and Postgres: kept data, refusals that can be understood, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import MessageSizeTooLargeError, UnknownTopicOrPartitionError

from services.embedded import EmbeddedError, EmbeddedKafka, EmbeddedPostgres, jars
from services.embedded.folders import free_ports, lock_folder
from services.embedded.locked import KAFKA_VERSION
from services.embedded.process import run_guarded
from services.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from jgo.maven import MavenContext

WITHIN_S = 60.0  # the longest grace of a server, and a busy machine
ROOT = Path(__file__).parents[2]
T = TypeVar("T")

both = pytest.mark.parametrize("server_class", [EmbeddedKafka, EmbeddedPostgres])

PARENT = """
import asyncio, signal, sys
from pathlib import Path
from services.embedded import EmbeddedKafka, EmbeddedPostgres

async def main():
    folder = Path(sys.argv[1])
    async with EmbeddedKafka(data_dir=folder) as kafka, EmbeddedPostgres(data_dir=folder) as postgres:
        print(kafka.pid, postgres.pid, flush=True)
        await asyncio.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
asyncio.run(main())
"""


# What is kept


async def test_records_and_cluster_are_kept_by_a_start_on_another_port(data_dir: Path) -> None:
    async with EmbeddedKafka(data_dir=data_dir) as kafka:
        first_port = kafka.port
        await make_topic(kafka.bootstrap_servers, "kept")
        await produce(kafka.bootstrap_servers, "kept", b"a fact")
        cluster = await cluster_id(kafka.bootstrap_servers)

    async with EmbeddedKafka(data_dir=data_dir) as kafka:
        records = await consume(kafka.bootstrap_servers, "kept")
        assert kafka.port != first_port
        assert await cluster_id(kafka.bootstrap_servers) == cluster

    assert records == [b"a fact"]


async def test_rows_and_password_are_kept_by_a_start_on_another_port(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir=data_dir) as postgres:
        first_url = postgres.url
        await run_sql(first_url, "CREATE TABLE kept AS SELECT 42 AS answer")

    async with EmbeddedPostgres(data_dir=data_dir) as postgres:
        answer = await run_sql(postgres.url, "SELECT answer FROM kept")
        assert postgres.url.rpartition(":")[0] == first_url.rpartition(":")[0]
        assert postgres.url != first_url

    assert answer == 42


async def test_rows_and_records_survive_servers_that_are_killed(data_dir: Path) -> None:
    async with EmbeddedKafka(data_dir=data_dir) as kafka, EmbeddedPostgres(data_dir=data_dir) as postgres:
        await make_topic(kafka.bootstrap_servers, "kept")
        await produce(kafka.bootstrap_servers, "kept", b"a fact")
        await run_sql(postgres.url, "CREATE TABLE kept AS SELECT 42 AS answer")

        for server in (kafka, postgres):
            os.kill(server.pid, signal.SIGKILL)
            assert await within(server.wait()) == 128 + signal.SIGKILL

    async with EmbeddedKafka(data_dir=data_dir) as kafka, EmbeddedPostgres(data_dir=data_dir) as postgres:
        assert await consume(kafka.bootstrap_servers, "kept") == [b"a fact"]
        assert await run_sql(postgres.url, "SELECT answer FROM kept") == 42


async def test_killed_servers_start_again_where_they_were(data_dir: Path) -> None:
    async with EmbeddedKafka(data_dir=data_dir) as kafka, EmbeddedPostgres(data_dir=data_dir) as postgres:
        addresses, pids = (kafka.bootstrap_servers, postgres.url), {kafka.pid, postgres.pid}
        await make_topic(kafka.bootstrap_servers, "kept")
        await produce(kafka.bootstrap_servers, "kept", b"a fact")
        await run_sql(postgres.url, "CREATE TABLE kept AS SELECT 42 AS answer")

        for server in (kafka, postgres):
            os.kill(server.pid, signal.SIGSTOP)  # one that hangs can be killed as well
            os.kill(server.pid, signal.SIGKILL)
            await within(server.wait())
            assert not server.runs
            await server.start_again()
            assert server.runs

        assert (kafka.bootstrap_servers, postgres.url) == addresses
        assert pids.isdisjoint({kafka.pid, postgres.pid})
        assert await consume(kafka.bootstrap_servers, "kept") == [b"a fact"]
        assert await run_sql(postgres.url, "SELECT answer FROM kept") == 42


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a guard adopt what its server leaves behind")
async def test_a_session_that_does_not_see_that_its_postgres_was_killed_is_ended_with_it(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir=data_dir) as postgres:
        session = await asyncpg.connect(postgres.url)
        session_pid = await session.fetchval("SELECT pg_backend_pid()")
        os.kill(session_pid, signal.SIGSTOP)

        os.kill(postgres.pid, signal.SIGKILL)
        assert await within(postgres.wait()) == 128 + signal.SIGKILL

        assert not psutil.pid_exists(session_pid)
        session.terminate()
        await postgres.start_again()
        assert await run_sql(postgres.url, "SELECT 1") == 1


async def test_a_killed_postgres_starts_though_its_number_is_another_process_now(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir=data_dir) as postgres:
        killed = postgres.pid
        os.kill(killed, signal.SIGKILL)
        await within(postgres.wait())
    pgdata = data_dir / "postgres" / "pgdata"
    owner = pgdata.stat().st_uid  # of whose processes alone Postgres takes notice
    another = await asyncio.create_subprocess_exec(
        "cat", stdin=asyncio.subprocess.PIPE, user=None if owner == os.geteuid() else owner
    )
    left_behind = (pgdata / "postmaster.pid").read_text()
    (pgdata / "postmaster.pid").write_text(left_behind.replace(str(killed), str(another.pid), 1))

    async with EmbeddedPostgres(data_dir=data_dir) as postgres:
        assert await run_sql(postgres.url, "SELECT 1") == 1

    await another.communicate(b"")  # its end


# What the servers are like


async def test_a_record_of_the_largest_size_in_the_contract_is_taken(kafka: str, unique: str) -> None:
    await make_topic(kafka, unique)
    record = os.urandom(8 * 1024 * 1024 - 1024)

    await produce(kafka, unique, record)

    assert await consume(kafka, unique) == [record]


@both
async def test_a_folder_may_have_any_letters_in_its_name(server_class: type[EmbeddedServer], data_dir: Path) -> None:
    folder = data_dir / "jürgen's bücher 日本 😀"

    async with server_class(data_dir=folder) as server:
        assert server.folder.is_dir()

    assert os.listdir(data_dir) == [folder.name]  # noqa: PTH208  # names are all that is looked at


async def test_a_comma_in_the_folder_of_kafka_is_refused_by_name(data_dir: Path) -> None:
    with pytest.raises(EmbeddedError, match="comma"):
        await EmbeddedKafka(data_dir=data_dir / "a,b").start()


async def test_no_topic_appears_by_accident(kafka: str, unique: str) -> None:
    async with admin(kafka) as client:
        (described,) = await client.describe_topics([unique])

        assert described["error_code"] == UnknownTopicOrPartitionError.errno
        assert unique not in await client.list_topics()


async def test_postgres_asks_for_the_password(postgres_server: EmbeddedPostgres) -> None:
    scheme, _, address = postgres_server.url.rpartition("@")
    without_password = f"{scheme.rpartition(':')[0]}:guessed@{address}"

    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(without_password)


async def test_variables_meant_for_other_servers_change_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx1k")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGOPTIONS", "--nonsense")
    before = dict(os.environ)

    async with EmbeddedKafka(data_dir=data_dir), EmbeddedPostgres(data_dir=data_dir) as postgres:
        assert await run_sql(postgres.url, "SELECT 1") == 1

    assert dict(os.environ) == before


async def test_properties_of_the_caller_win(data_dir: Path) -> None:
    async with EmbeddedKafka(data_dir=data_dir, properties={"message.max.bytes": "100000"}) as kafka:
        await make_topic(kafka.bootstrap_servers, "small")

        await produce(kafka.bootstrap_servers, "small", os.urandom(90_000))
        with pytest.raises(MessageSizeTooLargeError):
            await produce(kafka.bootstrap_servers, "small", os.urandom(110_000))


# What is refused


@both
async def test_a_taken_port_is_refused_by_number(server_class: type[EmbeddedServer], data_dir: Path) -> None:
    (port,) = free_ports(1)  # one that no client's socket is given before the server has it
    refused = pytest.raises(EmbeddedError, match=f"port {port}, asked for {server_class.name}")
    with socket.create_server(("127.0.0.1", port)), refused:
        await server_class(data_dir=data_dir, port=port).start()

    async with server_class(data_dir=data_dir, port=port) as server:
        assert server.port == port


@both
async def test_a_folder_that_cannot_be_made_is_named(server_class: type[EmbeddedServer], data_dir: Path) -> None:
    in_the_way = data_dir / "data"
    in_the_way.write_text("a file")

    with pytest.raises(EmbeddedError, match=f"{in_the_way}.* cannot be written"):
        await server_class(data_dir=in_the_way).start()


@pytest.fixture
def read_only(data_dir: Path) -> Path:
    data_dir.chmod(0o500)
    return data_dir


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@both
async def test_a_folder_that_is_read_only_is_named(server_class: type[EmbeddedServer], read_only: Path) -> None:
    with pytest.raises(EmbeddedError, match=f"{read_only}.* cannot be written"):
        await server_class(data_dir=read_only).start()


@both
async def test_a_folder_in_use_is_refused_and_its_user_goes_on(
    server_class: type[EmbeddedServer], data_dir: Path
) -> None:
    async with server_class(data_dir=data_dir) as first:
        with pytest.raises(EmbeddedError, match=f"in use by process {os.getpid()}"):
            await server_class(data_dir=data_dir).start()

        assert psutil.pid_exists(first.pid)

    async with server_class(data_dir=data_dir):
        pass


@pytest.mark.parametrize("version", ["3.9.1", "5.0.0", "4.99.0", ""])
async def test_data_of_another_kafka_is_refused(version: str, data_dir: Path) -> None:
    (data_dir / "kafka" / "log").mkdir(parents=True)
    if version:
        (data_dir / "kafka" / "version").write_text(version)

    with pytest.raises(EmbeddedError, match=f"holds the data of Kafka {version or 'unknown'}"):
        await EmbeddedKafka(data_dir=data_dir).start()


async def test_data_of_another_postgres_is_refused(data_dir: Path) -> None:
    (data_dir / "postgres" / "pgdata").mkdir(parents=True)
    (data_dir / "postgres" / "pgdata" / "PG_VERSION").write_text("16\n")

    with pytest.raises(EmbeddedError, match="holds the data of Postgres 16"):
        await EmbeddedPostgres(data_dir=data_dir).start()


async def test_a_failed_start_shows_the_end_of_the_log_and_leaves_the_folder_usable(data_dir: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"(?s)The end of .*kafka\.log.*num\.io\.threads"):
        await EmbeddedKafka(data_dir=data_dir, properties={"num.io.threads": "0"}).start()

    async with EmbeddedKafka(data_dir=data_dir):
        pass


# Where Kafka comes from


async def test_a_first_fetch_without_network_says_so(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)  # where nobody listens, nor will
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")

    with pytest.raises(EmbeddedError, match=r"could not be fetched from Maven Central.*needs the network"):
        await EmbeddedKafka(data_dir=data_dir / "data", cache_dir=data_dir / "cache").start()

    assert not (data_dir / "cache" / f"kafka-{KAFKA_VERSION}").exists()


async def test_an_interrupted_fetch_goes_on_and_trusts_nothing_that_is_cut(
    kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = await jars.ensure_jars(jars.default_cache_dir(), log=print)
    first, second, third, *others = jars.locked_jars()
    partial = tmp_path / f"kafka-{KAFKA_VERSION}.partial"
    partial.mkdir()
    for jar in (first, second, *others):
        (partial / jar.filename).write_bytes((complete / jar.filename).read_bytes())
    (partial / second.filename).write_bytes(b"?" * second.size_bytes)
    fetched = []

    def fetch_one(_maven: object, jar: jars.Jar, destination: Path) -> jars.Jar:
        fetched.append(jar)
        destination.write_bytes((complete / jar.filename).read_bytes())
        return jar

    monkeypatch.setattr(jars, "fetch_one", fetch_one)
    folder = await jars.ensure_jars(tmp_path, log=print)

    assert {jar.coordinate for jar in fetched} == {second.coordinate, third.coordinate}
    assert jars.is_complete(folder)
    assert not partial.exists()


def test_a_jar_that_is_not_the_locked_one_is_not_kept(tmp_path: Path) -> None:
    jar = jars.locked_jars()[0]
    arrived = tmp_path / "arrived.jar"

    class Maven:
        """What jgo offers, with a repository that sends something else."""

        cached_path = arrived

        def project(self, _group: str, _artifact: str) -> Maven:
            return self

        def at_version(self, _version: str) -> Maven:
            return self

        def artifact(self) -> Maven:
            return self

        def resolve(self) -> Path:
            arrived.write_bytes(b"!" * jar.size_bytes)
            return arrived

    with pytest.raises(EmbeddedError, match="is not the jar that Sluice was built with"):
        jars.fetch_one(cast("MavenContext", Maven()), jar, tmp_path / jar.filename)

    assert list(tmp_path.iterdir()) == []


# What is left behind: nothing


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_no_process_outlives_its_parent(ended_by: signal.Signals, data_dir: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, data_dir),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert parent.stdout is not None
    servers = [psutil.Process(int(pid)) for pid in (await within(parent.stdout.readline())).split()]
    assert len(servers) == 2
    family = psutil.Process(parent.pid).children(recursive=True)
    assert set(servers) <= set(family)

    os.killpg(parent.pid, ended_by)  # the group, as a terminal's Ctrl-C does it
    await within(parent.wait())

    await within(gone(family))
    async with EmbeddedKafka(data_dir=data_dir), EmbeddedPostgres(data_dir=data_dir) as postgres:
        assert await run_sql(postgres.url, "SELECT 1") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
@both
async def test_a_server_does_not_outlive_its_guard(server_class: type[EmbeddedServer], data_dir: Path) -> None:
    async with server_class(data_dir=data_dir) as server:
        process = psutil.Process(server.pid)
        family = [process, *process.children(recursive=True)]
        guard = process.parent()
        assert guard is not None

        guard.kill()

        assert await within(server.wait()) == 128 + signal.SIGKILL
        await within(gone(family))


@both
async def test_a_paused_server_can_be_stopped(server_class: type[EmbeddedServer], data_dir: Path) -> None:
    server = server_class(data_dir=data_dir)
    await server.start()
    process = psutil.Process(server.pid)
    os.kill(server.pid, signal.SIGSTOP)

    await within(server.stop())

    await within(gone([process]))


async def test_stopping_twice_is_stopping_once(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir=data_dir)
    await postgres.stop()
    await postgres.start()

    await postgres.stop()
    await postgres.stop()

    async with EmbeddedPostgres(data_dir=data_dir):
        pass


async def test_a_helper_that_hangs_is_ended_and_named(data_dir: Path) -> None:
    lock = await lock_folder(data_dir)
    before = set(psutil.Process().children(recursive=True))

    with pytest.raises(EmbeddedError, match=r"initdb did not end within 0\.5 s, so it was killed: .* start again"):
        await run_guarded(["sleep", "600"], name="initdb", log_file=data_dir / "helper.log", lock=lock, within_s=0.5)

    assert set(psutil.Process().children(recursive=True)) <= before
    lock.release()


# Helpers


async def within(awaited: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaited, WITHIN_S)


async def gone(processes: Iterable[psutil.Process]) -> None:
    """Return when none of these runs. A zombie does not: whoever adopted it just has not looked yet."""
    while any(runs(process) for process in processes):  # noqa: ASYNC110  # others' children cannot be awaited
        await asyncio.sleep(0.02)


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def run_sql(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def admin(bootstrap_servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def make_topic(bootstrap_servers: str, topic: str) -> None:
    async with admin(bootstrap_servers) as client:
        await client.create_topics([NewTopic(topic, 1, 1)])


async def cluster_id(bootstrap_servers: str) -> str:
    async with admin(bootstrap_servers) as client:
        description = await client.describe_cluster()
        return str(description["cluster_id"])


async def produce(bootstrap_servers: str, topic: str, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, acks="all", max_request_size=8 * 1024 * 1024)
    await producer.start()
    try:
        await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def consume(bootstrap_servers: str, topic: str) -> list[bytes]:
    """Every record of the topic's first partition."""
    partition = TopicPartition(topic, 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers)
    await consumer.start()
    try:
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        end = (await consumer.end_offsets([partition]))[partition]
        return [(await within(consumer.getone(partition))).value for _ in range(end)]
    finally:
        await consumer.stop()
