"""What the api asks the read models, the SQL beside its question. Answers are states; views are made elsewhere.

Pages go by keys that never change (when and where a thing was made), so a page neither repeats nor misses what stood
there when the first one was asked, whatever is written meanwhile. A cursor is opaque text.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

from schemas.batch import Batch, Upload
from schemas.errors import Code, RequestError
from schemas.views import ProcessorView, rfc3339
from services.database import BATCH_COLUMNS, SILENT_S, UPLOAD_COLUMNS, Database, batch_from_row, upload_from_row

LIMIT_DEFAULT = 50
LIMIT_MAX = 200

_CURSOR = re.compile(r"([bue])\.(\d{1,18})\.(-|\d{1,18}-\d{1,3})", re.ASCII)
_OF_BATCH = ", ".join(f"batch.{column}" for column in BATCH_COLUMNS.split(", "))
_OF_UPLOAD = ", ".join(f"upload.{column}" for column in UPLOAD_COLUMNS.split(", "))


@dataclass(frozen=True, slots=True)
class Page:
    """How much of a list is wanted, and which: `status` None is any, `cursor` None the beginning."""

    limit: int
    cursor: str | None
    status: str | None


async def batch_of(database: Database, batch_id: str, *, user_id: str) -> Batch | None:
    """A batch of this user."""
    rows = await database.read(
        f"SELECT {BATCH_COLUMNS} FROM {{generation}}.upload_batches WHERE id = $1 AND user_id = $2",  # noqa: S608  # ours
        batch_id,
        user_id,
    )
    return batch_from_row(rows[0]) if rows else None


async def upload_of(database: Database, upload_id: str, *, user_id: str) -> Upload | None:
    """An upload in a batch of this user."""
    rows = await database.read(
        f"SELECT {_OF_UPLOAD} FROM {{generation}}.uploads AS upload "  # noqa: S608  # the names are ours
        "JOIN {generation}.upload_batches AS batch ON batch.id = upload.batch_id "
        "WHERE upload.id = $1 AND batch.user_id = $2",
        upload_id,
        user_id,
    )
    return upload_from_row(rows[0]) if rows else None


async def batches_of(database: Database, *, user_id: str, page: Page) -> tuple[list[Batch], str | None]:
    """A page of this user's batches, newest first, and the cursor of the next one. Raises RequestError."""
    after_ms, after_place = read_cursor(page.cursor, "b")
    after_offset, after_partition = (int(part) for part in after_place.split("-")) if after_place else (None, None)
    rows = await database.read(
        f"SELECT {_OF_BATCH} FROM {{generation}}.upload_batches AS batch "  # noqa: S608  # the names are ours
        "WHERE user_id = $1 AND ($2::text IS NULL OR status = $2) "
        "AND ($3::bigint IS NULL OR (created_ms, created_offset, partition) < ($3, $4::bigint, $5::integer)) "
        "ORDER BY created_ms DESC, created_offset DESC, partition DESC LIMIT $6",
        user_id,
        page.status,
        after_ms,
        after_offset,
        after_partition,
        page.limit + 1,
    )
    batches = [batch_from_row(row) for row in rows[: page.limit]]
    more = len(rows) > page.limit
    if not more:
        return batches, None
    last = batches[-1]
    return batches, cursor_of("b", last.created_ms, f"{last.created_offset}-{last.partition}")


async def uploads_of(database: Database, batch_id: str, *, page: Page) -> tuple[list[Upload], str | None]:
    """A page of a batch's uploads in the order they were queued, and the cursor of the next one."""
    after_offset, _ = read_cursor(page.cursor, "u")
    rows = await database.read(
        f"SELECT {UPLOAD_COLUMNS} FROM {{generation}}.uploads "  # noqa: S608  # the names are ours
        "WHERE batch_id = $1 AND ($2::text IS NULL OR status = $2) AND ($3::bigint IS NULL OR created_offset > $3) "
        "ORDER BY created_offset LIMIT $4",
        batch_id,
        page.status,
        after_offset,
        page.limit + 1,
    )
    return _page_of_uploads([upload_from_row(row) for row in rows], page)


def uploads_among(uploads: dict[str, Upload], *, page: Page) -> tuple[list[Upload], str | None]:
    """The same page, of uploads that are in memory."""
    after_offset, _ = read_cursor(page.cursor, "u")
    wanted = (
        upload
        for upload in uploads.values()
        if page.status in (None, upload.status) and (after_offset is None or upload.created_offset > after_offset)
    )
    return _page_of_uploads(sorted(wanted, key=lambda upload: upload.created_offset), page)


async def oldest_unfinished_ms(database: Database) -> int | None:
    """Since when the oldest unfinished step is due: an upload that waits or is in work, a batch whose completion is
    missing. An open batch that waits for files is nobody's step. Milliseconds since 1970 UTC."""
    rows = await database.read(
        "SELECT least("
        "(SELECT min(updated_ms) FROM {generation}.uploads WHERE status IN ('queued', 'processing')), "
        "(SELECT min(updated_ms) FROM {generation}.upload_batches "
        "WHERE status IN ('pending', 'processing') AND sealed AND queued = 0 AND processing = 0)"
        ") AS oldest_ms"
    )
    return rows[0]["oldest_ms"] if rows else None


async def processors(database: Database) -> list[ProcessorView]:
    """What processors say of themselves, by lane; whoever works it first."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT partition, worker_id, state, epoch, attempt, degraded, problems, "  # noqa: S608  # ours
            "(extract(epoch FROM since) * 1000)::bigint AS since_ms, "
            "(extract(epoch FROM work_since) * 1000)::bigint AS work_since_ms, "
            f"{SILENT_S} AS heard_s "
            "FROM sluice_ops.processors ORDER BY partition, state DESC, heartbeat DESC"
        )
    return [
        ProcessorView(
            partition=row["partition"],
            worker_id=row["worker_id"],
            state=row["state"],
            since=rfc3339(row["since_ms"]),
            heard_s=round(row["heard_s"], 3),
            epoch=row["epoch"],
            working_since=None if row["work_since_ms"] is None else rfc3339(row["work_since_ms"]),
            attempt=row["attempt"],
            degraded=row["degraded"],
            problems=row["problems"],
        )
        for row in rows
    ]


def _page_of_uploads(found: list[Upload], page: Page) -> tuple[list[Upload], str | None]:
    uploads = found[: page.limit]
    more = len(found) > page.limit
    return uploads, cursor_of("u", uploads[-1].created_offset, "-") if more else None


def cursor_of(kind: str, number: int, identifier: str) -> str:
    """Where a page ended: in a list of batches (kind b), of uploads (u) or of events (e)."""
    return base64.urlsafe_b64encode(f"{kind}.{number}.{identifier}".encode()).decode().rstrip("=")


def read_cursor(text: str | None, kind: str) -> tuple[int | None, Any]:
    """What `cursor_of` wrote; raises RequestError for anything else."""
    if text is None:
        return None, None
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        decoded = ""
    match = _CURSOR.fullmatch(decoded)
    if match is None or match[1] != kind or (match[3] == "-") == (kind == "b"):
        raise RequestError(Code.INVALID_REQUEST, "`cursor` is not one that this list gave out; begin without one")
    return int(match[2]), match[3]
