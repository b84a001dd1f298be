"""The work on one picture, as the handler does it: what it says, what it refuses, and what it is not fooled by."""

import io
import json
import resource
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, TiffTags
from PIL.TiffImagePlugin import IFDRational

from schemas.errors import WorkCode
from schemas.text import RESULT_BYTES_MAX, json_bytes, storable_json
from services.processor.work import exif
from services.processor.work.containers import jpeg_scans
from services.processor.work.decoding import Header, ImageLimits, refuse_bombs
from services.processor.work.hashes import blurhash, phash
from services.processor.work.images import ImageHandler
from services.processor.work.port import WorkError
from services.processor.work.thumbnails import fitted
from tests.odd_files import jpeg_of_scans, png
from tests.pictures import (
    CONTENT_TYPES,
    animated,
    corners,
    encoded,
    exif_of,
    gif_of_frames,
    job_for,
    png_claiming,
    scene,
)

DEMO_PICTURES = Path(__file__).parents[2] / "services" / "demo" / "pictures"


@pytest.fixture(scope="module")
def handler():
    handler = ImageHandler()
    handler.warm_up({})
    return handler


@pytest.fixture
def worked(handler, tmp_path):
    """Works these bytes; the result, with the thumbnail's picture under `seen`."""

    def work(content: bytes, **options):
        job = job_for(tmp_path, content, **options)
        result = handler.work(job, lambda _stage, _percent: None)
        with Image.open(job.thumbnail_path) as thumbnail:
            thumbnail.load()
        assert job.thumbnail_path.stat().st_size == result["thumbnail"]["size_bytes"]
        assert thumbnail.format == "JPEG"
        return {**result, "seen": thumbnail}

    return work


@pytest.fixture
def refused(handler, tmp_path):
    """Works these bytes in vain; the WorkError."""

    def work(content: bytes) -> WorkError:
        with pytest.raises(WorkError) as caught:
            handler.work(job_for(tmp_path, content), lambda _stage, _percent: None)
        return caught.value

    return work


# What a picture is


@pytest.mark.parametrize("form", CONTENT_TYPES)
def test_every_format_gives_the_whole_result(worked, form):
    content = encoded(scene(640, 400), form)

    result = worked(content, content_type=CONTENT_TYPES[form])

    assert ("image", form, 640, 400, 1) == tuple(result[key] for key in ("kind", "format", "width", "height", "frames"))
    assert {key: result["thumbnail"][key] for key in ("width", "height")} == {"width": 256, "height": 160}
    assert corners(result["seen"]) == [0, 1, 2, 3]
    assert len(result["phash"]) == 16
    assert result["taken_at"] is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_a_png_makes_an_rgb_thumbnail(worked, mode):
    picture = scene(300, 300, mode="L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = picture.convert("I").point(lambda value: value * 257).convert("I;16")

    seen = worked(encoded(picture, "png"), content_type="image/png")["seen"]

    assert seen.mode == "RGB"
    expected_gray = scene(300, 300).convert("L").getpixel((260, 260))
    assert abs(seen.convert("L").getpixel((222, 222)) - expected_gray) < (130 if mode == "1" else 20)


@pytest.mark.parametrize("colour", [0, 2])
def test_a_png_of_16_bits_a_sample_keeps_its_shades(worked, colour):
    seen = worked(png(256, 64, 16, colour), content_type="image/png")["seen"].convert("L")

    assert [seen.getpixel((x, 32)) for x in (16, 128, 240)] == pytest.approx([16, 128, 240], abs=6)


@pytest.mark.parametrize("colour", [4, 6])
def test_alpha_of_16_bits_is_shown_on_white(worked, colour):
    # given a picture that goes from transparent black to opaque white
    seen = worked(png(256, 64, 16, colour), content_type="image/png")["seen"].convert("L")

    # then its middle, half of each, is lighter than the shade itself
    assert seen.getpixel((4, 32)) > 230
    assert seen.getpixel((250, 32)) > 230
    assert 180 < seen.getpixel((128, 32)) < 210


def test_a_heic_of_10_bits_keeps_its_colours(worked):
    raw = (np.asarray(scene(64, 48)).astype(np.uint16) * 257).tobytes()
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (64, 48), raw).save(file, quality=90)

    assert corners(worked(file.getvalue(), content_type="image/heic")["seen"]) == [0, 1, 2, 3]


