"""What operators' commands decide without a server: which facts are shown and how, which blobs are unwanted, what a
doctor says, and which servers are meant."""

import json
import os
import socket
from pathlib import Path

import pytest

from schemas.events import Fact, Undecodable
from services.blobs.shelf import Lying
from services.cli import ailments_here, doctor, log_tail
from services.cli.checkup import Ailing, NotNeeded, Patient
from services.cli.connection import write_endpoints
from services.cli.errors import WrongUse
from services.cli.log_tail import Filter, Users
from services.cli.operating import kafka_of, operator_settings
from services.settings import load
from services.sweeping import unwanted
from tests.examples import (
    BATCH,
    LOG_ID,
    OPENING,
    OTHER_BATCH,
    OTHER_UPLOAD,
    OTHER_USER,
    UPLOAD,
    USER,
    a_batch_created,
    an_upload_queued,
    an_upload_started,
    log_of,
)

FACTS = log_of(
    *OPENING,
    a_batch_created(),
    an_upload_queued(),
    a_batch_created(OTHER_BATCH, user_id=OTHER_USER),
    an_upload_started(),
)
UNDECODABLE = Undecodable(0, 99, FACTS[0].timestamp_ms, "ce_type 'x' is not known to this version")


async def shown(wanted: Filter) -> list[str]:
    users = Users(None)
    await users.learn(FACTS)
    return [
        log_tail.short(fact.event.type) if isinstance(fact, Fact) else "undecodable"
        for fact in [*FACTS, UNDECODABLE]
        if wanted.takes(fact, users.of)
    ]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (
            Filter(),
            [
                *("LogCreated", "LaneClaimed", "BatchCreated", "UploadQueued"),
                *("BatchCreated", "UploadStarted", "undecodable"),
            ],
        ),
        (Filter(batch=BATCH), ["BatchCreated", "UploadQueued", "UploadStarted"]),
        (Filter(upload=UPLOAD), ["UploadQueued", "UploadStarted"]),
        (Filter(upload=OTHER_UPLOAD), []),
        (Filter(user=USER), ["BatchCreated", "UploadQueued", "UploadStarted"]),
        (Filter(user=OTHER_USER), ["BatchCreated"]),
        (Filter(type="uploadstarted"), ["UploadStarted"]),
        (Filter(type="sluice.BatchCreated.v1", batch=OTHER_BATCH), ["BatchCreated"]),
    ],
)
async def test_a_filter_takes_the_facts_that_are_wanted(wanted: Filter, expected: list[str]) -> None:
    assert await shown(wanted) == expected


def test_a_fact_is_one_line_for_people_and_one_object_for_programs() -> None:
    queued = FACTS[3]
    assert isinstance(queued, Fact)

    line = log_tail.line(queued, log_id=LOG_ID)
    value = log_tail.shown(queued, log_id=LOG_ID)

    assert line.startswith("2026-01-01T12:00:03.000Z  1f3a9c02.0-3     UploadQueued ")
    assert f"batch={BATCH}  upload={UPLOAD}  user_id=ada" in line
    assert (value["position"], value["type"]) == ("1f3a9c02.0-3", "sluice.UploadQueued.v1")
    assert "blob" not in value["data"]
    assert json.loads(json.dumps(value)) == value


def test_what_cannot_be_decoded_is_shown_with_the_reason_and_cannot_steer_a_terminal() -> None:
    hostile = Undecodable(0, 99, FACTS[0].timestamp_ms, "\x1b[2J is not known")

    assert "\x1b" not in log_tail.line(hostile, log_id=LOG_ID)
    assert log_tail.line(hostile, log_id=LOG_ID).endswith("[2J is not known")
    assert log_tail.shown(hostile, log_id=LOG_ID)["problem"] == hostile.reason


def lying(*names: str) -> list[Lying]:
    return [Lying(f"{UPLOAD}/{name}", 10, 0.0) for name in names]


@pytest.mark.parametrize(
    ("wanted", "start", "newest", "begins_with"),
    [
        (Filter(), None, None, 10),
        (Filter(), None, 0, 0),
        (Filter(), "start", None, 10),
        (Filter(type="uploadqueued"), None, 3, 3),
        (Filter(type="sluice.LaneClaimed.v1"), None, 3, 3),
    ],
)
def test_it_begins_with_as_many_of_the_newest_as_are_asked_for(
    wanted: Filter, start: str | None, newest: int | None, begins_with: int
) -> None:
    assert log_tail.checked(wanted, start=start, newest=newest) == begins_with


def test_a_type_of_facts_that_there_is_not_is_wrong_use_and_those_there_are_are_named() -> None:
    with pytest.raises(WrongUse, match=r"--type 'Nope': .* BatchCreated, .*UploadFailed"):
        log_tail.checked(Filter(type="Nope"), start=None, newest=None)


@pytest.mark.parametrize("newest", [0, 5])
def test_two_beginnings_at_once_are_wrong_use(newest: int) -> None:
    with pytest.raises(WrongUse, match="--from and --newest"):
        log_tail.checked(Filter(), start="start", newest=newest)


