"""The pages in docs/ keep their word: their commands run as they stand, on a Sluice started with `sluice up`.

All `sh` blocks of a page are one script, run in a folder that looks like the project's; its `python` blocks are run
after it, with its variables. Only the addresses are put in the place of the default ones.
"""

import asyncio
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.demo import PICTURES
from tests.e2e.conftest import ROOT, Sluice, environment

PAGE_TIMEOUT_S = 200
pytestmark = pytest.mark.timeout(300)  # many commands, each a process that takes its time on a busy machine
PAGES = {
    "command-line.md": ["kafka's jars", '"healthy": true', "records of the log", "0 missing or damaged"],
    "mcp.md": ['"structuredContent":{"items":[{', "Nothing more is to be done; list_uploads shows the results."],
    "operations.md": ['"pids": {', '"processor": '],
    "retry-and-cancel.md": ["corrupt_media", "is processing", "is cancelled: 0 files cancelled"],
    "send-files.md": ["2 files taken, 0 rejected", '"accepted":[{', '"sealed":true', '"files_max":1000'],
    "time-travel.md": ["UploadSucceeded", '"next_cursor":"', "sluice.UploadSucceeded.v1"],
    "watch.md": ["completed, 3 of 3 files done", '"type": "subscribed"', "retry: 1000", "completed 1.0 "],
}
"""What each page's commands print, among other things."""


@dataclass(frozen=True)
class Here:
    """Where the commands are run, and the Sluice they find there."""

    folder: Path
    api: str
    notifier: str


@pytest.fixture(scope="module")
async def here() -> AsyncIterator[Here]:
    folder = Path(tempfile.mkdtemp(prefix="sluice-pages-"))
    try:
        (folder / "services" / "demo").mkdir(parents=True)
        (folder / "services" / "demo" / "pictures").symlink_to(PICTURES)
        async with Sluice(folder / ".sluice").up() as up:
            yield Here(folder, up.endpoints["api"], up.endpoints["notifier"])
    finally:
        shutil.rmtree(folder)


def blocks(page: str, language: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.skipif(shutil.which("curl") is None, reason="the pages show requests with curl, which is not installed")
@pytest.mark.parametrize("page", PAGES)
async def test_the_commands_of_a_page_do_what_it_says(here: Here, page: str) -> None:
    # Given the page's commands, as one script that ends with the first one that fails.
    script = ["set -euo pipefail", "export BATCH", blocks(page, "sh")]
    if programs := blocks(page, "python"):
        script.append(f"python - <<'PROGRAM'\n{programs}\nPROGRAM")
    text = "\n".join(script).replace("http://127.0.0.1:8080", here.api)
    text = re.sub("(http|ws)://127.0.0.1:8081", lambda found: here.notifier.replace("http", found[1]), text)

    # When they are run as a person runs them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", text),
        cwd=here.folder,
        env=environment() | {"PATH": path},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), PAGE_TIMEOUT_S)

    # Then all of them succeed, and say what they should.
    said = out.decode()
    assert process.returncode == 0, said + err.decode()
    assert [expected for expected in PAGES[page] if expected not in said] == [], said


def test_every_page_for_a_task_is_run() -> None:
    told = {"errors.md", "protocol.md"}  # which have tests of their own

    pages = {page.name for page in (ROOT / "docs").glob("*.md") if blocks(page.name, "sh")}

    assert pages - told == set(PAGES)
