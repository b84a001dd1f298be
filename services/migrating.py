"""The tables: made, brought up to date, and made anew where somebody dropped them. Everything runs on one connection.

Numbered scripts are applied once, in order, and never change afterwards. Versions of Sluice run side by side as long as
each newer script says `-- compatible-from: NNNN`: services that know the scripts up to NNNN can work with it. The read
models are a fold of the log, so where one of their tables is gone the whole generation is made anew, empty, and the
processor fills it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from services.lifecycle import StartError
from services.observability import logger

_log = logger("migrating")

_COMPATIBLE_FROM = re.compile(r"^-- compatible-from: (\d{4})$", re.MULTILINE)
_OPERATIONS_TABLE = re.compile(r"^CREATE TABLE (sluice_ops\.\w+)", re.MULTILINE)
_GENERATION_TABLE = re.compile(r"^CREATE TABLE \{generation\}\.(\w+)", re.MULTILINE)
_ADDITION = re.compile(r"^ALTER TABLE \{generation\}\.(\w+) ADD COLUMN (\w+) .*;$", re.MULTILINE)
_LOCK_TIMEOUT_MS = 500
"""So long one who alters a table may wait for those who read it: all others wait behind it."""
_VIEW = re.compile(r"^CREATE OR REPLACE VIEW public\.(\w+) .*?FROM \{generation\}\.(\w+);", re.MULTILINE | re.DOTALL)


async def apply_migrations(connection: Any) -> None:
    """Bring `sluice_ops` up to date. Raises StartError where the tables are of a newer Sluice that this one cannot work
    beside, or a script changed after it was applied."""
    scripts = {name: script(name) for name in _migration_names()}
    await connection.execute("CREATE SCHEMA IF NOT EXISTS sluice_ops")
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS sluice_ops.migrations "
        "(name text PRIMARY KEY, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    await connection.execute("ALTER TABLE sluice_ops.migrations ADD COLUMN IF NOT EXISTS compatible_from text")
    rows = await connection.fetch("SELECT name, sha256, compatible_from FROM sluice_ops.migrations")
    applied = {row["name"]: row["sha256"] for row in rows}
    if refused := refusal(
        newest_known=max(scripts), known=scripts, found={r["name"]: r["compatible_from"] for r in rows}
    ):
        raise StartError(refused)
    await _forget_the_broken(connection, applied, scripts)
    for name, text in scripts.items():
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if name not in applied:
            await connection.execute(text)
            await connection.execute(
                "INSERT INTO sluice_ops.migrations (name, sha256, compatible_from) VALUES ($1, $2, $3)",
                name,
                sha256,
                compatible_from(text),
            )
            _log.info("migration_applied", name=name)
        elif applied[name] != sha256:
            raise StartError(f"migration {name} changed after it was applied; restore it and add a new one instead")


def refusal(*, newest_known: str, known: Mapping[str, str], found: Mapping[str, str | None]) -> str | None:
    """Why services that know these scripts cannot work with a database that has those (each with the oldest number it
    is compatible from), or None."""
    for name, oldest in sorted(found.items()):
        if name not in known and (oldest is None or newest_known[:4] < oldest):
            needed = (
                f"which needs a Sluice that knows migration {oldest}" if oldest else "which this one cannot work with"
            )
            return (
                f"the database was migrated by a newer Sluice ({name}), {needed}; this one knows them up to "
                f"{newest_known}: start that version or a newer one"
            )
    return None


def compatible_from(text: str) -> str | None:
    """The number of the oldest migration whose services can work with this script's tables."""
    found = _COMPATIBLE_FROM.search(text)
    return found[1] if found else None


async def ensure_generation(connection: Any) -> None:
    """The live generation's tables and the views on them, whatever is left of them."""
    generation = await _live(connection)
    missing = await _missing(connection, [f"{generation}.{table}" for table in tables()])
    if missing:
        if len(missing) < len(tables()):
            _log.warning("read_models_broken", generation=generation, missing=missing)
        await connection.execute(f"DROP SCHEMA IF EXISTS {generation} CASCADE")
        await connection.execute(script("generation.sql").replace("{generation}", generation))
        _log.info("read_models_created", generation=generation)
    await _add_columns(connection, generation)
    if missing or await _missing(connection, [f"public.{name}" for name in views()]):
        await connection.execute("CREATE SCHEMA IF NOT EXISTS public")
        await connection.execute(script("views.sql").replace("{generation}", generation))


async def missing_tables(connection: Any) -> list[str]:
    """Which tables of the live generation, and views on them, are not there; nothing is changed."""
    number = await connection.fetchval("SELECT number FROM sluice_ops.live_generation")
    wanted = [f"gen_{number}.{table}" for table in tables()] + [f"public.{name}" for name in views()]
    return await _missing(connection, wanted)


def tables() -> list[str]:
    """The names of a generation's tables."""
    return _GENERATION_TABLE.findall(script("generation.sql"))


def views() -> dict[str, str]:
    """The names of the views in schema public, and which of a generation's tables each shows."""
    return dict(_VIEW.findall(script("views.sql")))


def script(name: str) -> str:
    """The text of a file in schemas/migrations."""
    return (files("schemas") / "migrations" / name).read_text(encoding="utf-8")


async def _forget_the_broken(connection: Any, applied: dict[str, str], scripts: Mapping[str, str]) -> None:
    """Where tables of `sluice_ops` are gone, nobody knows any more which generation was live: all begins anew."""
    made = [table for name, text in scripts.items() if name in applied for table in _OPERATIONS_TABLE.findall(text)]
    if applied and not await _missing(connection, made):
        return
    old = await connection.fetch("SELECT nspname FROM pg_namespace WHERE nspname ~ '^gen_[0-9]+$'")
    if applied or old:
        _log.warning("read_models_begin_anew", reason="tables of sluice_ops are gone", dropped=len(old))
    for row in old:
        await connection.execute(f"DROP SCHEMA {row['nspname']} CASCADE")
    for table in made:
        await connection.execute(f"DROP TABLE IF EXISTS {table} CASCADE")
    await connection.execute("DELETE FROM sluice_ops.migrations WHERE name = ANY($1)", list(applied))
    applied.clear()


async def _add_columns(connection: Any, generation: str) -> None:
    """Looks before it alters: that would wait for everybody who uses the table."""
    for addition in _ADDITION.finditer(script("additions.sql")):
        table, column = addition.groups()
        if not await connection.fetchval(
            "SELECT true FROM pg_attribute WHERE attrelid = to_regclass($1) AND attname = $2",
            f"{generation}.{table}",
            column,
        ):
            await connection.execute(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}")
            await connection.execute(addition[0].replace("{generation}", generation))
            _log.info("read_models_extended", table=table, column=column, old_rows="filled by `sluice replay`")


async def _live(connection: Any) -> str:
    # Held, so that no replay switches to other tables before these were looked at.
    number = await connection.fetchval("SELECT number FROM sluice_ops.live_generation FOR SHARE")
    if number is None:
        number = await connection.fetchval(
            "INSERT INTO sluice_ops.live_generation (number) VALUES (1) RETURNING number"
        )
    return f"gen_{number}"


async def _missing(connection: Any, names: Sequence[str]) -> list[str]:
    rows = await connection.fetch("SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NULL", names)
    return [row["name"] for row in rows]


def _migration_names() -> list[str]:
    folder = files("schemas") / "migrations"
    return sorted(entry.name for entry in folder.iterdir() if entry.name[:4].isdigit())