def test_a_cmyk_jpeg_keeps_its_colours(worked):
    result = worked(encoded(scene(mode="CMYK"), "jpeg"))

    assert corners(result["seen"]) == [0, 1, 2, 3]


def test_a_gray_jpeg_is_worked(worked):
    assert worked(encoded(scene(mode="L"), "jpeg"))["width"] == 320


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_shown_white(worked, mode):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    options = {"transparency": 0} if mode == "P" else {}

    seen = worked(encoded(picture.convert(mode), "png", **options), content_type="image/png")["seen"]

    assert seen.getpixel((32, 32)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_a_transparent_animation_is_shown_white(worked, form):
    first, *others = (Image.new("RGBA", (64, 64), (0, 0, 0, 0)) for _ in range(3))
    for place, other in enumerate(others):
        other.putpixel((place, 0), (255, 0, 0, 255))
    content = encoded(first, form, save_all=True, append_images=others, duration=50)

    result = worked(content, content_type=CONTENT_TYPES[form])

    assert (result["frames"], result["seen"].getpixel((32, 32))) == (3, (255, 255, 255))


def test_a_transparent_heic_is_shown_white(worked):
    content = encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "heic")

    assert worked(content, content_type="image/heic")["seen"].getpixel((32, 32)) == (255, 255, 255)


def test_colours_are_shown_by_the_pictures_own_profile(worked):
    # given a picture whose profile says that its first channel is blue
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = swapped.replace(b"rXYZ", b"tttt").replace(b"bXYZ", b"rXYZ").replace(b"tttt", b"bXYZ")
    red = Image.new("RGB", (64, 64), (255, 0, 0))

    seen = worked(encoded(red, "png", icc_profile=swapped), content_type="image/png")["seen"]

    red_seen, _, blue_seen = seen.getpixel((32, 32))
    assert blue_seen > red_seen + 150


def test_a_damaged_colour_profile_costs_only_itself(worked):
    result = worked(encoded(scene(), "jpeg", icc_profile=b"no profile at all" * 20))

    assert corners(result["seen"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_all_eight_orientations_are_shown_upright(worked, form, orientation):
    # given a picture stored so that this orientation turns it upright
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = scene(640, 400) if orientation == 1 else scene(640, 400).transpose(undo[orientation])
    content = encoded(stored, form, exif=exif_of({ExifTags.Base.Orientation: orientation}))

    result = worked(content, content_type=CONTENT_TYPES[form])

    assert (result["width"], result["height"]) == (640, 400)
    assert result["seen"].size == (256, 160)
    assert corners(result["seen"]) == [0, 1, 2, 3]


def test_a_turned_heic_is_shown_upright_once_and_not_twice(worked):
    stored = scene(640, 400).transpose(Image.Transpose.ROTATE_90)
    content = encoded(stored, "heic", exif=exif_of({ExifTags.Base.Orientation: 6}))

    result = worked(content, content_type="image/heic")

    assert (result["width"], result["height"]) == (640, 400)
    assert corners(result["seen"]) == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 1200), height=st.integers(1, 1200))
def test_thumbnails_keep_the_shape_and_never_grow(worked, width, height):
    thumbnail = worked(encoded(Image.new("RGB", (width, height)), "jpeg", quality=30))["thumbnail"]

    longest = max(width, height)
    assert min(longest, 256) == max(thumbnail["width"], thumbnail["height"])
    scale = min(1, 256 / longest)
    assert abs(thumbnail["width"] - width * scale) <= 1
    assert abs(thumbnail["height"] - height * scale) <= 1


@given(width=st.integers(1, 10**6), height=st.integers(1, 10**6), side_max=st.integers(1, 1000))
def test_fitted_sizes_are_never_empty_and_never_too_large(width, height, side_max):
    fitted_width, fitted_height = fitted(width, height, side_max=side_max)

    assert 1 <= fitted_width <= min(width, side_max)
    assert 1 <= fitted_height <= min(height, side_max)


