"""The work on one video, as the handler does it: what it says, which frame it shows, what it refuses or disbelieves."""

import struct
import subprocess
import sys
from datetime import UTC, datetime
from fractions import Fraction

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from schemas.errors import WorkCode
from schemas.requests import CONTENT_TYPES as TAKEN
from schemas.text import RESULT_BYTES_MAX, json_bytes, storable_json
from services.blobs.sniff import sniff
from services.processor.work.child import load_handlers
from services.processor.work.demuxing import VideoLimits, open_container, opened_video
from services.processor.work.hashes import phash
from services.processor.work.port import WorkError
from services.processor.work.registry import installed_handlers
from services.processor.work.video_frames import sight_of
from services.processor.work.video_survey import TRIES_MAX, Extent, Survey, look_from_the_beginning, look_through
from services.processor.work.videos import VideoHandler, taken_at, turn_of
from tests.pictures import corners, encoded, job_for, scene
from tests.videos import CONTENT_TYPES, clip, sound_only, with_cover

BARE_MPEG = {"muxer": "mpeg1video", "codec": "mpeg1video"}
BLACK = Image.new("RGB", (160, 100), "black")


@pytest.fixture(scope="module")
def handler():
    handler = VideoHandler()
    handler.warm_up({})
    return handler


@pytest.fixture
def worked(handler, tmp_path):
    """Works these bytes; the result, with the thumbnail's picture under `seen`."""

    def work(content: bytes, form: str):
        job = job_for(tmp_path, content, content_type=CONTENT_TYPES[form])
        result = handler.work(job, _ignore)
        with Image.open(job.thumbnail_path) as thumbnail:
            thumbnail.load()
        assert job.thumbnail_path.stat().st_size == result["thumbnail"]["size_bytes"]
        assert thumbnail.format == "JPEG"
        return {**result, "seen": thumbnail}

    return work


@pytest.fixture
def refused(handler, tmp_path):
    """Works these bytes in vain; the WorkError."""

    def work(content: bytes, form: str) -> WorkError:
        with pytest.raises(WorkError) as caught:
            handler.work(job_for(tmp_path, content, content_type=CONTENT_TYPES[form]), _ignore)
        return caught.value

    return work


# What a video is


def test_all_videos_that_are_taken_are_worked():
    assert {content_type for content_type in TAKEN if content_type.startswith("video/")} == VideoHandler.content_types
    assert set(CONTENT_TYPES.values()) == VideoHandler.content_types
    assert installed_handlers()["video"] == "services.processor.work.videos:handler"


@pytest.mark.parametrize("form", CONTENT_TYPES)
@pytest.mark.parametrize("sound_s", [0.0, 0.8])
def test_every_format_gives_the_whole_result(worked, form, sound_s):
    content = clip(form, frames=20, size=(640, 400), sound_s=sound_s)

    result = worked(content, form)

    assert sniff(content) == CONTENT_TYPES[form]
    assert ("video", form, 640, 400, 25.0) == tuple(result[key] for key in ("kind", "format", "width", "height", "fps"))
    assert {key: result["thumbnail"][key] for key in ("width", "height")} == {"width": 256, "height": 160}
    assert result["duration_s"] == pytest.approx(0.8, abs=0.12)
    assert corners(result["seen"]) == [0, 1, 2, 3]
    assert len(result["phash"]) == 16
    assert list(result) == [
        *("kind", "format", "width", "height", "codec", "duration_s", "fps", "taken_at", "phash", "blurhash"),
        *("thumbnail", "seen"),
    ]


@pytest.mark.parametrize(
    ("form", "codec", "expected"),
    [
        ("mp4", "libx264", "h264"),
        ("mp4", "libx265", "hevc"),
        ("mov", "prores_ks", "prores"),
        ("mov", "qtrle", "qtrle"),
        ("webm", "libvpx-vp9", "vp9"),
        ("webm", "libsvtav1", "av1"),
        ("avi", "huffyuv", "huffyuv"),
        ("mpeg", "mpeg1video", "mpeg1video"),
        ("flv", "libx264", "h264"),
    ],
)
def test_the_codec_is_named_and_its_colours_kept(worked, form, codec, expected):
    result = worked(clip(form, codec=codec, frames=3), form)

    assert expected == result["codec"]
    assert corners(result["seen"]) == [0, 1, 2, 3]


