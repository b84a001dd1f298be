"""Odd and hostile files through the real warm child process: each ends with its code, the next file is unharmed."""

import time

import pytest

from services.processor.work.port import WorkError
from services.processor.work.process import WorkerProcess
from tests.odd_files import COMPLETED, ODD_FILES, plain
from tests.pictures import job_for
from tests.videos import CONTENT_TYPES

WORK_TIMEOUT_S = 30
SETTLED_AFTER_S = 30
"""Where nothing else runs none of these takes a tenth of that; a machine that is busy takes its part."""


@pytest.fixture(scope="module")
async def worker():
    worker = WorkerProcess()
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture(scope="module")
async def honest(worker, tmp_path_factory):
    """Works an honest picture and an honest video; their results, the same each time."""
    folder = tmp_path_factory.mktemp("honest")
    jobs = [
        job_for(folder, plain("jpeg"), content_type="image/jpeg", name="picture"),
        job_for(folder, plain("flv"), content_type=CONTENT_TYPES["flv"], name="video"),
    ]

    async def work():
        return [await worker.run(job, on_progress=_ignore, timeout_s=WORK_TIMEOUT_S) for job in jobs]

    return work, await work()


@pytest.mark.parametrize("file", ODD_FILES, ids=lambda file: file.name)
async def test_each_ends_with_its_code_and_the_next_file_is_unharmed(worker, honest, tmp_path, file):
    job = job_for(tmp_path, file.make(), content_type=file.content_type)
    began = time.monotonic()

    outcome, message = await _outcome(worker, job)

    assert outcome in file.may_become
    assert (outcome == COMPLETED) == (message == "")
    assert str(tmp_path) not in message
    assert time.monotonic() - began < WORK_TIMEOUT_S + SETTLED_AFTER_S
    work, results = honest
    assert results == await work()


async def _outcome(worker, job):
    try:
        result = await worker.run(job, on_progress=_ignore, timeout_s=WORK_TIMEOUT_S)
    except WorkError as error:
        return str(error.code), error.message
    assert job.thumbnail_path.stat().st_size == result["thumbnail"]["size_bytes"]
    return COMPLETED, ""


def _ignore(_stage: str, _percent: int) -> None:
    pass