@pytest.mark.parametrize("form", ["gif", "webp", "png", "heic"])
def test_frames_are_counted_and_the_first_one_shown(worked, form):
    content = animated(form, frames=4)

    result = worked(content, content_type=CONTENT_TYPES[form])

    assert result["frames"] == 4
    assert _differing_bits(result["phash"], phash(scene(120, 80))) <= 6


def test_a_jpeg_with_more_pictures_behind_it_is_the_first_one(worked):
    content = encoded(scene(640, 400), "mpo", save_all=True, append_images=[scene(100, 100)])

    result = worked(content)

    assert tuple(result[key] for key in ("format", "width", "height", "frames")) == ("jpeg", 640, 400, 1)


def test_progress_comes_from_the_frames_and_never_goes_back(handler, tmp_path):
    reports = []

    handler.work(job_for(tmp_path, animated("gif", frames=8)), lambda *report: reports.append(report))

    assert [percent for _, percent in reports] == sorted(percent for _, percent in reports)
    assert list(dict.fromkeys(stage for stage, _ in reports)) == ["reading", "decoding", "describing"]
    assert sum(stage == "decoding" for stage, _ in reports) >= 8


# What is refused


@pytest.mark.parametrize("form", CONTENT_TYPES)
@pytest.mark.parametrize("left", [0.2, 0.5, 0.9, 0.99, "one byte less"])
def test_a_truncated_file_is_corrupt_for_good(refused, form, left):
    content = encoded(scene(640, 400), form)
    kept = len(content) - 1 if left == "one byte less" else int(len(content) * left)

    error = refused(content[:kept])

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_an_animation_that_breaks_off_in_a_later_frame_is_corrupt(refused, form):
    content = animated(form, frames=5)

    for kept in (len(content) * 7 // 10, len(content) - 1):
        assert refused(content[:kept]).code == WorkCode.CORRUPT_MEDIA


def test_a_gif_that_breaks_off_between_two_frames_is_corrupt(refused):
    whole = gif_of_frames(5)
    two_frames = whole[: len(gif_of_frames(2)) - 1]

    assert "breaks off" in refused(two_frames).message


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_noticed_though_it_is_decoded_small(refused, progressive):
    content = encoded(scene(2400, 1800), "jpeg", progressive=progressive)

    assert refused(content[: len(content) * 95 // 100]).code == WorkCode.CORRUPT_MEDIA


def test_a_png_with_a_wrong_checksum_is_corrupt(refused):
    content = bytearray(encoded(scene(), "png"))
    checksum_at = content.index(b"IEND") - 8 + 3
    content[checksum_at] ^= 0xFF

    error = refused(bytes(content))

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)


def test_a_png_with_damaged_data_and_right_checksums_is_corrupt(refused):
    header = b"\x89PNG\r\n\x1a\n"
    body = zlib.compress(b"\0" * 100)[:-8] + b"12345678"
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    content = header + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )

    assert refused(content).code == WorkCode.CORRUPT_MEDIA


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"\0\0\0\x18ftypheic",
    ],
)
def test_what_is_no_picture_is_corrupt_for_good(refused, content):
    error = refused(content)

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(sorted(CONTENT_TYPES)), data=st.data())
def test_damage_anywhere_gives_a_result_or_a_final_error_and_nothing_else(handler, tmp_path, form, data):
    content = bytearray(_small_files()[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    outcome = _outcome(handler, job_for(tmp_path, bytes(content)))

    if isinstance(outcome, WorkError):
        assert outcome.final
        assert outcome.code in (WorkCode.CORRUPT_MEDIA, WorkCode.MEDIA_TOO_COMPLEX)
    else:
        assert json_bytes(storable_json(outcome)) <= RESULT_BYTES_MAX


def test_a_bomb_is_refused_by_its_header_without_being_decoded(refused):
    content = png_claiming(20_000, 20_000)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()

    error = refused(content)

    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) * 1024
    assert (error.code, error.final) == (WorkCode.MEDIA_TOO_COMPLEX, True)
    assert "100,000,000 pixels" in error.message
    assert peak_bytes < 10_000_000
    assert grown_bytes < 20_000_000  # decoded, it would be 1.6 GB


@pytest.mark.parametrize("form", CONTENT_TYPES)
def test_every_format_is_measured_before_it_is_decoded(tmp_path, form):
    handler = ImageHandler()
    handler.warm_up({"pixels_max": 640 * 400 - 1})
    job = job_for(tmp_path, encoded(scene(640, 400), form))
    stages = []

    with pytest.raises(WorkError) as caught:
        handler.work(job, lambda stage, _percent: stages.append(stage))

    assert (caught.value.code, caught.value.final) == (WorkCode.MEDIA_TOO_COMPLEX, True)
    assert stages == ["reading"]


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (Header("png", 20_000, 5_001, 1), "pixels"),
        (Header("png", 70_000, 1, 1), "a side may have"),
        (Header("gif", 10, 10, 2_001), "frames"),
        (Header("gif", 1_000, 1_001, 1_000), "all its frames"),
        (Header("jpeg", 10_000, 10_000, 1, scans=51), "51 scans"),
    ],
)
def test_what_exceeds_a_limit_is_too_complex(header, why):
    with pytest.raises(WorkError, match=why) as caught:
        refuse_bombs(header, ImageLimits())

    assert (caught.value.code, caught.value.final) == (WorkCode.MEDIA_TOO_COMPLEX, True)