def test_a_bare_mpeg_stream_is_a_video_too(worked):
    result = worked(clip("mpeg", frames=50, **BARE_MPEG), "mpeg")

    assert (result["format"], result["codec"], result["fps"]) == ("mpeg", "mpeg1video", 25.0)
    assert result["duration_s"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("lines", "space", "red"),
    [
        (480, 2, (81, 90, 240)),
        (720, 2, (63, 102, 240)),
        (720, 5, (81, 90, 240)),
        (480, 1, (63, 102, 240)),
        (480, 3, (81, 90, 240)),
    ],
)
def test_colours_are_those_of_the_frame_or_else_of_its_size(lines, space, red):
    # given a red frame as BT.601 or BT.709 have it, which says so (5, 1), says nothing (2) or nonsense (3)
    frame = av.VideoFrame(64, lines, "yuv420p")
    for plane, value in zip(frame.planes, red, strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace = space

    shown = sight_of(frame, None).small.getpixel((0, 0))

    assert shown == pytest.approx((255, 0, 0), abs=4)


def test_what_is_transparent_is_shown_white(worked):
    nothing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))

    seen = worked(clip("mov", codec="png", size=(64, 64), frames=2, show=lambda _step: nothing), "mov")["seen"]

    assert seen.getpixel((32, 32)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["mp4", "mov", "webm"])
@pytest.mark.parametrize(
    ("turn", "undo"),
    [
        ((90,), Image.Transpose.ROTATE_270),
        ((180,), Image.Transpose.ROTATE_180),
        ((-90,), Image.Transpose.ROTATE_90),
    ],
)
def test_a_video_from_a_turned_phone_is_shown_upright(worked, form, turn, undo):
    stored = scene(160, 100).transpose(undo)

    result = worked(clip(form, size=stored.size, frames=3, turn=turn, show=lambda _step: stored), form)

    assert (result["width"], result["height"]) == result["seen"].size == (160, 100)
    assert corners(result["seen"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        ((0, True, False), [1, 0, 3, 2]),
        ((0, False, True), [3, 2, 1, 0]),
        ((90, True, False), [2, 1, 0, 3]),
        ((90, False, True), [0, 3, 2, 1]),
    ],
)
def test_a_mirrored_video_is_turned_first_and_then_mirrored(worked, turn, shown):
    seen = worked(clip("mov", frames=3, turn=turn), "mov")["seen"]

    assert corners(seen) == shown
    assert seen.size == ((100, 160) if turn[0] else (160, 100))


