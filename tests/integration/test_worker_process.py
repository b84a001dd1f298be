"""The child process for the work on files: what goes wrong in it costs one attempt, and the next file is unharmed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from schemas.errors import WorkCode
from services.processor.work.port import WorkCancelled, WorkError, WorkerUnavailable
from services.processor.work.process import WorkerProcess
from services.processor.work.registry import installed_handlers
from tests.pictures import encoded, job_for, scene
from tests.work_handlers import CONTENT_TYPE

ROOT = Path(__file__).parents[2]
WORDS = {"word": "tests.work_handlers:handler"}
IMAGES = {"image": "services.processor.work.images:handler"}


@contextlib.asynccontextmanager
async def working(**options):
    """A worker that is started, and stopped at the end without leaving a process behind."""
    worker = WorkerProcess(**{"handlers": WORDS, "memory_bytes_max": 200 << 20, **options})
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()
    await _all_gone()


@pytest.fixture
async def worker():
    async with working() as worker:
        yield worker


@pytest.fixture
def ask(tmp_path):
    """Has the worker do what these words say; the result."""

    async def ask(worker, words, *, timeout_s=20, on_progress=lambda _stage, _percent: None):
        job = job_for(tmp_path, words.encode(), content_type=CONTENT_TYPE)
        return await worker.run(job, on_progress=on_progress, timeout_s=timeout_s)

    return ask


async def test_a_picture_is_worked_in_the_child_and_its_thumbnail_written(tmp_path):
    job = job_for(tmp_path, encoded(scene(640, 400), "jpeg"))
    reports = []

    async with working(handlers=IMAGES) as worker:
        result = await worker.run(job, on_progress=lambda *report: reports.append(report), timeout_s=20)

    assert (result["width"], result["height"], result["format"]) == (640, 400, "jpeg")
    assert job.thumbnail_path.stat().st_size == result["thumbnail"]["size_bytes"]
    assert reports[0] == ("reading", 5)
    assert [percent for _, percent in reports] == sorted(percent for _, percent in reports)


async def test_a_picture_that_is_none_fails_for_good_and_the_child_lives_on(tmp_path):
    async with working(handlers=IMAGES) as worker:
        before = _children()
        with pytest.raises(WorkError) as caught:
            await worker.run(job_for(tmp_path, b"no picture"), on_progress=_ignore, timeout_s=20)

        assert (caught.value.code, caught.value.final) == (WorkCode.CORRUPT_MEDIA, True)
        assert before <= _children()


async def test_a_picture_that_needs_too_much_memory_is_not_called_corrupt(tmp_path):
    content = encoded(scene(4000, 4000), "webp", method=0)

    async with working(handlers=IMAGES, memory_bytes_max=60 << 20) as worker:
        with pytest.raises(WorkError) as caught:
            await worker.run(job_for(tmp_path, content), on_progress=_ignore, timeout_s=20)

    assert (caught.value.code, caught.value.final) == (WorkCode.OUT_OF_MEMORY, False)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("die SEGV", WorkCode.WORKER_CRASHED, "SIGSEGV"),
        ("die ABRT", WorkCode.WORKER_CRASHED, "SIGABRT"),
        ("die KILL", WorkCode.WORKER_CRASHED, "SIGKILL"),
        ("die exit", WorkCode.WORKER_CRASHED, "exit code 7"),
        ("die bad_alloc", WorkCode.OUT_OF_MEMORY, "SIGABRT"),
        ("take 2000", WorkCode.OUT_OF_MEMORY, "memory"),
        ("map 2000", WorkCode.OUT_OF_MEMORY, "memory"),
        ("fail somehow", WorkCode.INTERNAL_ERROR, "KeyError"),
        ("fail oddly", WorkCode.INTERNAL_ERROR, "an invention"),
        ("return set", WorkCode.INTERNAL_ERROR, "TypeError"),
        ("return nan", WorkCode.INTERNAL_ERROR, "nan"),
        ("return nul", WorkCode.INTERNAL_ERROR, "NUL"),
        ("return huge", WorkCode.INTERNAL_ERROR, "bytes"),
    ],
)
async def test_whatever_goes_wrong_costs_one_attempt_and_the_next_file_is_unharmed(worker, ask, words, code, says):
    with pytest.raises(WorkError, match=says) as caught:
        await ask(worker, words)

    assert (code, False) == (caught.value.code, caught.value.final)
    assert (await ask(worker, "hello again"))["hello"] == "again"


async def test_the_messages_of_work_errors_are_fit_for_the_log(worker, ask):
    with pytest.raises(WorkError) as caught:
        await ask(worker, "fail final")

    assert (caught.value.code, caught.value.final) == (WorkCode.CORRUPT_MEDIA, True)
    assert caught.value.message.startswith("not  a   film!!")
    assert len(caught.value.message) == 1_000


@pytest.mark.parametrize("words", ["sleep", "spin"])
async def test_work_without_end_is_killed_when_its_time_is_up(worker, ask, words):
    began = time.monotonic()

    with pytest.raises(WorkError) as caught:
        await ask(worker, words, timeout_s=0.3)

    assert (caught.value.code, caught.value.final) == (WorkCode.WORK_TIMEOUT, False)
    assert 0.3 <= time.monotonic() - began < 15
    assert (await ask(worker, "hello again"))["hello"] == "again"


async def test_memory_within_the_limit_is_given(worker, ask):
    assert (await ask(worker, "take 100"))["taken"] == 100 << 20


async def test_without_a_limit_memory_is_given_as_the_system_has_it(ask):
    async with working(memory_bytes_max=0) as worker:
        assert (await ask(worker, "take 400"))["taken"] == 400 << 20


async def test_a_file_in_work_is_cancelled_at_once_and_the_next_one_is_unharmed(worker, ask):
    took_s = []
    for _ in range(3):  # this machine may stand still for a second, but not each time
        # given a file in work
        started = asyncio.Event()
        running = asyncio.create_task(ask(worker, "spin", on_progress=lambda *_report, started=started: started.set()))
        await started.wait()

        # when it is cancelled
        began = time.monotonic()
        await worker.cancel()

        # then its work has ended when cancel returns
        took_s.append(time.monotonic() - began)
        assert running.done()
        with pytest.raises(WorkCancelled):
            await running
        assert (await ask(worker, "hello again"))["hello"] == "again"
    assert min(took_s) < 1


async def test_cancelling_nothing_is_nothing(worker, ask):
    before = (await ask(worker, "hello"))["pid"]

    await worker.cancel()

    assert before == (await ask(worker, "hello"))["pid"]


async def test_a_caller_who_goes_away_takes_the_work_with_them(worker, ask):
    started = asyncio.Event()
    running = asyncio.create_task(ask(worker, "spin", on_progress=lambda *_report: started.set()))
    await started.wait()

    running.cancel()
    await asyncio.wait({running})

    assert running.cancelled()
    assert (await ask(worker, "hello again"))["hello"] == "again"


async def test_stopping_ends_a_file_in_work(tmp_path, ask):
    async with working() as worker:
        started = asyncio.Event()
        running = asyncio.create_task(ask(worker, "spin", on_progress=lambda *_report: started.set()))
        await started.wait()

        await worker.stop()
        await worker.stop()

        with pytest.raises(WorkCancelled):
            await running


async def test_an_idle_child_that_was_killed_costs_no_file(worker, ask):
    pid = (await ask(worker, "hello"))["pid"]

    idle = worker._current.result()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while not idle.is_gone:  # noqa: ASYNC110  # its end is told to the event loop alone
            await asyncio.sleep(0.01)

    answers = {(await ask(worker, "hello"))["pid"] for _ in range(3)}
    assert pid not in answers


async def test_progress_comes_in_order_once_each_and_never_goes_back(worker, ask):
    reports = []

    await ask(worker, "step", on_progress=lambda *report: reports.append(report))

    assert reports == [("started", 1), ("stepping", 10), ("stepping", 40), ("stepping", 90), ("stepping", 100)]


async def test_a_listener_that_fails_does_not_stop_the_work(worker, ask):
    def fail(_stage, _percent):
        raise RuntimeError("nobody listens")

    assert (await ask(worker, "hello on", on_progress=fail))["hello"] == "on"


async def test_a_decoder_that_prints_garbles_nothing(worker, ask):
    result = await ask(worker, "say words")

    assert (result["said"], result["input"]) == ("words", "")
    assert (await ask(worker, "hello again"))["hello"] == "again"


async def test_after_so_many_files_a_fresh_process_takes_over(ask):
    async with working(files_per_process_max=2) as worker:
        pids = [(await ask(worker, "hello"))["pid"] for _ in range(5)]

    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


async def test_the_child_sees_neither_the_services_secrets_nor_its_files(monkeypatch, tmp_path, ask):
    monkeypatch.setenv("SLUICE_JWT_SECRET", "do not tell")
    with (tmp_path / "open").open("w"):
        async with working() as worker:
            seen = await ask(worker, "environment")

    assert not [name for name in seen["names"] if name.startswith("SLUICE")]
    assert len(seen["descriptors"]) <= 8  # three standard ones, two of the protocol, what the listing itself takes


async def test_ctrl_c_and_sigterm_are_the_parents_to_handle(worker, ask):
    assert (await ask(worker, "endure"))["endured"]


async def test_options_reach_their_handler(ask):
    async with working(options={"word": {"pixels_max": 7}}) as worker:
        assert (await ask(worker, "hello"))["options"] == {"pixels_max": 7}


async def test_a_broken_or_missing_handler_degrades_and_the_others_work(ask):
    handlers = {**WORDS, "broken": "tests.work_handlers:broken", "missing": "nowhere.at:all"}

    async with working(handlers=handlers) as worker:
        assert {CONTENT_TYPE} == worker.content_types
        broken, missing = worker.degraded
        assert "'broken'" in broken
        assert "the model file is missing" in broken
        assert "'missing'" in missing
        assert (await ask(worker, "hello on"))["hello"] == "on"


async def test_a_file_that_no_handler_takes_fails_and_says_so(worker, tmp_path):
    with pytest.raises(WorkError, match="video/mp4") as caught:
        await worker.run(job_for(tmp_path, b"x", content_type="video/mp4"), on_progress=_ignore, timeout_s=20)

    assert (caught.value.code, caught.value.final) == (WorkCode.INTERNAL_ERROR, False)


async def test_a_blob_that_is_gone_or_torn_is_missing(worker, tmp_path):
    gone, torn = (job_for(tmp_path, b"hello", content_type=CONTENT_TYPE, name=name) for name in ("gone", "torn"))
    gone.path.unlink()
    torn.path.write_bytes(b"hel")

    for job in (gone, torn):
        with pytest.raises(WorkError) as caught:
            await worker.run(job, on_progress=_ignore, timeout_s=20)
        assert caught.value.code == WorkCode.BLOB_MISSING


async def test_where_no_child_can_be_started_the_reason_is_told():
    worker = WorkerProcess(handlers={"deadly": "tests.work_handlers:deadly"})

    with pytest.raises(WorkerUnavailable, match="exit code 3"):
        await worker.start()

    await _all_gone()


async def test_where_no_child_could_be_had_one_is_warm_again_as_soon_as_it_can_be_started(worker, ask):
    await ask(worker, "hello")
    handlers = worker._start_message["handlers"]
    worker._start_message["handlers"] = {"deadly": "tests.work_handlers:deadly"}
    for child in (worker._current, worker._spare):
        await (await child).kill()

    with pytest.raises(WorkerUnavailable):
        await ask(worker, "hello")
    with pytest.raises(WorkerUnavailable, match="exit code 3"):
        await worker.warm()
    worker._start_message["handlers"] = handlers
    await worker.warm()

    assert "pid" in await ask(worker, "hello")


async def test_stopping_does_not_wait_for_a_child_that_is_still_warming_up():
    worker = WorkerProcess(handlers={"endless": "tests.work_handlers:endless"})
    starting = asyncio.create_task(worker.start())
    while not _children():  # noqa: ASYNC110  # a process of the system sets no event of ours
        await asyncio.sleep(0.01)

    began = time.monotonic()
    starting.cancel()
    await asyncio.wait({starting})
    await worker.stop()

    assert time.monotonic() - began < 10
    await _all_gone()


@pytest.mark.parametrize("words", ["hello", "spin"])
def test_no_child_outlives_a_killed_parent(tmp_path, words):
    # given a parent with two children, one of them in the middle of a file
    script = f"""