def test_what_just_keeps_the_limits_is_decoded():
    refuse_bombs(Header("gif", 10_000, 10_000, 10), ImageLimits())


def test_a_gif_of_too_many_frames_is_refused_after_a_walk_without_decoding(refused):
    error = refused(gif_of_frames(2_001))

    assert (WorkCode.MEDIA_TOO_COMPLEX, "2,001 frames" in error.message) == (error.code, True)


def test_a_jpeg_of_thousands_of_scans_is_refused_without_going_through_them(handler, tmp_path):
    stages = []

    with pytest.raises(WorkError, match="scans") as caught:
        handler.work(job_for(tmp_path, jpeg_of_scans(1_000)), lambda stage, _percent: stages.append(stage))

    assert (caught.value.code, caught.value.final) == (WorkCode.MEDIA_TOO_COMPLEX, True)
    assert stages == ["reading"]


def test_a_progressive_jpeg_has_its_ten_scans(tmp_path):
    path = job_for(tmp_path, encoded(scene(), "jpeg", progressive=True)).path

    assert jpeg_scans(path) == 10


def test_a_palette_without_colours_is_corrupt(refused):
    error = refused(png(8, 8, 8, 3, palette=b""))

    assert (error.code, error.final) == (WorkCode.CORRUPT_MEDIA, True)


# EXIF


def test_exif_is_readable_and_positions_are_decimal_degrees(worked):
    content = encoded(
        scene(),
        "jpeg",
        exif=exif_of(
            {ExifTags.Base.Make: "Nikon", ExifTags.Base.Orientation: 1},
            details={
                ExifTags.Base.ExposureTime: IFDRational(1, 125),
                ExifTags.Base.ISOSpeedRatings: 200,
                ExifTags.Base.ExifVersion: b"0232",
                ExifTags.Base.LensSpecification: (
                    IFDRational(24),
                    IFDRational(70),
                    IFDRational(28, 10),
                    IFDRational(4),
                ),
            },
            gps={
                ExifTags.GPS.GPSLatitudeRef: "S",
                ExifTags.GPS.GPSLatitude: (IFDRational(33), IFDRational(51), IFDRational(3564, 100)),
                ExifTags.GPS.GPSLongitudeRef: "E",
                ExifTags.GPS.GPSLongitude: (IFDRational(151), IFDRational(12), IFDRational(40)),
                ExifTags.GPS.GPSAltitude: IFDRational(58),
            },
        ),
    )

    found = worked(content)["exif"]

    assert found == {
        "Make": "Nikon",
        "Orientation": 1,
        "ExposureTime": 0.008,
        "ISOSpeedRatings": 200,
        "ExifVersion": "0232",
        "LensSpecification": [24, 70, 2.8, 4],
        "GPS": {"latitude": -33.8599, "longitude": 151.2111111, "altitude_m": 58.0},
    }


