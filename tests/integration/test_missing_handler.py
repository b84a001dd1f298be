"""A handler that is installed and cannot be loaded: said where people look, while everything else goes on."""

import os
from pathlib import Path

import httpx
import pytest

from services.embedded.folders import free_ports
from tests.integration.api_client import answered, answered_with, api_settings, ended, processor_beside, running_api
from tests.lanes import PICTURES


async def test_a_handler_that_cannot_be_loaded_is_named_and_the_others_work_on(
    kafka: str, database_url: str, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "plug-in" / "words-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: words\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[sluice.work]\nwords = a_module_nobody_has:handler\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed.parent), os.environ.get("PYTHONPATH", "")]))
    (port,) = free_ports(1)
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", processor_port=port
    )

    async with running_api(settings) as api, processor_beside(settings):
        ada = await api.person("ada")
        made = await ada.send("/v1/batches", {"cat.png": (PICTURES / "cat.png").read_bytes()})
        batch = await ended(ada, made.json()["batch"]["id"])
        status = await answered_with(lambda: ada.get("/v1/status"), lambda body: "words" in " ".join(body["degraded"]))
        async with httpx.AsyncClient(trust_env=False, timeout=30) as anyone:
            ready = await answered(lambda: anyone.get(f"http://127.0.0.1:{port}/readyz"), 200)

    assert (batch["status"], batch["successful_uploads"]) == ("completed", 1)
    assert status["mode"] == "degraded"
    assert "a_module_nobody_has" in " ".join(status["degraded"])
    assert ready.json()["problems"] == []
    assert "a_module_nobody_has" in " ".join(ready.json()["degraded"])
