"""The blob store: what is kept and what is not, what a file is, and names that lead nowhere else."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.errors import Code
from services.blobs import BlobMissing, BlobStore, Incoming, Intake, Room, StorageUnavailable, sniff
from services.blobs.intake import FLUSH_BYTES, FLUSH_FILES
from tests.examples import OTHER_UPLOAD, UPLOAD

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(params=[False, True], ids=["plain", "fsync"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlobStore]:
    async with BlobStore.open(tmp_path / "blobs", fsync=request.param) as opened:
        yield opened


def room(*, file_bytes_max: int = 10_000_000, files: int = 1_000, size_bytes: int = 10**9) -> Room:
    return Room(file_bytes_max, files, size_bytes)


def files_of(store: BlobStore) -> list[str]:
    """The names of all blobs."""
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


async def take(intake: Intake, *pieces: bytes, upload_id: str = UPLOAD, hash_only: bool = False) -> Incoming:
    """One whole file, in these pieces."""
    incoming = intake.begin(upload_id, hash_only=hash_only)
    for piece in pieces:
        await intake.write(incoming, piece)
    await intake.end(incoming)
    return incoming


async def test_a_file_is_kept_whole_and_hashed(store: BlobStore) -> None:
    content = JPEG + bytes(range(256)) * 40

    async with Intake(store, room()) as intake:
        incoming = await take(intake, content[:3], content[3:700], content[700:])
        await intake.flush()
        intake.keep()

    assert (incoming.problem, incoming.content_type) == (None, "image/jpeg")
    assert (incoming.size_bytes, incoming.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert store.path(incoming.blob).read_bytes() == content
    assert incoming.blob.startswith(f"{UPLOAD}/")


async def test_what_nobody_keeps_is_removed_at_the_end(store: BlobStore) -> None:
    with pytest.raises(ConnectionError):  # noqa: PT012  # the error must come out of the block
        async with Intake(store, room()) as intake:
            await take(intake, JPEG)
            half = intake.begin(OTHER_UPLOAD)
            await intake.write(half, PNG + bytes(2 * FLUSH_BYTES))
            assert len(files_of(store)) == 2
            raise ConnectionError

    assert list(store.folder.iterdir()) == []


async def test_what_is_dropped_after_it_was_kept_is_removed(store: BlobStore) -> None:
    async with Intake(store, room()) as intake:
        first, second = await take(intake, JPEG), await take(intake, PNG, upload_id=OTHER_UPLOAD)
        await intake.flush()
        intake.keep()
        await intake.drop([second])

    assert files_of(store) == [first.blob]


async def test_refused_files_are_hashed_to_their_end_and_not_kept(store: BlobStore) -> None:
    empty, text = (), (b"only text", b" and more")
    large = (JPEG, bytes(2_000))

    async with Intake(store, room(file_bytes_max=2_000)) as intake:
        files = [await take(intake, *pieces) for pieces in (empty, text, large)]
        await intake.flush()
        intake.keep()

    assert [file.problem for file in files] == [Code.EMPTY_FILE, Code.UNSUPPORTED_MEDIA_TYPE, Code.FILE_TOO_LARGE]
    assert [file.sha256 for file in files] == [
        hashlib.sha256(b"".join(pieces)).hexdigest() for pieces in (empty, text, large)
    ]
    assert list(store.folder.iterdir()) == []


async def test_files_fill_the_room_there_is(store: BlobStore) -> None:
    async with Intake(store, room(files=2, size_bytes=1_000)) as intake:
        files = [
            await take(intake, JPEG.ljust(size, b"x"), upload_id=upload_id)
            for size, upload_id in ((600, UPLOAD), (500, OTHER_UPLOAD), (400, OTHER_UPLOAD), (100, OTHER_UPLOAD))
        ]
        await intake.flush()
        intake.keep()

    assert [file.problem for file in files] == [None, Code.BATCH_TOO_LARGE, None, Code.TOO_MANY_FILES]
    assert files_of(store) == sorted([files[0].blob, files[2].blob])


async def test_bytes_that_are_here_already_are_only_hashed(store: BlobStore) -> None:
    async with Intake(store, room(files=0)) as intake:
        incoming = await take(intake, JPEG, hash_only=True)
        await intake.flush()
        intake.keep()

    assert (incoming.problem, incoming.kept) == (None, False)
    assert incoming.sha256 == hashlib.sha256(JPEG).hexdigest()
    assert files_of(store) == []


async def test_bytes_are_written_once_a_mebibyte_or_64_files_wait(store: BlobStore) -> None:
    async with Intake(store, room()) as intake:
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


async def test_a_cancelled_write_is_over_before_its_file_is_removed(store: BlobStore) -> None:
    writing, go_on, done = threading.Event(), threading.Event(), []

    def slow_work() -> None:
        writing.set()
        go_on.wait(5)
        done.append("written")

    task = asyncio.create_task(store.run(slow_work))
    await asyncio.to_thread(writing.wait, 5)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert done == ["written"]


async def test_a_blob_is_read_in_any_span(store: BlobStore) -> None:
    content = JPEG + bytes(range(256)) * 4_000
    async with Intake(store, room()) as intake:
        incoming = await take(intake, content)
        await intake.flush()
        intake.keep()

    async with store.reading(incoming.blob) as blob:
        whole = b"".join([chunk async for chunk in blob.chunks(0, blob.size_bytes)])
        middle = b"".join([chunk async for chunk in blob.chunks(1_000, 700_000)])

    assert (whole, middle) == (content, content[1_000:700_000])


@pytest.mark.parametrize(
    "name",
    ["", "a", "../etc/passwd", f"{UPLOAD}/../x", f"{UPLOAD}/", f"{UPLOAD}/a/b", f"/{UPLOAD}/a", f"{UPLOAD}/a\n", "a/b"],
)
async def test_a_name_that_leads_elsewhere_is_no_name(store: BlobStore, name: str) -> None:
    with pytest.raises(BlobMissing):
        store.path(name)


async def test_a_blob_that_is_gone_is_missing(store: BlobStore) -> None:
    with pytest.raises(BlobMissing, match="is not in the blob store"):
        async with store.reading(f"{UPLOAD}/gone"):
            pass


async def test_the_thumbnail_of_the_newest_epoch_counts(store: BlobStore, tmp_path: Path) -> None:
    for epoch, attempt in ((3, 1), (12, 1), (20, 2)):
        made = tmp_path / "made.jpg"
        made.write_bytes(f"{epoch} {attempt}".encode())
        await store.put_file(made, UPLOAD, epoch=epoch, attempt=attempt)

    name = await store.thumbnail(UPLOAD, attempt=1)

    assert name == f"{UPLOAD}/thumb-12-1"
    assert store.path(name).read_bytes() == b"12 1"
    with pytest.raises(BlobMissing):
        await store.thumbnail(UPLOAD, attempt=3)
    with pytest.raises(BlobMissing):
        await store.thumbnail(OTHER_UPLOAD, attempt=1)


async def test_removing_twice_is_removing_once(store: BlobStore, tmp_path: Path) -> None:
    made = tmp_path / "made.jpg"
    made.write_bytes(JPEG)
    name = await store.put_file(made, UPLOAD, epoch=1, attempt=1)

    await store.delete([name])
    await store.delete([name])
    await store.delete_upload(UPLOAD)

    assert list(store.folder.iterdir()) == []


async def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StorageUnavailable, match="cannot be used"):
        async with BlobStore.open(tmp_path / "file" / "blobs", fsync=False):
            pass


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
