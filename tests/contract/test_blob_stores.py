"""What every blob store does alike: a local folder, with and without fsync, and a bucket of a real S3 API."""

import asyncio
import hashlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from schemas.errors import Code
from services.blobs import BlobMissing, BlobStore, Incoming, Intake, LocalBlobs, Lying, Room, S3Blobs
from services.blobs.intake import FLUSH_BYTES, FLUSH_FILES
from services.blobs.local import LocalSink
from services.blobs.local_shelf import TRASH as LOCAL_TRASH
from services.blobs.s3_shelf import TRASH as S3_TRASH
from services.blobs.s3_sink import PART_BYTES_MIN
from tests.buckets import BUCKET, S3, a_bucket
from tests.examples import OTHER_UPLOAD, UPLOAD

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
PNG = b"\x89PNG\r\n\x1a\n"
LARGE = JPEG + bytes(2 * PART_BYTES_MIN) + b"its end"
"""So large that it comes to a bucket in parts."""


@dataclass
class Place:
    """A store, and its inside as somebody else sees it."""

    store: BlobStore
    inside: Path | S3
    trash: str

    def names(self) -> set[str]:
        """Everything that lies there."""
        if isinstance(self.inside, S3):
            return self.inside.names()
        return {path.relative_to(self.inside).as_posix() for path in self.inside.rglob("*") if path.is_file()}

    def content(self, name: str) -> bytes:
        return self.inside.content(name) if isinstance(self.inside, S3) else (self.inside / name).read_bytes()

    def lay(self, name: str, content: bytes = b"laid") -> str:
        if isinstance(self.inside, S3):
            self.inside.put(name, content)
        else:
            (self.inside / name).parent.mkdir(parents=True, exist_ok=True)
            (self.inside / name).write_bytes(content)
        return name

    def leftovers(self) -> list[str]:
        """What a file that did not become one left behind."""
        if isinstance(self.inside, S3):
            return self.inside.unfinished()
        return [path.name for path in self.inside.iterdir() if not any(path.iterdir())]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with a_bucket() as found:
        yield found