import asyncio, psutil
from pathlib import Path
from services.processor.work.process import WorkerProcess
from tests.pictures import job_for

async def main():
    worker = WorkerProcess(handlers={WORDS!r})
    await worker.start()
    job = job_for(Path({str(tmp_path)!r}), {words.encode()!r}, content_type={CONTENT_TYPE!r})
    started = asyncio.Event()
    asyncio.create_task(worker.run(job, on_progress=lambda *_report: started.set(), timeout_s=60))
    await started.wait()
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) >= 2

        # when it is killed without a chance to clean up
        parent.kill()

    # then they are gone as well
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_the_handler_of_pictures_is_installed():
    assert installed_handlers()["image"] == "services.processor.work.images:handler"


async def _all_gone() -> None:
    """No child is left; the system may take a moment to bury one that was killed."""
    async with asyncio.timeout(30):
        while _children():  # noqa: ASYNC110  # a process of the system sets no event of ours
            await asyncio.sleep(0.01)


def _children() -> set[int]:
    """Our worker children, not those servers other tests started."""
    return {child.pid for child in psutil.Process().children() if _is_ours(child)}


def _is_ours(child: psutil.Process) -> bool:
    try:
        return "services.processor.work.child" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended while we looked
        return False


def _ignore(_stage: str, _percent: int) -> None:
    pass