def test_exif_of_every_format_that_has_one_is_read(worked):
    raw = exif_of({ExifTags.Base.Make: "Camera"})

    for form in ("jpeg", "png", "webp", "heic"):
        found = worked(encoded(scene(), form, exif=raw), content_type=CONTENT_TYPES[form])["exif"]

        assert found["Make"] == "Camera", form


def test_what_the_log_cannot_hold_does_not_come_out_of_exif(worked):
    content = encoded(
        scene(),
        "jpeg",
        exif=exif_of(
            {
                ExifTags.Base.Make: "Ni\0kon",
                ExifTags.Base.Artist: "Zoë \x07 Ünal".encode(),
                ExifTags.Base.XResolution: IFDRational(1, 0),
                ExifTags.Base.YResolution: IFDRational(0, 0),
            },
            details={
                ExifTags.Base.MakerNote: b"\x01\x02" * 1000,
                ExifTags.Base.FNumber: IFDRational(0, 0),
                ExifTags.Base.UserComment: b"ASCII\0\0\0hello there\0\0",
                ExifTags.Base.CFAPattern: bytes(range(256)),
            },
        ),
    )

    found = worked(content)["exif"]

    assert storable_json(found) == {"Make": "Ni", "Artist": "Zoë   Ünal", "UserComment": "hello there"}


def test_text_in_utf_8_and_utf_16_is_read_as_such(worked):
    raw = exif_of(
        {
            ExifTags.Base.ImageDescription: "Gänseblümchen".encode(),
            ExifTags.Base.XPTitle: "Wiese 🌼".encode("utf-16-le"),
        }
    )

    found = worked(encoded(scene(), "jpeg", exif=raw))["exif"]

    assert found == {"ImageDescription": "Gänseblümchen", "XPTitle": "Wiese 🌼"}


def test_huge_exif_is_cut_and_the_result_stays_within_its_cap(worked):
    texts = [tag for tag in ExifTags.TAGS if TiffTags.lookup(tag).type == TiffTags.ASCII and tag != ExifTags.Base.Make]
    base = {tag: ("ä" * 20_000).encode() for tag in texts}
    content = encoded(scene(), "webp", exif=exif_of({ExifTags.Base.Make: "Camera", **base}))

    result = worked(content, content_type="image/webp")

    del result["seen"]
    assert result["exif"]["Make"] == "Camera"
    assert json_bytes(result) <= RESULT_BYTES_MAX
    assert 10_000 < len(json.dumps(result["exif"])) <= exif.JSON_BYTES_MAX


def test_absurdly_large_exif_is_not_even_parsed(worked):
    content = encoded(scene(), "webp", exif=b"Exif\0\0" + bytes(exif.EXIF_BYTES_MAX))

    assert worked(content, content_type="image/webp")["exif"] == {}


@pytest.mark.parametrize("raw", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_costs_only_itself(worked, raw):
    assert worked(encoded(scene(), "jpeg", exif=raw))["width"] == 320


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300), whole=st.booleans())
def test_exif_of_any_bytes_gives_what_the_log_can_hold(worked, raw, whole):
    real = exif_of({ExifTags.Base.Make: "Nikon"}, details={ExifTags.Base.DateTimeOriginal: "2024:01:01 00:00:00"})
    content = encoded(scene(40, 30), "jpeg", exif=real[:-20] + raw if whole else b"Exif\0\0" + raw)

    result = worked(content)

    storable_json(result["exif"])
    assert len(json.dumps(result["exif"])) <= exif.JSON_BYTES_MAX