@pytest.mark.parametrize("turn", [None, *Image.Transpose])
def test_every_matrix_turns_as_it_says(turn):
    # given the matrix by which a point at (1, 2) goes where this turn takes it, about the middle
    middle = Image.new("L", (5, 5))
    middle.putpixel((3, 4), 255)
    shown = middle if turn is None else middle.transpose(turn)
    x, y = next((x - 2, y - 2) for x in range(5) for y in range(5) if shown.getpixel((x, y)))
    straight = abs(x) == 1
    a, d = (x, y // 2) if straight else (0, 0)
    c, b = (x // 2, y) if not straight else (0, 0)

    assert turn == turn_of((a, b, 0, c, d, 0, 0, 0, 1))


def test_a_slight_turn_is_none():
    assert turn_of((65_000, 8_000, 0, -8_000, 65_000, 0, 0, 0, 1 << 30)) is None


@pytest.mark.parametrize(("shape", "width"), [(Fraction(16, 15), 171), (Fraction(1, 2), 80), (Fraction(100), 160)])
def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(worked, shape, width):
    result = worked(clip("mov", size=(160, 100), frames=3, pixel_shape=shape), "mov")

    assert (result["width"], result["height"]) == (width, 100)
    assert result["seen"].size == (width, 100)


# Which frame is shown


def test_a_video_that_begins_in_the_dark_shows_a_later_key_frame(worked):
    content = clip("mp4", frames=40, show=lambda step: BLACK if step < 20 else scene(160, 100))

    assert corners(worked(content, "mp4")["seen"]) == [0, 1, 2, 3]


def test_a_frame_from_behind_the_beginning_is_preferred(worked):
    opening, later = scene(160, 100).transpose(Image.Transpose.ROTATE_180), scene(160, 100)

    seen = worked(clip("mp4", frames=40, show=lambda step: opening if step < 5 else later), "mp4")["seen"]

    assert corners(seen) == [0, 1, 2, 3]


def test_a_fade_in_without_further_key_frames_is_played_until_it_shows_something(worked):
    content = clip("mp4", frames=60, key_every=600, show=lambda step: BLACK if step < 40 else scene(160, 100))

    assert corners(worked(content, "mp4")["seen"]) == [0, 1, 2, 3]


def test_a_video_of_nothing_shows_nothing_after_a_few_tries(tmp_path, worked):
    content = clip("avi", frames=200, key_every=1, size=(32, 32), show=lambda _step: BLACK.resize((32, 32)))

    seen = worked(content, "avi")["seen"]

    assert seen.convert("L").getextrema()[1] < 20
    assert _looked_through(tmp_path, content, "avi").tries == TRIES_MAX


def test_playing_ends_after_so_many_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("services.processor.work.video_survey.PLAYED_FRAMES_MAX", 7)
    content = clip("avi", frames=20, size=(32, 32), show=lambda step: BLACK.resize((32, 32)) if step < 10 else scene())
    path = job_for(tmp_path, content).path
    survey = Survey()

    with opened_video(path, "video/x-msvideo", VideoLimits()) as (container, video):
        look_from_the_beginning(container, video, survey, VideoLimits())

    assert not survey.opening.is_clear


def test_the_perceptual_hash_does_not_depend_on_the_format(worked):
    hashes = {
        form: worked(clip(form, size=(320, 200), frames=6, show=lambda _step: scene()), form)["phash"]
        for form in CONTENT_TYPES
    }

    picture = int(phash(scene(256, 160)), 16)
    assert max((int(other, 16) ^ picture).bit_count() for other in hashes.values()) <= 10


# How long it is, how fast, and from when


def test_a_webm_written_live_says_nothing_about_its_length_and_is_measured(worked):
    result = worked(clip("webm", frames=50, live="1"), "webm")

    assert (result["duration_s"], result["fps"]) == (2.0, 25.0)


@pytest.mark.parametrize("form", ["mp4", "mov", "avi", "webm", "mpeg", "flv"])
def test_fractional_rates_are_kept(worked, form):
    assert worked(clip(form, frames=60, rate=Fraction(30_000, 1001)), form)["fps"] == pytest.approx(29.97, abs=0.01)


@pytest.mark.parametrize("claimed_s", [0.0, 3.0, 1e9, float("nan"), float("inf"), -5.0])
def test_a_length_that_the_packets_do_not_bear_out_is_not_believed(worked, claimed_s):
    content = clip("flv", frames=50)
    at = content.index(b"\0\x08duration\0") + len(b"\0\x08duration\0")
    content = content[:at] + struct.pack(">d", claimed_s) + content[at + 8 :]

    assert worked(content, "flv")["duration_s"] == pytest.approx(2.0, abs=0.05)


def test_the_sound_counts_for_the_length_too(worked):
    assert worked(clip("mp4", frames=1, sound_s=3.0), "mp4")["duration_s"] == pytest.approx(3, abs=0.1)


def test_a_track_is_as_long_as_its_packets_say():
    extent = Extent(Fraction(1, 1000))
    for ticks in (None, 80, 0, 40):
        extent.add(ticks, 0)

    assert extent.span_s() == (0.0, pytest.approx(0.106))
    assert Extent(Fraction(1)).span_s() is None
    assert Extent(Fraction(1)).frames_per_second() is None


def test_after_so_many_packets_the_file_is_believed(tmp_path):
    content = clip("mp4", frames=40)

    survey = _looked_through(tmp_path, content, "mp4", VideoLimits(packets_max=10))

    assert not survey.whole
    job = job_for(tmp_path, content, content_type="video/mp4")
    assert VideoHandler(VideoLimits(packets_max=10)).work(job, _ignore)["duration_s"] == 1.6


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"creation_time": "2024-05-06T07:08:09.000000Z"}, "2024-05-06T07:08:09Z"),
        ({"creation_time": "2024-05-06 07:08:09"}, "2024-05-06T07:08:09Z"),
        ({"creation_time": "2024-05-06T07:08:09.250000Z"}, "2024-05-06T07:08:09.250Z"),
        (
            {
                "creation_time": "2024-05-06T07:10:00.000000Z",
                "com.apple.quicktime.creationdate": "2024-05-06T09:08:09+0200",
            },
            "2024-05-06T07:08:09Z",
        ),
        (
            {"creation_time": "2024-05-06T07:08:09Z", "com.apple.quicktime.creationdate": "yesterday"},
            "2024-05-06T07:08:09Z",
        ),
        ({"creation_time": "1904-01-01T00:00:00Z"}, None),
        ({"creation_time": "1970-01-01T00:00:00Z"}, None),
        ({"creation_time": "2025-01-03T00:00:00Z"}, None),
        ({"creation_time": "9999-12-31T23:59:59-12:00"}, None),
        ({"creation_time": "soon \ufffd"}, None),
        ({}, None),
    ],
)
def test_the_moment_it_was_taken_is_in_utc_and_plausible(metadata, expected):
    assert expected == taken_at(metadata, now=datetime(2025, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("form", ["mp4", "mov", "webm", "flv"])
def test_the_moment_it_was_taken_is_read_from_the_file(worked, form):
    content = clip(form, frames=2, metadata={"creation_time": "2024-05-06T07:08:09Z"})

    assert worked(content, form)["taken_at"] == "2024-05-06T07:08:09Z"


def test_metadata_that_is_no_text_costs_only_itself(worked):
    content = clip("mov", frames=2, metadata={"title": "XXXXXXXX"}).replace(
        b"XXXXXXXX", b"\xff\xfe\0\x80\xc3\x28\0\xff"
    )

    assert worked(content, "mov")["width"] == 160


def test_progress_comes_from_the_packets_and_never_goes_back(handler, tmp_path):
    reports = []
    job = job_for(tmp_path, clip("avi", frames=100), content_type="video/x-msvideo")

    handler.work(job, lambda *report: reports.append(report))

    assert [percent for _, percent in reports] == sorted(percent for _, percent in reports)
    assert list(dict.fromkeys(stage for stage, _ in reports)) == ["reading", "probing", "scanning", "describing"]
    assert len({percent for stage, percent in reports if stage == "scanning"}) >= 20


# What is refused


@pytest.mark.parametrize("form", CONTENT_TYPES)
@pytest.mark.parametrize("left", [0.02, 0.21, 0.51, 0.9, 0.99, "one byte less"])
def test_a_truncated_video_is_corrupt_for_good(refused, form, left):
    content = clip(form, frames=30)
    kept = len(content) - 1 if left == "one byte less" else int(len(content) * left)

    error = refused(content[:kept], form)

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)


@pytest.mark.parametrize(
    ("form", "options"), [("mp4", {"movflags": "faststart"}), ("webm", {"live": "1"}), ("avi", {"sound_s": 0.5})]
)
@pytest.mark.parametrize("left", [0.5, 0.8, 0.99])
def test_a_video_that_could_be_played_as_far_as_it_came_is_corrupt_all_the_same(refused, form, options, left):
    content = clip(form, frames=30, **options)

    assert "breaks off" in refused(content[: int(len(content) * left)], form).message


def test_a_cut_between_two_packets_of_a_stream_without_a_length_gives_the_shorter_video(worked):
    content = clip("mpeg", frames=60)
    second_pack = content.index(b"\0\0\1\xba", len(content) // 2)

    assert 0 < worked(content[:second_pack], "mpeg")["duration_s"] < 2


def test_a_recording_that_was_not_finished_says_so(refused):
    content = clip("mp4")

    assert "moov" in refused(content[: content.index(b"moov") - 4], "mp4").message


def test_a_recorder_that_could_not_go_back_to_write_the_length_is_forgiven(worked):
    content = bytearray(clip("avi"))
    content[4:8] = bytes(4)

    assert worked(bytes(content), "avi")["duration_s"] == 0.8


@pytest.mark.parametrize("form", ["mp4", "mov", "avi", "webm", "mpeg", "flv"])
def test_sound_without_a_video_is_corrupt(refused, form):
    error = refused(sound_only(form), form)

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)
    assert "no video" in error.message


def test_a_codec_that_nobody_knows_is_named_as_the_reason(refused):
    assert "codec" in refused(clip("avi").replace(b"MJPG", b"ZZZZ"), "avi").message


def test_where_memory_is_too_short_to_play_the_key_frame_will_do(worked, monkeypatch):
    def starve(*_given):
        raise MemoryError

    monkeypatch.setattr("services.processor.work.videos.look_from_the_beginning", starve)
    content = clip("mp4", frames=10, key_every=600, show=lambda _step: BLACK)

    assert worked(content, "mp4")["width"] == 160


def test_a_cover_picture_is_no_video(refused):
    assert "no video" in refused(with_cover(), "mp4").message


@pytest.mark.parametrize("form", CONTENT_TYPES)
@pytest.mark.parametrize("content", [b"", b"\0", b"no video", bytes(5_000), b"\xff" * 5_000])
def test_what_is_no_video_is_corrupt_for_good(refused, form, content):
    error = refused(content, form)

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)


