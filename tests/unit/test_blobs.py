"""The blob store without a server: when a folder is written, what a URL and a bucket's errors say, what a file is.

What every store does alike is in tests/contract/test_blob_stores.py.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.blobs import Incoming, Intake, LocalBlobs, Room, StorageUnavailable, sniff
from services.blobs.bucket import said
from services.blobs.intake import FLUSH_BYTES, FLUSH_FILES
from services.settings import Settings, SettingsError, load
from tests.examples import OTHER_UPLOAD, UPLOAD

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(params=[False, True], ids=["plain", "fsync"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalBlobs]:
    async with LocalBlobs.open(tmp_path / "blobs", fsync=request.param) as opened:
        yield opened


def files_of(store: LocalBlobs) -> list[str]:
    """The names of all blobs."""
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


async def take(intake: Intake, content: bytes, *, upload_id: str) -> Incoming:
    """One whole file."""
    incoming = intake.begin(upload_id)
    await intake.write(incoming, content)
    await intake.end(incoming)
    return incoming


async def test_bytes_are_written_once_a_mebibyte_or_64_files_wait(store: LocalBlobs) -> None:
    async with Intake(store, Room(10_000_000, 1_000, 10**9)) as intake:
        large = intake.begin(UPLOAD)
        await intake.write(large, JPEG + bytes(FLUSH_BYTES - len(JPEG) - 1))
        before = files_of(store)
        await intake.write(large, b"x")
        after = files_of(store)
        for _ in range(FLUSH_FILES - 1):
            await take(intake, JPEG, upload_id=OTHER_UPLOAD)
        small_before = len(files_of(store))
        await take(intake, JPEG, upload_id=OTHER_UPLOAD)
        small_after = len(files_of(store))

    assert (before, after) == ([], [large.blob])
    assert (small_before, small_after) == (1, 1 + FLUSH_FILES)


async def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StorageUnavailable, match="cannot be used"):
        async with LocalBlobs.open(tmp_path / "file" / "blobs", fsync=False):
            pass


@pytest.mark.parametrize(
    ("url", "bucket"),
    [
        ("s3://pictures", ("pictures", "")),
        ("s3://pictures/", ("pictures", "")),
        ("s3://my.pictures-1/sluice", ("my.pictures-1", "sluice")),
        ("s3://pictures/one/two_2/", ("pictures", "one/two_2")),
        ("file:///var/lib/sl@ice", None),
    ],
)
def test_a_blob_url_names_a_bucket_and_a_prefix_or_a_folder(url: str, bucket: tuple[str, str] | None) -> None:
    assert Settings(blob_url=url).blob_bucket == bucket


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3://ab",
        "s3://Pictures/x",
        "s3://pictures//x",
        "s3://pictures/../x",
        "s3://pictures/.",
        "s3://pictures/a b",
        "s3://pictures/x?versionId=1",
        "gs://pictures/x",
        "file://x",
        "/var/lib/sluice",
    ],
)
def test_a_blob_url_that_cannot_be_meant_stops_the_start_with_one_line(url: str) -> None:
    with pytest.raises(SettingsError, match=r"SLUICE_BLOB_URL=.* is not of the form") as refused:
        load(blob_url=url)

    assert len(str(refused.value).splitlines()) == 1


def test_credentials_in_a_blob_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError, match="AWS_SECRET_ACCESS_KEY") as refused:
        load(blob_url="s3://someone:hidden@pictures/x")

    assert "hidden" not in str(refused.value)


def test_an_endpoint_that_is_no_address_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")

    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL is not of the form http"):
        load(blob_url="s3://pictures")
    assert load(blob_url="file:///pictures").blob_bucket is None


ASKED = "Generic S3 error: Error performing PUT"
HIDDEN = "<Message>hidden</Message><AWSAccessKeyId>hidden</AWSAccessKeyId>"
REFUSED = f"{ASKED} http://s3:9000/b/x in 12ms - Server returned non-2xx status code: 403 Forbidden: <Error>{HIDDEN}"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            f"{REFUSED}<Code>SignatureDoesNotMatch</Code></Error>",
            "s3://b at http://s3:9000 refuses (403 Forbidden SignatureDoesNotMatch): check AWS_SECRET_ACCESS_KEY",
        ),
        (
            f"{REFUSED}<Code>NewCode</Code></Error>",
            "s3://b at http://s3:9000 refuses (403 Forbidden NewCode): see its own log",
        ),
        (
            f"{ASKED} http://s3:1/b/x in 1ms - HTTP error: timed out\n\nMore",
            "s3://b at http://s3:1 cannot be reached (HTTP error: timed out): check AWS_ENDPOINT_URL, and that it runs",
        ),
        (
            f"{ASKED} http://169.254.169.254/latest/api/token in 3s - HTTP error: timed out",
            "there are no credentials for s3://b: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
    ],
)
def test_a_refusal_is_a_sentence_that_repeats_nothing_secret(error: str, sentence: str) -> None:
    assert said("s3://b", OSError(error)) == sentence


def ftyp(major: str, *compatible: str) -> bytes:
    brands = "".join(compatible).encode()
    return (16 + len(brands)).to_bytes(4, "big") + b"ftyp" + major.encode() + bytes(4) + brands + bytes(16)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (JPEG, "image/jpeg"),
        (PNG, "image/png"),
        (b"GIF89a..", "image/gif"),
        (b"GIF87a..", "image/gif"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "image/webp"),
        (b"RIFF\x10\0\0\0AVI LIST", "video/x-msvideo"),
        (b"RIFF\x10\0\0\0WAVEfmt ", None),
        (ftyp("heic", "mif1", "heic"), "image/heic"),
        (ftyp("heix", "mif1"), "image/heic"),
        (ftyp("mif1", "heic"), "image/heic"),
        (ftyp("mif1", "mif1"), "image/heic"),
        (ftyp("msf1", "hevc"), "image/heic"),
        (ftyp("avif", "mif1", "miaf"), None),
        (ftyp("mif1", "avif"), None),
        (ftyp("isom", "iso2", "avc1", "mp41"), "video/mp4"),
        (ftyp("mp42"), "video/mp4"),
        (ftyp("M4V ", "isom"), "video/mp4"),
        (ftyp("M4A ", "isom", "mp42"), None),
        (ftyp("crx "), None),
        (ftyp("qt  "), "video/quicktime"),
        (b"\0\0\x10\0moov" + bytes(20), "video/quicktime"),
        (b"\0\0\0\x08wide\0\0\x10\0mdat", "video/quicktime"),
        (b"\x1aE\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm", "video/webm"),
        (b"\x1aE\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x40\x04webm", "video/webm"),
        (b"\x1aE\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x88matroska", None),
        (b"\x1aE\xdf\xa3\x42\x82", None),
        (b"\0\0\x01\xba\x44", "video/mpeg"),
        (b"\0\0\x01\xb3\x16", "video/mpeg"),
        (b"FLV\x01\x05", "video/x-flv"),
        (b"%PDF-1.7", None),
        (b"<svg xmlns=", None),
        (b"BM6\0\0\0", None),
        (b"", None),
        (b"\xff", None),
        (b"\0\0\0\x18ftyp", None),
    ],
)
def test_a_file_is_what_its_first_bytes_say(head: bytes, expected: str | None) -> None:
    assert sniff(head) == expected