# When it was taken


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({"DateTimeOriginal": "2015:02:11 18:03:42", "OffsetTimeOriginal": "-05:00"}, "2015-02-11T23:03:42Z"),
        ({"DateTimeOriginal": "2024:07:01 12:00:00", "SubsecTimeOriginal": "5"}, "2024-07-01T12:00:00.500Z"),
        ({"DateTimeOriginal": "2024:07:01 12:00:00", "OffsetTimeOriginal": "nonsense"}, "2024-07-01T12:00:00Z"),
        ({"DateTimeDigitized": "2001:01:01 00:00:00"}, "2001-01-01T00:00:00Z"),
        (
            {"DateTimeOriginal": "0000:00:00 00:00:00", "DateTimeDigitized": "2001:01:01 00:00:00"},
            "2001-01-01T00:00:00Z",
        ),
        ({"DateTimeOriginal": "    :  :     :  :  "}, None),
        ({"DateTimeOriginal": "2024:02:30 12:00:00"}, None),
        ({"DateTimeOriginal": "9999:12:31 23:59:59", "OffsetTimeOriginal": "-12:00"}, None),
        ({"OffsetTimeOriginal": "+01:00"}, None),
    ],
)
def test_the_moment_it_was_taken_is_in_utc(worked, details, expected):
    tags = {ExifTags.Base[name]: value for name, value in details.items()}

    assert expected == worked(encoded(scene(), "jpeg", exif=exif_of({}, details=tags)))["taken_at"]


# How it looks


def test_the_perceptual_hash_survives_scaling_and_another_codec(worked):
    with Image.open(DEMO_PICTURES / "cat.png") as picture:
        cat = picture.convert("RGB")

    hashes = [
        worked(content)["phash"]
        for content in (
            encoded(cat, "png"),
            encoded(cat.resize((900, 600)), "jpeg", quality=60),
            encoded(cat.resize((150, 100)), "webp"),
            encoded(cat.point(lambda value: value * 0.9 + 12), "jpeg"),
        )
    ]

    assert max(_differing_bits(hashes[0], other) for other in hashes) <= 6


def test_the_perceptual_hashes_of_different_pictures_differ(worked):
    hashes = [worked((DEMO_PICTURES / name).read_bytes())["phash"] for name in ("cat.png", "coffee.webp", "stream.jpg")]

    assert min(_differing_bits(a, b) for a in hashes for b in hashes if a != b) >= 16
    assert len(set(hashes)) == 3


def test_the_perceptual_hash_of_a_plain_surface_does_not_depend_on_its_size():
    assert len({phash(Image.new("RGB", (side, side), "#336699")) for side in (1, 8, 31, 256)}) == 1


def test_the_blurhash_has_more_detail_along_the_longer_side():
    # The first character holds both counts: (x - 1) + (y - 1) * 9, in base 83; the length follows from them.
    lying, standing = blurhash(scene(200, 100)), blurhash(scene(100, 200))

    assert (lying[0], len(lying)) == ("L", 4 + 2 * 12)
    assert (standing[0], len(standing)) == ("T", 4 + 2 * 12)


def test_the_demos_pictures_all_work_but_the_one_that_is_broken_on_purpose(handler, tmp_path):
    files = [path for path in DEMO_PICTURES.iterdir() if path.suffix != ".md"]

    worked = {path.name: _outcome(handler, job_for(tmp_path, path.read_bytes())) for path in files}

    broken = worked.pop("broken-download.jpg")
    assert (broken.code, broken.final) == (WorkCode.CORRUPT_MEDIA, True)
    assert {result["format"] for result in worked.values()} == set(CONTENT_TYPES)
    assert len(worked) >= 14


def _outcome(handler, job):
    try:
        return handler.work(job, lambda _stage, _percent: None)
    except WorkError as error:
        return error


def _differing_bits(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


_FILES: dict[str, bytes] = {}


def _small_files() -> dict[str, bytes]:
    if not _FILES:
        raw = exif_of({ExifTags.Base.Make: "Nikon", ExifTags.Base.Orientation: 6})
        for form in CONTENT_TYPES:
            _FILES[form] = animated("gif", frames=3) if form == "gif" else encoded(scene(64, 48), form, exif=raw)
    return _FILES
