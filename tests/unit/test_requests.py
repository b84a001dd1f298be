"""What callers send: the JSON body, names of files, fingerprints of requests.

A file's name decides its id (of a PUT), so making it safe must come to rest: safe twice is safe once.
"""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.requests import CreateBatch, key_hash, parts_hash, safe_filename
from schemas.text import FILENAME_BYTES_MAX


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("cat.jpg", "cat.jpg"),
        ("C:\\Users\\ada\\cat.jpg", "cat.jpg"),
        ("../../etc/passwd", "passwd"),
        ("/a/b/c.png", "c.png"),
        ("a\x00b\x1f\x7f\x85.jpg", "ab.jpg"),
        ("Zoe\u0308.jpg", "Zoë.jpg"),
        ("\udce9t\ud800é.jpg", "té.jpg"),
        ("evil\u202egpj.exe", "evilgpj.exe"),
        ("\u2066a\u2067\u2068\u2069\u202a\u202b\u202c\u202d\u200b\u2060\ufeffb.jpg", "ab.jpg"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e.jpg",) * 2,
        ("  spaced out .jpg ", "spaced out .jpg"),
        (".hidden", ".hidden"),
        ("no extension", "no extension"),
    ],
)
def test_a_filename_is_the_last_path_part_in_nfc_without_control_characters(given_name: str, kept: str) -> None:
    assert safe_filename(given_name) == kept


@pytest.mark.parametrize("name", ["", "/", "a/", "a\\", "\0", "\r\n", " ", ".", "..", "../.."])
def test_a_name_of_which_nothing_is_left_is_refused(name: str) -> None:
    assert safe_filename(name) is None


@pytest.mark.parametrize(
    ("given_name", "length", "ending"),
    [
        ("x" * 300 + ".jpeg", 255, "x.jpeg"),
        ("é" * 300 + ".jpg", 255 - 1, "é.jpg"),
        ("x" * 300, 255, "xxx"),
        ("a." + "x" * 300, 255, "xxx"),
        ("." + "x" * 300, 255, "xxx"),
    ],
)
def test_a_long_name_is_cut_and_keeps_its_extension(given_name: str, length: int, ending: str) -> None:
    name = safe_filename(given_name)

    assert name is not None
    assert len(name.encode()) in (length, length - 1)
    assert name.endswith(ending)


@given(st.text(st.characters(), max_size=300))
@example("x" * 254 + " y")
@example("x" * 254 + " y" * 40 + ".jpg")
@example("\u0344" * 200 + ".jpg")
@example("a" + "\u0301" * 200)
def test_a_safe_name_is_clean_short_and_safe_already(given_name: str) -> None:
    name = safe_filename(given_name)

    if name is not None:
        assert name not in ("", ".", "..")
        assert not any(character in name for character in "/\\\0\n")
        assert len(name.encode()) <= FILENAME_BYTES_MAX
        assert unicodedata.is_normalized("NFC", name)
        assert safe_filename(name) == name


def test_a_request_for_a_batch_may_say_nothing() -> None:
    request = CreateBatch.model_validate_json("{}")

    assert (request.name, request.expected_uploads, request.metadata) == (None, None, {})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"name": 5}', "name"),
        ('{"name": "' + "x" * 201 + '"}', "name"),
        ('{"name": "a\\u0000b"}', "name"),
        ('{"expected_uploads": -1}', "expected_uploads"),
        ('{"expected_uploads": "3"}', "expected_uploads"),
        ('{"expected_uploads": true}', "expected_uploads"),
        ('{"expected_uploads": 1.5}', "expected_uploads"),
        ('{"expected_uploads": 2147483648}', "expected_uploads"),
        ('{"metadata": []}', "metadata"),
        ('{"metadata": {"n": NaN}}', "metadata"),
        ('{"metadata": {"n": 1e400}}', "metadata"),
        ('{"metadata": {"x": "' + "x" * 16_000 + '"}}', "metadata"),
        ('{"metadata": {"x": ' + "[" * 100 + "]" * 100 + "}}", "metadata"),
        ('{"metdata": {}}', "metdata"),
    ],
)
def test_a_wrong_request_is_refused_and_the_field_named(body: str, field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CreateBatch.model_validate_json(body)

    assert caught.value.errors()[0]["loc"][0] == field


def test_a_key_counts_for_one_user_method_and_path() -> None:
    scopes = [
        ("ada", "POST", "/v1/batches", "k"),
        ("grace", "POST", "/v1/batches", "k"),
        ("ada", "PUT", "/v1/batches", "k"),
        ("ada", "POST", "/v1/batches/x/uploads", "k"),
        ("ada", "POST", "/v1/batches", "k2"),
        ("adaP", "OST", "/v1/batches", "k"),
    ]

    assert len({key_hash(*scope) for scope in scopes}) == len(scopes)
    assert key_hash(*scopes[0]) == key_hash(*scopes[0])


def test_the_fingerprint_of_a_body_depends_on_every_part_and_their_order() -> None:
    one, two = ("files", "a.jpg", "0" * 64), ("files", "b.jpg", "1" * 64)
    bodies = [[], [one], [two], [one, two], [two, one], [one, one], [("name", *one[1:])], [(one[0], "c.jpg", one[2])]]

    assert len({parts_hash(body) for body in bodies}) == len(bodies)
    assert parts_hash(iter([one, two])) == parts_hash([one, two])
