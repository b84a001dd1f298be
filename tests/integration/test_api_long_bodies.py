"""Bodies that are too long, endless or odd: refused while they stream, and the answer is heard."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.api.forms import PARTS_MAX
from services.api.lingering import LINGER_BYTES_MAX
from services.auth import make_token
from tests.integration.api_client import (
    DONE_TIMEOUT_S,
    SECRET,
    Person,
    RunningApi,
    a_picture,
    api_settings,
    code_of,
    running_api,
)

MIB = 1024 * 1024
FILE_BYTES_MAX = 2 * MIB
ENOUGH_BYTES = FILE_BYTES_MAX + LINGER_BYTES_MAX + 16 * MIB
"""More than the api, the kernel and the client's own buffers take of a body that is refused."""


@pytest.fixture
async def api(kafka: str, database_url: str, unique: str, tmp_path: Path) -> AsyncIterator[RunningApi]:
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", file_bytes_max=FILE_BYTES_MAX
    )
    async with running_api(settings) as running:
        yield running


async def endless(api: RunningApi, request_line: str, content_type: str, beginning: bytes) -> bytes:
    """Send a body that never ends, in chunks, until the api hangs up: its answer. Fails if it takes whatever comes."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    token = make_token("ada", SECRET, ttl_s=600)
    head = f"{request_line} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
    writer.write(f"{head}Content-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    answer = bytearray()
    answering = asyncio.create_task(_read_into(answer, reader))
    sent, chunk = 0, beginning
    with contextlib.suppress(ConnectionError):
        while not answering.done():
            assert sent < ENOUGH_BYTES, "the api takes whatever comes"
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            sent, chunk = sent + len(chunk), bytes(64 * 1024)
            await writer.drain()
    await asyncio.wait_for(answering, DONE_TIMEOUT_S)
    writer.close()
    return bytes(answer)


async def _read_into(answer: bytearray, reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):  # who sends on after the answer is cut off at last
        while data := await reader.read(MIB):
            answer += data


async def test_an_endless_file_is_refused_while_it_streams(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()

    answer = await endless(api, f"PUT /v1/batches/{batch_id}/uploads/a.jpg", "image/jpeg", a_picture())

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"file_too_large"' in answer
    assert (await ada.put(batch_id, "a.jpg", a_picture())).status_code == 202
    assert len(api.blobs) == 1


async def test_what_is_no_picture_is_refused_after_its_first_bytes(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()

    answer = await endless(api, f"PUT /v1/batches/{batch_id}/uploads/a.jpg", "image/jpeg", b"no picture")

    assert b'"code":"unsupported_media_type"' in answer
    assert api.blobs == []


async def test_more_bytes_than_a_known_file_has_are_not_its_own(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()
    picture = a_picture()
    first = await ada.put(batch_id, "a.jpg", picture)

    answer = await endless(api, f"PUT /v1/batches/{batch_id}/uploads/a.jpg", "image/jpeg", picture)
    again = await ada.put(batch_id, "a.jpg", picture)

    assert b'"code":"filename_taken"' in answer
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])


async def test_a_form_longer_than_any_batch_is_refused_before_its_bytes(api: RunningApi) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    token = make_token("ada", SECRET, ttl_s=600)
    writer.write(
        f"POST /v1/batches HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 10000000000000\r\n\r\n".encode()
    )

    answer = await asyncio.wait_for(reader.read(), DONE_TIMEOUT_S)

    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"batch_too_large"' in answer


async def test_a_name_that_is_not_utf8_keeps_what_can_be_read_of_it(ada: Person) -> None:
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n' % (name, a_picture())
        for name in (b"good.jpg", b"caf\xe9.jpg", "café.jpg".encode())
    )

    answer = await ada.http.post(
        "/v1/batches", content=body + b"--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )

    assert answer.status_code == 202, answer.text
    names = [upload["filename"] for upload in answer.json()["accepted"]]
    assert names == ["good.jpg", "caf\ufffd.jpg", "café.jpg"]


async def test_a_part_with_endless_headers_is_no_form(ada: Person) -> None:
    long = "a" * 100_000
    body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{long}.jpg"\r\n\r\nx\r\n--x--\r\n'

    answer = await ada.http.post(
        "/v1/batches", content=body.encode(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )

    assert (answer.status_code, code_of(answer)) == (422, "invalid_request")


async def test_a_form_of_too_many_parts_says_so(ada: Person) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\nx\r\n'

    answer = await ada.http.post(
        "/v1/batches",
        content=part * (PARTS_MAX + 1) + b"--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )

    assert (answer.status_code, code_of(answer)) == (413, "too_many_files")