@pytest.fixture(params=["folder", "folder with fsync", "bucket"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> AsyncIterator[Place]:
    if request.param == "bucket":
        inside = S3(request.getfixturevalue("s3").port, f"{unique}/blobs")
        async with S3Blobs.open(BUCKET, prefix=inside.prefix) as bucket:
            yield Place(bucket, inside, S3_TRASH)
        return
    async with LocalBlobs.open(tmp_path / "blobs", fsync="fsync" in request.param) as folder:
        yield Place(folder, tmp_path / "blobs", LOCAL_TRASH)


def room(*, file_bytes_max: int = 100_000_000, files: int = 1_000, size_bytes: int = 10**9) -> Room:
    return Room(file_bytes_max, files, size_bytes)


class Full:
    """A file on a full disk: what was not written yet cannot be, whenever it is tried."""

    def close(self) -> None:
        raise OSError(28, "no space left on device")


async def test_what_is_discarded_on_a_full_disk_is_gone(tmp_path: Path) -> None:
    async with LocalBlobs.open(tmp_path, fsync=False) as store, Intake(store, room()) as intake:
        place = Place(store, tmp_path, LOCAL_TRASH)
        first, second = await take(intake, JPEG), await take(intake, PNG)
        await intake.flush()
        assert isinstance(first.sink, LocalSink)
        first.sink._file = cast("BinaryIO", Full())

        await intake.drop([first, second])

        assert place.names() == set()


async def take(intake: Intake, *pieces: bytes, upload_id: str = UPLOAD, hash_only: bool = False) -> Incoming:
    """One whole file, in these pieces."""
    incoming = intake.begin(upload_id, hash_only=hash_only)
    for piece in pieces:
        await intake.write(incoming, piece)
    await intake.end(incoming)
    return incoming


async def stored(place: Place, content: bytes, *, upload_id: str = UPLOAD) -> Incoming:
    async with Intake(place.store, room()) as intake:
        incoming = await take(intake, *in_pieces(content), upload_id=upload_id)
        await intake.flush()
        intake.keep()
    return incoming


def in_pieces(content: bytes) -> list[bytes]:
    return [content[start : start + 300_000] for start in range(0, len(content), 300_000)]


@pytest.mark.parametrize("content", [JPEG, JPEG + bytes(range(256)) * 400, LARGE], ids=["tiny", "small", "large"])
async def test_a_file_is_kept_whole_and_hashed(place: Place, content: bytes) -> None:
    async with Intake(place.store, room()) as intake:
        incoming = await take(intake, content[:3], content[3:700], *in_pieces(content[700:]))
        await intake.flush()
        intake.keep()

    assert (incoming.problem, incoming.content_type) == (None, "image/jpeg")
    assert (incoming.size_bytes, incoming.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert place.content(incoming.blob) == content
    assert place.names() == {incoming.blob}
    assert incoming.blob.startswith(f"{UPLOAD}/")


async def test_what_nobody_keeps_is_removed_at_the_end(place: Place) -> None:
    before: set[str] = set()
    with pytest.raises(ConnectionError):  # noqa: PT012  # the error must come out of the block
        async with Intake(place.store, room()) as intake:
            whole = await take(intake, JPEG)
            large = await take(intake, *in_pieces(LARGE))
            half = intake.begin(OTHER_UPLOAD)
            for piece in in_pieces(PNG + LARGE):
                await intake.write(half, piece)
            await intake.flush()
            before = place.names()
            raise ConnectionError

    assert before >= {whole.blob, large.blob}
    assert place.names() == set()
    assert place.leftovers() == []


async def test_what_is_dropped_after_it_was_kept_is_removed(place: Place) -> None:
    async with Intake(place.store, room()) as intake:
        first, second = await take(intake, JPEG), await take(intake, PNG, upload_id=OTHER_UPLOAD)
        await intake.flush()
        intake.keep()
        await intake.drop([second])
        await intake.drop([second])

    assert place.names() == {first.blob}


async def test_refused_files_are_hashed_to_their_end_and_not_kept(place: Place) -> None:
    empty, text = (), (b"only text", b" and more")
    large = tuple(in_pieces(LARGE))

    async with Intake(place.store, room(file_bytes_max=PART_BYTES_MIN + 1_000_000)) as intake:
        files = [await take(intake, *pieces) for pieces in (empty, text, large)]
        await intake.flush()
        intake.keep()

    assert [file.problem for file in files] == [Code.EMPTY_FILE, Code.UNSUPPORTED_MEDIA_TYPE, Code.FILE_TOO_LARGE]
    assert [file.sha256 for file in files] == [
        hashlib.sha256(b"".join(pieces)).hexdigest() for pieces in (empty, text, large)
    ]
    assert place.names() == set()
    assert place.leftovers() == []


async def test_files_fill_the_room_there_is(place: Place) -> None:
    async with Intake(place.store, room(files=2, size_bytes=1_000)) as intake:
        files = [
            await take(intake, JPEG.ljust(size, b"x"), upload_id=upload_id)
            for size, upload_id in ((600, UPLOAD), (500, OTHER_UPLOAD), (400, OTHER_UPLOAD), (100, OTHER_UPLOAD))
        ]
        await intake.flush()
        intake.keep()

    assert [file.problem for file in files] == [None, Code.BATCH_TOO_LARGE, None, Code.TOO_MANY_FILES]
    assert place.names() == {files[0].blob, files[2].blob}


async def test_bytes_that_are_here_already_are_only_hashed(place: Place) -> None:
    async with Intake(place.store, room(files=0)) as intake:
        incoming = await take(intake, JPEG, hash_only=True)
        await intake.flush()
        intake.keep()
        await intake.drop([incoming])

    assert (incoming.problem, incoming.kept) == (None, False)
    assert incoming.sha256 == hashlib.sha256(JPEG).hexdigest()
    assert place.names() == set()


async def test_files_are_there_once_as_many_wait_as_are_written_together(place: Place) -> None:
    async with Intake(place.store, room()) as intake:
        for _ in range(FLUSH_FILES - 1):
            await take(intake, JPEG, upload_id=OTHER_UPLOAD)
        before = place.names()
        await take(intake, JPEG, upload_id=OTHER_UPLOAD)
        after = place.names()

    assert (len(before), len(after)) == (0, FLUSH_FILES)


async def test_a_cancelled_write_is_over_before_its_file_is_removed(place: Place) -> None:
    writing, go_on, done = threading.Event(), threading.Event(), []

    def slow_work() -> None:
        writing.set()
        go_on.wait(5)
        done.append("written")

    task = asyncio.create_task(place.store.run(slow_work))
    await asyncio.to_thread(writing.wait, 5)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert done == ["written"]


async def test_a_request_that_is_cancelled_in_mid_file_leaves_nothing(place: Place) -> None:
    begun = asyncio.Event()

    async def request() -> None:
        async with Intake(place.store, room()) as intake:
            incoming = intake.begin(UPLOAD)
            for piece in in_pieces(LARGE):
                await intake.write(incoming, piece)
                if incoming.size_bytes > PART_BYTES_MIN + FLUSH_BYTES:
                    begun.set()
            await asyncio.Event().wait()

    asking = asyncio.create_task(request())
    await begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert place.names() == set()
    assert place.leftovers() == []


async def test_a_blob_is_read_in_any_span(place: Place) -> None:
    content = JPEG + bytes(range(256)) * 20_000
    incoming = await stored(place, content)
    spans = [(0, len(content)), (1_000, 700_000), (0, 1), (262_143, 262_145), (5_000_000, len(content)), (10, 10)]

    async with place.store.reading(incoming.blob) as blob:
        size_bytes = blob.size_bytes
        found = [b"".join([chunk async for chunk in blob.chunks(start, stop)]) for start, stop in spans]

    assert size_bytes == len(content)
    assert found == [content[start:stop] for start, stop in spans]


async def test_a_blob_is_brought_here_to_be_worked(place: Place, tmp_path: Path) -> None:
    content = JPEG + bytes(range(256)) * 20_000
    incoming = await stored(place, content)
    to = tmp_path / "copy"

    file = await place.store.bring(incoming.blob, to=to)
    found = file.path.read_bytes()
    to.unlink(missing_ok=True)

    assert (file.size_bytes, found) == (len(content), content)
    assert place.names() == {incoming.blob}


@pytest.mark.parametrize(
    "name",
    ["", "a", "../etc/passwd", f"{UPLOAD}/../x", f"{UPLOAD}/", f"{UPLOAD}/a/b", f"/{UPLOAD}/a", f"{UPLOAD}/a\n", "a/b"],
)
async def test_a_name_that_leads_elsewhere_is_no_name(place: Place, name: str, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        async with place.store.reading(name):
            pass
    with pytest.raises(BlobMissing):
        await place.store.bring(name, to=tmp_path / "copy")
    with pytest.raises(BlobMissing):
        await place.store.delete([name])
    with pytest.raises(BlobMissing):
        place.store.sink(name, bytes_max=1)


async def test_a_blob_that_is_gone_is_missing(place: Place, tmp_path: Path) -> None:
    name = f"{UPLOAD}/gone"

    with pytest.raises(BlobMissing, match=r"gone is not in the blob store"):
        async with place.store.reading(name):
            pass
    with pytest.raises(BlobMissing, match=r"gone is not in the blob store"):
        await place.store.bring(name, to=tmp_path / "copy")
    assert (await place.store.shelf().size(name), await place.store.shelf().sha256(name)) == (None, None)


async def test_the_thumbnail_of_the_newest_epoch_counts(place: Place, tmp_path: Path) -> None:
    made = tmp_path / "made.jpg"
    for epoch, attempt in ((3, 1), (12, 1), (20, 2)):
        made.write_bytes(f"{epoch} {attempt}".encode())
        await place.store.put_file(made, UPLOAD, epoch=epoch, attempt=attempt)

    name = await place.store.thumbnail(UPLOAD, attempt=1)

    assert name == f"{UPLOAD}/thumb-12-1"
    assert place.content(name) == b"12 1"
    assert not made.exists()
    with pytest.raises(BlobMissing):
        await place.store.thumbnail(UPLOAD, attempt=3)
    with pytest.raises(BlobMissing):
        await place.store.thumbnail(OTHER_UPLOAD, attempt=1)


async def test_removing_twice_is_removing_once(place: Place) -> None:
    first, second, other = place.lay(f"{UPLOAD}/a"), place.lay(f"{UPLOAD}/b"), place.lay(f"{OTHER_UPLOAD}/c")

    await place.store.delete([first])
    await place.store.delete([first])
    after = place.names()
    for _ in range(2):
        await place.store.delete_upload(UPLOAD)

    assert after == {second, other}
    assert place.names() == {other}
    assert place.leftovers() == []


async def test_a_store_that_works_passes_its_check_and_is_as_before(place: Place) -> None:
    await place.store.check()
    await place.store.check()

    assert place.names() == set()


async def test_what_lies_there_is_told_upload_by_upload(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.blobs.bucket._KEYS_AT_ONCE", 7)
    monkeypatch.setattr("services.blobs.local_shelf._FOLDERS_AT_ONCE", 7)
    upload_ids = [f"{UPLOAD[:-3]}{number:03x}" for number in range(30)]
    names = {place.lay(f"{each}/{file}") for each in upload_ids for file in ("original", "thumb-7-1")}
    place.lay("foreign/file")
    place.lay(f"{place.trash}/1/{UPLOAD}/trashed")
    now_s = time.time()

    groups = [group async for group in place.store.shelf().lying()]

    found: dict[str, Lying] = {each.name: each for group in groups for each in group}
    assert found.keys() == names
    assert {count for group in groups for count in Counter(each.upload_id for each in group).values()} == {2}
    assert {each.size_bytes for each in found.values()} == {len(b"laid")}
    assert all(abs(each.written_s - now_s) < 60 for each in found.values())
    assert len(groups) > 1


async def test_the_trash_keeps_names_and_gives_back(place: Place) -> None:
    shelf = place.store.shelf()
    name, other = place.lay(f"{UPLOAD}/a", JPEG), place.lay(f"{OTHER_UPLOAD}/b", PNG)

    for _ in range(2):
        await shelf.discard(name, sweep_s=1_000)
    await shelf.discard(other, sweep_s=2_000)
    in_trash = place.names()
    back = [await shelf.bring_back(other), await shelf.bring_back(other)]
    emptied = [await shelf.empty_trash(before_s=before_s) for before_s in (1_000, 1_001)]

    assert in_trash == {f"{place.trash}/1000/{name}", f"{place.trash}/2000/{other}"}
    assert (back, emptied) == ([True, False], [0, 1])
    assert place.names() == {other}
    assert (await shelf.size(other), await shelf.sha256(other)) == (len(PNG), hashlib.sha256(PNG).hexdigest())
