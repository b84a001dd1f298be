"""Moving a Sluice to another folder, or back from what was saved of it: by its log and the bytes of its files alone."""

import json
import shutil
from pathlib import Path

import pytest

from services.demo import PICTURES
from tests.e2e.conftest import Sluice

pytestmark = pytest.mark.timeout(300)  # many commands, each a process that takes its time on a busy machine


async def test_a_folder_that_was_lost_is_built_again_from_an_export_and_the_blobs(
    sluice: Sluice, tmp_path: Path
) -> None:
    backup, again = tmp_path / "backup", Sluice(sluice.data_dir.with_name("again"))
    async with sluice.up():
        batch = (await sluice.run("upload", "--quiet", "--watch", PICTURES / "cat.png")).out.strip()
        before = await sluice.run("status", "--json", batch)
        first = await sluice.run("log export", "--json", backup)  # while it runs
        refused = await sluice.run("log import", backup)
    # And what came until it was stopped; its Kafka is started for this.
    second = await sluice.run("log export", "--json", backup)
    shutil.copytree(sluice.data_dir / "blobs", again.data_dir / "blobs")
    shutil.rmtree(sluice.data_dir)

    imported = await again.run("log import", "--json", backup)
    async with again.up():
        after = await again.run("status", "--json", batch)
        then = await again.run("status", "--json", "--at", before.json["position"], batch)
        more = await again.run("upload", "--quiet", "--watch", PICTURES / "cat.png")

    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.json["ends"]["0"] >= first.json["ends"]["0"]
    assert (refused.code, "is not empty" in refused.err) == (1, True)
    assert imported.code == 0, imported.err
    assert imported.json["previous_log_id"] == second.json["log_id"]
    assert after.json["status"] == "completed"
    # The same in every respect, but that positions name another log.
    old, here = second.json["log_id"][:8], imported.json["log_id"][:8]
    assert old != here
    assert after.json == json.loads(before.out.replace(f'"{old}.', f'"{here}.'))
    assert then.json == {name: value for name, value in after.json.items() if name != "uploads"}
    assert more.code == 0, more.err
