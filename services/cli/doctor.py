"""`sluice doctor`: every check that a start depends on, one after the other, with what to do where one fails.

None keeps the others from being made, and none changes anything: `--mend` comes before them, see `operators.py`. What
a check is: `checkup.py`; what they look at: `ailments_here.py` (this machine), `ailments_there.py` (Kafka, Postgres and
the services, where there are some).
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from services.cli import connection
from services.cli.ailments_here import HERE
from services.cli.ailments_there import THERE
from services.cli.checkup import Ailing, Check, Finding, NotNeeded, Patient
from services.cli.display import clean
from services.settings import SettingsError, load

CHECK_TIMEOUT_S = 30.0
STATE_STYLES = {"ok": "green", "warning": "yellow", "wrong": "red", "skipped": "dim"}


async def examine(data_dir: Path) -> list[Finding]:
    """Make every check; takes some seconds."""
    try:
        patient = patient_in(data_dir)
    except SettingsError as error:
        lines = str(error).splitlines()
        return [Finding("settings", "wrong", line, "set or unset that environment variable") for line in lines]
    findings = [Finding("settings", "ok", "every SLUICE_ variable can be understood")]
    for name, check in [*HERE, *THERE]:
        findings.append(await _made(name, check, patient))
    return findings


def healthy(findings: Sequence[Finding]) -> bool:
    return all(finding.state != "wrong" for finding in findings)


def table(findings: Sequence[Finding]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        told = Text(clean(finding.found))
        if finding.mend is not None:
            told.append(f"\n→ {clean(finding.mend)}", style="bold")
        shown.add_row(Text(finding.check), Text(finding.state, style=STATE_STYLES[finding.state]), told)
    return shown


def patient_in(data_dir: Path) -> Patient:
    configured = load()
    endpoints = connection.read_endpoints(data_dir)
    parts = {"kafka_bootstrap_servers": "kafka", "database_url": "postgres", "blob_url": "blobs"}
    external = frozenset(parts.keys() & configured.model_fields_set)
    found: dict[str, Any] = {
        name: endpoints[part] for name, part in parts.items() if name not in external and part in endpoints
    }
    return Patient(data_dir, load(**found), endpoints, external)


async def _made(name: str, check: Check, patient: Patient) -> Finding:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return Finding(name, "ok", await check(patient))
    except NotNeeded as why:
        return Finding(name, "skipped", str(why))
    except Ailing as ailing:
        return Finding(name, "warning" if ailing.bearable else "wrong", str(ailing), ailing.mend)
    except TimeoutError:
        return Finding(name, "wrong", f"no answer within {CHECK_TIMEOUT_S:.0f} s", "see whether this machine is busy")
    except Exception as error:  # noqa: BLE001  # a check that breaks is a finding, too
        return Finding(name, "wrong", f"the check itself failed: {error!r}", "report this")
