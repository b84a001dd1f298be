"""What a person is told to do next: addresses, and commands that can be pasted as they stand."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from rich.table import Table
from rich.text import Text

from services.cli.connection import DEFAULT_DATA_DIR, DEFAULT_USER, Connection


def program() -> str:
    """How this program is called from where the person stands."""
    called = Path(sys.argv[0]).absolute()
    if called.name != "sluice":
        return f"{shlex.quote(sys.executable)} -m services.cli"
    if shutil.which("sluice") and not called.is_relative_to(Path.cwd()):
        return "sluice"
    try:
        return shlex.quote(str(called.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(called))


def data_dir_option(data_dir: Path) -> str:
    """` --data-dir X` where X is not the default."""
    if data_dir.absolute() == DEFAULT_DATA_DIR.absolute():
        return ""
    return f" --data-dir {shlex.quote(_near(data_dir))}"


def addresses(endpoints: Mapping[str, Any], *, data_dir: Path) -> Table:
    table = Table.grid(padding=(0, 3))
    rows = {
        "api": f"{endpoints['api']}   (reference: {endpoints['api']}/docs)",
        "notifier": f"{endpoints['notifier']}   (WebSocket: /v1/ws)",
        "processor": f"{endpoints['processor']}   (/readyz, /metrics)",
        "kafka": endpoints["kafka"],
        "postgres": without_password(endpoints["postgres"]),
        "blobs": endpoints["blobs"],
        "logs": _near(data_dir / "logs"),
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(str(value), no_wrap=True, overflow="fold"))
    return table


def up_hints(data_dir: Path) -> list[str]:
    """What to do with a Sluice that is up."""
    option = data_dir_option(data_dir)
    return [
        f"send files:  {program()} upload{option} --watch PICTURE…",
        f"a token:     export SLUICE_TOKEN=$({program()} token{option} --user {DEFAULT_USER})",
    ]


def curl_hints(here: Connection, *, batch_id: str) -> list[str]:
    """Requests with a token that is good for some hours."""
    header = f"-H 'Authorization: Bearer {here.token}'"
    return [
        "",
        "Ask for the batch:",
        f"  curl {header} {here.api}/v1/batches/{batch_id}",
        "Send a picture of yours:",
        f"  curl {header} -F files=@PICTURE.jpg {here.api}/v1/batches",
    ]


def without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:…@{host}"))


def _near(path: Path) -> str:
    """The path as seen from here, where it is below."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
