"""The running api against its own OpenAPI document: of thousands of requests that Schemathesis makes of it, right and
wrong ones, each gets an answer the document describes, and none that nobody expected."""

import asyncio
import sys
from pathlib import Path

from services.auth import make_token
from tests.integration.api_client import ANSWER_TIMEOUT_S, SECRET, api_settings, processor_beside, running_api

RUN_S = 25
STOPPED_AFTER_S = 110
CHECKS_LEFT_OUT = "positive_data_acceptance"
"""A schema cannot say everything: that a cursor must be one that was given out, or that bytes must be a picture."""


FORMS_ARE_TEXT = """
[[operations]]
include-name = "POST /v1/batches"
checks.negative_data_rejection.enabled = false
"""
"""In a form every field is text, so a number for a name is no wrong type there, whatever Schemathesis believes."""


async def test_no_request_gets_an_answer_that_is_not_described(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs")
    (tmp_path / "schemathesis.toml").write_text(FORMS_ARE_TEXT)
    async with running_api(settings) as api, processor_beside(settings):
        asking = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("st")),
            "run",
            f"{api.url}/openapi.json",
            *("--header", f"Authorization: Bearer {make_token('ada', SECRET, ttl_s=3600)}"),
            *("--max-time", str(RUN_S)),
            *("--request-timeout", str(ANSWER_TIMEOUT_S)),
            *("--exclude-checks", CHECKS_LEFT_OUT),
            "--generation-deterministic",
            "--no-color",
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            said, _ = await asyncio.wait_for(asking.communicate(), STOPPED_AFTER_S)
        finally:
            if asking.returncode is None:
                asking.kill()
                await asking.wait()

        report = said.decode()
        assert asking.returncode == 0, report
        assert "20 selected / 20 total" in report
        assert " 0 generated" not in report