@pytest.mark.parametrize(
    ("row", "there", "expected"),
    [
        (None, ("a", "thumb-1-1"), ("a", "thumb-1-1")),
        (("a", "completed", 1), ("a", "thumb-1-1"), ()),
        (("a", "completed", 1), ("a", "b", "thumb-9-1", "thumb-10-1"), ("b", "thumb-9-1")),
        (("a", "completed", 2), ("a", "thumb-1-1", "thumb-1-2", "thumb-1-3"), ("thumb-1-1", "thumb-1-3")),
        (("a", "failed", 1), ("a", "thumb-1-1"), ("thumb-1-1",)),
    ],
)
def test_unwanted_is_all_but_the_file_and_its_newest_thumbnail(
    row: tuple[str, str, int] | None, there: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    upload = None if row is None else {"blob": f"{UPLOAD}/{row[0]}", "status": row[1], "attempts": row[2]}

    assert unwanted(lying(*there), upload) == lying(*expected)


def test_operators_mean_the_servers_that_settings_name_and_else_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_endpoints(tmp_path, {"kafka": "127.0.0.1:1", "postgres": "postgresql://x@127.0.0.1:2/y", "pid": os.getpid()})
    needs = ("kafka_bootstrap_servers", "database_url")

    of_the_folder = operator_settings(data_dir=tmp_path, needs=needs)
    monkeypatch.setenv("SLUICE_KAFKA_BOOTSTRAP_SERVERS", "kafka.example:9092")
    mixed = operator_settings(data_dir=tmp_path, needs=needs)

    assert of_the_folder.kafka_bootstrap_servers == "127.0.0.1:1"
    assert mixed.kafka_bootstrap_servers == "kafka.example:9092"
    assert mixed.database_url.get_secret_value() == "postgresql://x@127.0.0.1:2/y"


def test_operators_are_told_what_to_do_where_nothing_runs_and_nothing_is_set(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=r"SLUICE_BLOB_URL is not set.*`sluice up`.*--data-dir"):
        operator_settings(data_dir=tmp_path, needs=("blob_url",))


async def test_a_check_that_breaks_or_finds_something_keeps_no_other_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def well(_patient: Patient) -> str:
        return "all is well"

    async def ill(_patient: Patient) -> str:
        raise Ailing("it is broken", "mend it")

    async def tired(_patient: Patient) -> str:
        raise Ailing("it is slow", "let it rest", bearable=True)

    async def elsewhere(_patient: Patient) -> str:
        raise NotNeeded("nothing to see")

    async def breaking(_patient: Patient) -> str:
        raise ZeroDivisionError

    checks = [("well", well), ("tired", tired), ("elsewhere", elsewhere), ("ill", ill), ("breaking", breaking)]
    monkeypatch.setattr(doctor, "HERE", checks)
    monkeypatch.setattr(doctor, "THERE", [])

    findings = await doctor.examine(tmp_path)

    assert [(each.check, each.state) for each in findings] == [
        ("settings", "ok"),
        ("well", "ok"),
        ("tired", "warning"),
        ("elsewhere", "skipped"),
        ("ill", "wrong"),
        ("breaking", "wrong"),
    ]
    assert findings[4].mend == "mend it"
    assert "ZeroDivisionError" in findings[5].found
    assert not doctor.healthy(findings)
    assert doctor.healthy(findings[:4])


async def test_settings_that_cannot_be_understood_are_the_first_thing_a_doctor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_FILES_MAX", "many")

    findings = await doctor.examine(tmp_path)

    assert [each.state for each in findings] == ["wrong"]
    assert "SLUICE_FILES_MAX='many'" in findings[0].found


async def test_a_file_that_a_killed_up_left_behind_is_not_taken_for_a_running_one(tmp_path: Path) -> None:
    write_endpoints(tmp_path, {"kafka": "127.0.0.1:1", "pid": 2**22 + 1})

    patient = doctor.patient_in(tmp_path)

    assert not patient.runs
    with pytest.raises(Ailing, match="was killed") as found:
        await ailments_here.last_end(patient)
    assert found.value.bearable
    with pytest.raises(WrongUse, match="Nothing runs in"):
        await kafka_of(tmp_path, make=False).__aenter__()


async def test_a_taken_port_a_folder_that_cannot_be_written_and_an_old_year_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("SLUICE_API_PORT", str(taken.getsockname()[1]))
        patient = Patient(tmp_path / "deep" / "data", load(), {}, frozenset())
        with pytest.raises(Ailing, match=r"of the api \(--api-port\)"):
            await ailments_here.ports(patient)

    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(Ailing, match="cannot be written") as found:
        await ailments_here.folder(patient)
    assert "--data-dir" in found.value.mend

    monkeypatch.setattr(ailments_here.time, "time", lambda: 0.0)
    with pytest.raises(Ailing, match="1970"):
        await ailments_here.year(patient)
