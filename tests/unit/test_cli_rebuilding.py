"""What replay, verify and quarantine say, as far as it takes no server."""

import json

import pytest

from schemas.records import StoredRecord
from services.cli import quarantine, rebuilding
from services.cli.errors import WrongUse
from services.processor.replay import Replayed
from services.processor.verifying import Difference, Verified
from tests.examples import LOG_ID

ENTRY = quarantine.Entry(LOG_ID, 0, 7, 1_767_268_800_000, "a tombstone: the record has no value")


def test_a_replay_says_what_is_in_quarantine_and_what_it_could_not_drop() -> None:
    done = Replayed(
        generation="gen_2",
        next_offsets={0: 325},
        records=325,
        seconds=1.2,
        held_ms=40,
        quarantined=3,
        old_dropped=False,
    )

    said = rebuilding.told(done, LOG_ID)

    assert said.startswith("The read models were rebuilt from 325 records in 0:02 and are live, to 1f3a9c02.0-324. ")
    assert "3 records are in quarantine" in said
    assert "the next replay drops them" in said


def test_differences_are_shown_by_table_key_and_column_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = Verified("gen_1", {0: 10}, rows={"uploads": 5}, differing={"uploads": 2, "users": 1})
    found.shown = [
        Difference("uploads", "an-id", "attempts", "7", "1"),
        Difference("uploads", "an-id", "error_code", None, "\x1b[2Jodd"),
        Difference("users", "ada", None, None, "id=ada"),
    ]

    rebuilding._show_verified(found, LOG_ID)

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["uploads", "an-id", "attempts", "7", "≠", "1"]
    assert lines[2][:5] == ["uploads", "an-id", "error_code", "(null)", "≠"]
    assert "\x1b" not in " ".join(lines[2])
    assert lines[3] == ["users", "ada", "(row)", "(no", "row)", "≠", "id=ada"]
    assert " ".join(lines[4]).startswith("Different as of 1f3a9c02.0-9: 2 of uploads, 1 of users.")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"plain text", "plain text"),
        ("Ísland".encode(), "Ísland"),
        (b"\x00\x1b[2J\xff\n", r"\x00\x1b[2J\xff\n"),
        (b"x" * 3_000, "x" * 2_000 + "… (cut; --json shows all)"),
        (b"\xff" * 100_000, r"\xff" * 500 + "… (cut; --json shows all)"),
        (None, ""),
    ],
)
def test_bytes_are_legible_on_a_terminal_whatever_they_are(value: bytes | None, shown: str) -> None:
    assert quarantine._legible(value) == shown


def test_a_record_is_shown_in_full_as_json_whatever_its_bytes_are() -> None:
    record = StoredRecord(0, 7, 1, key=None, value=b"\xff\x00", headers=(("ce_type", b"odd"), ("h", b"\xfe")))

    shown = json.loads(json.dumps(quarantine._in_full(ENTRY, record)))

    assert shown["position"] == "1f3a9c02.0-7"
    assert (shown["type"], shown["decodable"], shown["size_bytes"]) == ("odd", False, 2)
    assert (shown["key"], shown["key_base64"]) == (None, None)
    assert (shown["value"], shown["value_base64"]) == (None, "/wA=")
    assert shown["headers"] == [
        {"name": "ce_type", "value": "odd", "value_base64": "b2Rk"},
        {"name": "h", "value": None, "value_base64": "/g=="},
    ]


def test_only_what_is_in_quarantine_can_be_chosen() -> None:
    assert quarantine._chosen([ENTRY], ["1f3a9c02.0-7", "1f3a9c02.0-7"], LOG_ID) == [ENTRY]
    for wrong in ("1f3a9c02.0-8", "00000000.0-7", "nonsense"):
        with pytest.raises(WrongUse):
            quarantine._chosen([ENTRY], [wrong], LOG_ID)
