"""The codes callers meet: their HTTP status is the contract's, and every code has a meaning.

The table below is written out from the contract, not derived from the code.
"""

import re
from pathlib import Path

import pytest

from schemas.batch import CODE_OF, Ignored
from schemas.errors import MEANINGS, Code, RequestError, WorkCode, problem

ERRORS_PAGE = (Path(__file__).parents[2] / "docs/errors.md").read_text(encoding="utf-8")
STATUS_OF = {
    "invalid_request": 422,
    "invalid_position": 400,
    "digest_mismatch": 400,
    "empty_file": 400,
    "unauthorized": 401,
    "forbidden_scope": 403,
    "not_found": 404,
    "batch_sealed": 409,
    "batch_ended": 409,
    "filename_taken": 409,
    "not_failed": 409,
    "position_of_another_log": 409,
    "file_too_large": 413,
    "too_many_files": 413,
    "batch_too_large": 413,
    "unsupported_media_type": 415,
    "range_not_satisfiable": 416,
    "idempotency_key_reused": 422,
    "rate_limited": 429,
    "headers_too_large": 431,
    "log_unavailable": 503,
    "database_unavailable": 503,
    "projection_behind": 503,
    "outcome_unknown": 503,
}
WORK_CODES = {
    "corrupt_media",
    "media_too_complex",
    "work_timeout",
    "worker_crashed",
    "out_of_memory",
    "blob_missing",
    "internal_error",
}


@pytest.mark.parametrize(("code", "status"), STATUS_OF.items())
def test_a_code_of_the_contract_has_the_status_of_the_contract(code: str, status: int) -> None:
    assert MEANINGS[Code(code)].status == status


@pytest.mark.parametrize("code", Code)
def test_every_code_has_a_meaning_and_says_whether_to_ask_again(code: Code) -> None:
    meaning = MEANINGS[code]

    assert meaning.title
    assert (meaning.retry_after_s is not None) == (meaning.status in (429, 503))


def test_the_work_codes_are_those_of_the_contract() -> None:
    assert {str(code) for code in WorkCode} >= WORK_CODES


@pytest.mark.parametrize("reason", Ignored)
def test_what_the_fold_may_say_to_an_api_fact_has_a_code(reason: Ignored) -> None:
    said_to_others = {
        Ignored.REPETITION,  # counts as effective
        Ignored.UPLOAD_ENDED,
        Ignored.STALE_EPOCH,
        Ignored.UNEXPECTED_ATTEMPT,
        Ignored.COUNTS_DISAGREE,
        Ignored.MISPLACED,
    }

    assert (reason in CODE_OF) == (reason not in said_to_others)


def test_a_problem_document_has_the_members_of_rfc_9457_and_a_code() -> None:
    error = RequestError(Code.FILE_TOO_LARGE, "cat.jpg takes 200 bytes, 100 are allowed", {"rejected": []})

    assert problem(error) == {
        "type": "urn:sluice:error:file_too_large",
        "title": "The file is too large",
        "status": 413,
        "detail": "cat.jpg takes 200 bytes, 100 are allowed",
        "code": "file_too_large",
        "rejected": [],
    }
    assert str(error) == "file_too_large: cat.jpg takes 200 bytes, 100 are allowed"


@pytest.mark.parametrize("code", Code)
def test_the_page_about_errors_says_what_a_code_means_and_what_to_do(code: Code) -> None:
    rows = [line.split(" | ") for line in ERRORS_PAGE.splitlines() if line.startswith(f"| `{code}` | ")]

    assert (f"| `{code}`", str(MEANINGS[code].status)) in [(row[0], row[1]) for row in rows]
    assert all(len(cell.strip(" |")) > 5 for row in rows for cell in row[2:])


@pytest.mark.parametrize("code", WorkCode)
def test_the_page_about_errors_names_every_work_error(code: WorkCode) -> None:
    assert re.search(rf"^\| `{code}` \| [^|]{{5,}} \| [^|]{{5,}} \|$", ERRORS_PAGE, re.MULTILINE)


def test_the_page_about_errors_names_no_code_that_there_is_not() -> None:
    named = set(re.findall(r"^\| `([a-z_]+)` \|", ERRORS_PAGE, re.MULTILINE))

    assert named == {*map(str, Code), *map(str, WorkCode)}


def test_errors_are_told_apart_by_identity() -> None:
    error = RequestError(Code.NOT_FOUND, "no such batch")

    assert len({error, error, RequestError(Code.NOT_FOUND, "no such batch")}) == 2
    assert error != RequestError(Code.NOT_FOUND, "no such batch")
