"""Sending a set of local files as one batch: make it, send each file, seal it.

Files go out a few at a time, each from the disk in pieces. What Sluice refuses (an unknown format, an empty file) is
kept as rejected and the others go on; a file that changes or vanishes while it is sent is rejected too. Names that
occur twice are allowed: the first goes by PUT, which may be repeated safely, the others by POST with a key.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from schemas.requests import safe_filename
from services.cli.client import Api, FileToSend
from services.cli.errors import Refused, WrongUse, one_error

AT_ONCE = 4
OF_THE_WHOLE_BATCH = frozenset({"unauthorized", "forbidden_scope", "not_found", "batch_sealed", "batch_ended"})


@dataclass(slots=True)
class Sent:
    """`accepted`: uploads as they were right after they were taken; `rejected`: filename, code, detail; `batch`: None
    where no file was taken, there is none then."""

    batch: dict[str, Any] | None
    accepted: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def check_files(paths: Sequence[Path]) -> None:
    """Raises WrongUse with a line for each path that is no readable file."""
    complaints = [complaint for path in paths if (complaint := _complaint(path))]
    if complaints:
        raise WrongUse("\n".join([*complaints, "Nothing was sent."]))


def _complaint(path: Path) -> str | None:
    try:
        if path.is_dir():
            return f"{path} is a folder: name its files, for instance {path}/*"
        if not path.is_file() and path.exists():
            return f"{path} is not a regular file"
        path.open("rb").close()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if safe_filename(path.name) else f"{path} has a name that nothing would be left of"


async def send(
    api: Api, batch: dict[str, Any], files: Sequence[Path], *, on_file: Callable[[int], None] = lambda _done: None
) -> Sent:
    """Send the files into the batch and seal it, or remove it where none was taken. `on_file` is told how many were
    taken or refused so far."""
    sent = Sent(batch)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(path: Path, *, name_is_new: bool) -> None:
        async with room:
            await _send_one(api, sent, batch["id"], path, name_is_new=name_is_new)
            on_file(len(sent.accepted) + len(sent.rejected))

    seen: set[str | None] = set()
    with one_error():
        async with asyncio.TaskGroup() as sending:
            for path in files:
                name = safe_filename(path.name)
                sending.create_task(one(path, name_is_new=name not in seen))
                seen.add(name)
    if sent.accepted:
        sent.batch = await api.seal(batch["id"])
    else:
        await api.delete(batch["id"])
        sent.batch = None
    return sent


async def _send_one(api: Api, sent: Sent, batch_id: str, path: Path, *, name_is_new: bool) -> None:
    """One file: into `accepted` or `rejected`. Raises Refused where the whole batch is refused, Unreachable."""
    try:
        file = await asyncio.to_thread(FileToSend.of, path, safe_filename(path.name) or path.name)
        if name_is_new:
            sent.accepted.append(await api.put(batch_id, file))
        else:
            answer = await api.post(batch_id, file)
            sent.accepted += answer["accepted"]
            sent.rejected += answer["rejected"]
    except Refused as refusal:
        if refusal.code in OF_THE_WHOLE_BATCH or refusal.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        sent.rejected.append({"filename": path.name, "code": refusal.code, "detail": refusal.detail})
    except httpx.LocalProtocolError:
        changed = "it changed its size while it was being sent; send it again"
        sent.rejected.append({"filename": path.name, "code": "changed", "detail": changed})
    except OSError as error:
        detail = f"it cannot be read any more: {error.strerror}"
        sent.rejected.append({"filename": path.name, "code": "unreadable", "detail": detail})