@pytest.mark.parametrize("form", CONTENT_TYPES)
def test_no_format_is_guessed(refused, form):
    others = [clip(other, frames=2) for other in CONTENT_TYPES if {form, other} != {"mp4", "mov"} and form != other]

    for content in (*others, encoded(scene(), "gif"), encoded(scene(), "png"), encoded(scene(), "heic")):
        assert refused(content, form).code == WorkCode.CORRUPT_MEDIA


@pytest.mark.parametrize("form", CONTENT_TYPES)
def test_a_playlist_in_disguise_leads_nowhere(refused, tmp_path, form):
    other = tmp_path / "other.ts"
    other.write_bytes(clip("mpeg"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n".encode()

    for content in (playlist, f"ffconcat version 1.0\nfile {other}\n".encode()):
        assert refused(content, form).code == WorkCode.CORRUPT_MEDIA


@pytest.mark.parametrize("place", ["https://127.0.0.1:9/other.ts", "other.ts"])
def test_even_a_demuxer_that_follows_references_is_given_no_other_file(tmp_path, place):
    playlist = tmp_path / "playlist"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{place}\n#EXT-X-ENDLIST\n")

    with playlist.open("rb") as file, pytest.raises(WorkError, match="other files"):
        open_container(file, "hls", VideoLimits())


@pytest.mark.parametrize("form", CONTENT_TYPES)
@pytest.mark.parametrize("limit", [{"pixels_max": 160 * 100 - 1}, {"side_pixels_max": 159}])
def test_frames_above_the_limit_are_too_complex(tmp_path, form, limit):
    handler = VideoHandler(VideoLimits(**limit))

    with pytest.raises(WorkError) as caught:
        handler.work(job_for(tmp_path, clip(form), content_type=CONTENT_TYPES[form]), _ignore)

    assert (caught.value.code, caught.value.final) == (WorkCode.MEDIA_TOO_COMPLEX, True)
    assert "allowed" in caught.value.message or "may have" in caught.value.message


def test_too_many_tracks_are_too_complex(tmp_path):
    job = job_for(tmp_path, clip("mp4", sound_s=0.2), content_type="video/mp4")

    with pytest.raises(WorkError, match="2 tracks") as caught:
        VideoHandler(VideoLimits(tracks_max=1)).work(job, _ignore)

    assert (caught.value.code, caught.value.final) == (WorkCode.MEDIA_TOO_COMPLEX, True)


def test_finding_out_what_is_in_a_file_has_its_time(tmp_path):
    job = job_for(tmp_path, clip("mpeg", frames=200), content_type="video/mpeg")

    with pytest.raises(WorkError) as caught:
        VideoHandler(VideoLimits(probe_s_max=0.0)).work(job, _ignore)

    assert (caught.value.code, caught.value.final) == (WorkCode.WORK_TIMEOUT, False)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(sorted(CONTENT_TYPES)), data=st.data())
def test_damage_anywhere_gives_a_result_or_a_final_error_and_nothing_else(handler, tmp_path, form, data):
    content = bytearray(_small_files()[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    outcome = _outcome(handler, job_for(tmp_path, bytes(content), content_type=CONTENT_TYPES[form]))

    if isinstance(outcome, MemoryError):
        return  # a size without measure is refused by the allocator, and the child process names it
    if isinstance(outcome, WorkError):
        assert outcome.final
        assert outcome.code in (WorkCode.CORRUPT_MEDIA, WorkCode.MEDIA_TOO_COMPLEX)
    else:
        assert json_bytes(storable_json(outcome)) <= RESULT_BYTES_MAX


# The environment


def test_without_pyav_the_pictures_are_worked_all_the_same(monkeypatch):
    # given an installation without PyAV
    monkeypatch.setitem(sys.modules, "av", None)
    for name in [name for name in sys.modules if name.startswith(("services.processor.work.video", "av."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "services.processor.work.demuxing")

    # when the handlers are loaded
    references = {"image": "services.processor.work.images:handler", "video": "services.processor.work.videos:handler"}
    handlers, failures = load_handlers(references, {})

    # then pictures can be worked, and it is said why videos cannot
    assert list(handlers) == ["image"]
    assert list(failures) == ["video"]
    assert "av" in failures["video"]


def test_the_service_itself_does_not_load_pyav():
    code = "import sys, services.processor.main; sys.exit('av' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _looked_through(tmp_path, content, form, limits=None):
    limits = limits or VideoLimits()
    path = job_for(tmp_path, content).path
    with opened_video(path, CONTENT_TYPES[form], limits) as (container, video):
        return look_through(container, video, size_bytes=len(content), limits=limits, progress=_ignore)


def _outcome(handler, job):
    try:
        return handler.work(job, _ignore)
    except (WorkError, MemoryError) as error:
        return error


def _ignore(_stage: str, _percent: int) -> None:
    pass


_FILES: dict[str, bytes] = {}


def _small_files() -> dict[str, bytes]:
    if not _FILES:
        _FILES.update({form: clip(form, frames=4, size=(64, 48), sound_s=0.1) for form in CONTENT_TYPES})
    return _FILES
