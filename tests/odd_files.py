"""Odd and hostile files, each with what may become of it: damaged, mislabelled, absurd, or only unusual.

`ODD_FILES` names them; a file is made when it is asked for, by the functions below. COMPLETED stands for a result;
where more than one verdict is honest (damage in pixels may or may not be noticed), all that are right are listed.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any, Final

import numpy as np
from PIL import Image

from schemas.errors import WorkCode
from tests import pictures, videos
from tests.pictures import encoded, exif_of, gif_of_frames, png_claiming, scene
from tests.videos import clip

COMPLETED: Final = "completed"
CORRUPT: Final = str(WorkCode.CORRUPT_MEDIA)
COMPLEX: Final = str(WorkCode.MEDIA_TOO_COMPLEX)
_FINE, _BROKEN, _BOMB = frozenset({COMPLETED}), frozenset({CORRUPT}), frozenset({COMPLEX})
_REFUSED = _BROKEN | _BOMB
_EITHER = _FINE | _BROKEN
_ANY = _FINE | _REFUSED

TYPES: Final = {**pictures.CONTENT_TYPES, **videos.CONTENT_TYPES}
TRUNCATED_AT: Final = (0.003, 0.05, 0.13, 0.31, 0.52, 0.74, 0.91, 0.993)
_NO_MEDIA: Final = {
    "nothing at all": b"",
    "zero bytes only": bytes(20_000),
    "a text": b"#!/bin/sh\necho no media here\n" * 100,
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n",
}
_REALLY: Final = (("jpeg", "mp4"), ("heic", "mov"), ("gif", "webm"), ("png", "flv"), ("webp", "mpeg"), ("mp4", "heic"))
_REALLY_TOO: Final = (("mov", "gif"), ("avi", "webp"), ("webm", "avi"), ("mpeg", "jpeg"), ("flv", "mpeg"))


@dataclass(frozen=True, slots=True)
class OddFile:
    name: str
    content_type: str
    may_become: frozenset[str]
    make: Callable[[], bytes]


@cache
def plain(form: str) -> bytes:
    """An honest file of this form."""
    if form in videos.CONTENT_TYPES:
        return clip(form, frames=30, sound_s=0.4)
    raw = exif_of({0x010F: "Camera"})
    return pictures.animated("gif") if form == "gif" else encoded(scene(), form, exif=raw)


def _odd(
    name: str, form: str, may_become: frozenset[str], make: Callable[..., bytes], *given: Any, **options: Any
) -> OddFile:
    return OddFile(f"{form}: {name}", TYPES[form], may_become, partial(make, *given, **options))


def _damaged() -> Iterator[OddFile]:
    for form in TYPES:
        for name, content in _NO_MEDIA.items():
            yield _odd(name, form, _BROKEN, bytes, content)
        for left in TRUNCATED_AT:
            yield _odd(f"cut after {left:.1%}", form, _BROKEN, _cut, form, left)
        for place in (0.1, 0.4, 0.8):
            yield _odd(f"zero bytes from {place:.0%} on", form, _EITHER, _zeroed, form, place)
        yield _odd("zero bytes behind its first ones", form, _BROKEN, _beginning, form, bytes(20_000))
        yield _odd("noise behind its first bytes", form, _REFUSED, _beginning, form, _noise(50_000))
        yield _odd("twice over", form, _FINE, _continued, form, plain)
        yield _odd("something behind its end", form, _FINE, _continued, form, _noise)
    for form, other in (*_REALLY, *_REALLY_TOO):
        yield _odd(f"really {other}", form, _BROKEN, plain, other)


def _pngs() -> Iterator[OddFile]:
    kinds = ((1, 0, "gray"), (2, 3, "palette"), (4, 3, "palette"), (16, 2, "RGB"), (16, 4, "gray+A"), (16, 6, "RGBA"))
    for bits, colour, name in kinds:
        yield _odd(f"{bits} bits a sample, {name}", "png", _FINE, png, 40, 30, bits, colour)
    yield _odd("interlaced", "png", _FINE, png, 1, 1, interlaced=True)
    yield _odd("a palette without colours", "png", _EITHER, png, 8, 8, 8, 3, palette=b"")
    yield _odd("a palette that is too short", "png", _EITHER, png, 8, 8, 8, 3, palette=b"\1\2\3")
    yield _odd("0 × 10", "png", _BROKEN, png, 0, 10)
    yield _odd("10 × 0", "png", _BROKEN, png, 10, 0)
    yield _odd("the largest header", "png", _REFUSED, png_claiming, 2**31 - 1, 2**31 - 1)
    yield _odd("20,000 × 20,000 claimed", "png", _BOMB, png_claiming, 20_000, 20_000)
    yield _odd("a line of 100,000", "png", _BOMB, png_claiming, 100_000, 1)
    yield _odd("256 MB in the place of one pixel", "png", _EITHER, _png_with, b"")
    yield _odd("a packed text of 256 MB", "png", _ANY, _png_with, b"zTXt")
    yield _odd("a packed colour profile of 256 MB", "png", _ANY, _png_with, b"iCCP")
    yield _odd("a chunk of 2 GB claimed", "png", _BROKEN, png, 8, 8, extra=b"\x7f\xff\xff\xfftEXt")
    yield _odd("100,000 texts", "png", _ANY, png, 8, 8, extra=_chunk(b"tEXt", b"a\0b") * 100_000)
    yield _odd("2,500 frames", "png", _BOMB, _png_of_frames, 2_500)


def _jpegs() -> Iterator[OddFile]:
    yield _odd("progressive", "jpeg", _FINE, encoded, scene(400, 300), "jpeg", progressive=True)
    yield _odd("CMYK", "jpeg", _FINE, encoded, scene(mode="CMYK"), "jpeg")
    yield _odd("gray", "jpeg", _FINE, encoded, scene(mode="L"), "jpeg")
    yield _odd("restart markers everywhere", "jpeg", _FINE, encoded, scene(), "jpeg", restart_marker_blocks=1)
    yield _odd("EXIF that leads back to itself", "jpeg", _FINE, encoded, scene(), "jpeg", exif=_looping_exif())
    yield _odd("8 channels", "jpeg", _BROKEN, jpeg_header, 8, 8, channels=8)
    yield _odd("2 channels", "jpeg", _BROKEN, jpeg_header, 8, 8, channels=2)
    yield _odd("12 bits a sample", "jpeg", _BROKEN, jpeg_header, 8, 8, bits=12)
    yield _odd("0 × 8", "jpeg", _BROKEN, jpeg_header, 0, 8)
    yield _odd("8 × 0", "jpeg", _BROKEN, jpeg_header, 8, 0)
    yield _odd("65,500 × 65,500 claimed", "jpeg", _BOMB, jpeg_header, 65_500, 65_500)
    yield _odd("10 MB of comments", "jpeg", _FINE, _jpeg_with, b"\xff\xfe\xff\xff" + bytes(65_533), times=150)
    yield _odd("a hundred blocks of EXIF", "jpeg", _EITHER, _jpeg_with, _EXIF_OF_64_KB, times=100)
    yield _odd("3,000 scans", "jpeg", _BOMB, jpeg_of_scans, 3_000)


def _gifs() -> Iterator[OddFile]:
    yield _odd("0 × 100 and no frame", "gif", _BROKEN, _gif_screen, 0, 100, b";")
    yield _odd(
        "a frame of 0 × 4", "gif", _BROKEN, _gif_screen, 4, 4, b"," + struct.pack("<HHHHB", 0, 0, 0, 4, 0) + b"\2\0;"
    )
    yield _odd("a screen of 65,535 × 65,535", "gif", _BOMB, _gif_screen, 65_535, 65_535, gif_of_frames(1)[19:])
    yield _odd("100,000 frames", "gif", _BOMB, gif_of_frames, 100_000)
    yield _odd("frames that are no LZW", "gif", _EITHER, gif_of_frames, 3)
    yield _odd("10 MB of comment", "gif", _FINE, _gif_with_comment, 40_000)


def _webps() -> Iterator[OddFile]:
    large, small = (16_383).to_bytes(3, "little"), (63).to_bytes(3, "little")
    yield _odd("lossless with alpha", "webp", _FINE, encoded, scene(mode="RGBA"), "webp", lossless=True)
    yield _odd("16,384 × 16,384 claimed", "webp", _REFUSED, _webp_claiming, bytes(4) + large + large)
    yield _odd("a picture that is missing", "webp", _BROKEN, _webp_claiming, bytes(4) + small + small)
    yield _odd("8 MB of EXIF", "webp", _FINE, encoded, scene(), "webp", exif=b"Exif\0\0" + bytes(8_000_000))


def _heics() -> Iterator[OddFile]:
    yield _odd("with alpha", "heic", _FINE, encoded, scene(mode="RGBA"), "heic")
    yield _odd("12 megapixels", "heic", _FINE, encoded, scene(4_000, 3_000), "heic", enc_params={"preset": "ultrafast"})
    yield _odd("gray", "heic", _FINE, encoded, scene(mode="L"), "heic")
    for width, height in ((0, 200), (320, 0), (60_000, 60_000), (0xFFFFFFFF, 0xFFFFFFFF)):
        size = struct.pack(">II", width, height)
        yield _odd(f"{width:,} × {height:,} claimed", "heic", _ANY, _patched, "heic", b"ispe", 4, size)
    yield _odd("boxes in boxes, 10,000 deep", "heic", _BROKEN, _behind_ftyp, b"heic", _nested(b"meta", 10_000))
    yield _odd("boxes without end", "heic", _BROKEN, _behind_ftyp, b"heic", _box(b"free", b"") * 500_000)


def _mp4s() -> Iterator[OddFile]:
    for form in ("mp4", "mov"):
        for inner in (b"moov", b"trak", b"udta", b"edts"):
            nested = _box(b"moov", _nested(inner, 10_000))
            yield _odd(f"{inner.decode()} in itself, 10,000 deep", form, _BROKEN, _behind_ftyp, b"isom", nested)
        yield _odd("boxes without end", form, _BROKEN, _behind_ftyp, b"isom", _box(b"free", b"") * 400_000)
        yield _odd("a box of 2⁶³ bytes", form, _BROKEN, _behind_ftyp, b"isom", b"\0\0\0\1free\x7f" + b"\xff" * 7)
        yield _odd("5,000 tracks", form, _BOMB, _many_tracks, 5_000)
        yield _odd("20 MB of metadata", form, _FINE, _continued, "mp4", _large_metadata)
    for table, offset in ((b"stsz", 8), (b"stts", 4), (b"stsc", 4), (b"stco", 4), (b"stss", 4), (b"elst", 4)):
        for count in (0xFFFFFFFF, 0x7FFFFFFF, 50_000_000, 0):
            name = f"{count:,} entries in {table.decode()}"
            yield _odd(name, "mp4", _ANY, _patched, "mp4", table, offset, struct.pack(">I", count))
    yield _odd("four billion samples of one byte", "mp4", _ANY, _patched, "mp4", b"stsz", 4, b"\0\0\0\1" + b"\xff" * 4)
    for size in ((0, 100), (160, 0), (65_535, 65_535)):
        name = f"{size[0]:,} × {size[1]:,} claimed"
        yield _odd(name, "mp4", _ANY, _patched, "mp4", b"mp4v", 24, struct.pack(">HH", *size))
    yield _odd("packed contents of 1 GB, it says", "mov", _REFUSED, _packed_contents)
    yield _odd("fragments", "mp4", _FINE, clip, "mp4", movflags="frag_keyframe+empty_moov")
    yield _odd("10 bits a sample", "mov", _FINE, clip, "mov", codec="prores_ks")
    yield _odd("alpha", "mov", _FINE, clip, "mov", codec="png")
    yield _odd("2 × 2 pixels", "mp4", _FINE, clip, "mp4", size=(2, 2))
    yield _odd("3,000 × 2 pixels", "mp4", _FINE, clip, "mp4", size=(3_000, 2), frames=2)
    yield _odd("its only key frame lost", "mp4", _EITHER, _without_key_frame)


def _avis() -> Iterator[OddFile]:
    for size in ((0, 100), (160, 0), (65_535, 65_535), (0x7FFFFFFF, 0x7FFFFFFF)):
        name = f"{size[0]:,} × {size[1]:,} claimed"
        yield _odd(name, "avi", _ANY, _patched, "avi", b"strf", 8, struct.pack("<II", *size))
    raw = clip("avi", codec="huffyuv", frames=2)
    for side, may_become in ((8_000, _BOMB), (60_000, _REFUSED)):
        name, size = f"raw, {side:,} × {side:,} claimed", struct.pack("<II", side, side)
        yield _odd(name, "avi", may_become, _patched_bytes, raw, b"strf", 8, size)
    yield _odd("lossless", "avi", _FINE, bytes, raw)
    yield _odd("lists in lists, 10,000 deep", "avi", _BROKEN, _riff, _nested_lists(10_000))
    yield _odd("chunks without end", "avi", _BROKEN, _riff, (b"JUNK" + bytes(4)) * 500_000)
    yield _odd("an index of two million", "avi", _FINE, _continued, "avi", _large_index)


def _webms() -> Iterator[OddFile]:
    endless = b"\x18\x53\x80\x67\x01" + b"\xff" * 7
    head = _element(b"\x1a\x45\xdf\xa3", _element(b"\x42\x82", b"webm"))
    yield _odd("written live", "webm", _FINE, clip, "webm", live="1")
    yield _odd("segments in segments, 10,000 deep", "webm", _BROKEN, bytes, head + endless * 10_000)
    yield _odd("tags in tags, 3,000 deep", "webm", _BROKEN, bytes, head + endless + _nested_tags(3_000))
    yield _odd("an element of 2⁵⁵ bytes", "webm", _BROKEN, bytes, head + endless + b"\xec\x01\x7f" + b"\xff" * 6)
    yield _odd("elements without end", "webm", _BROKEN, bytes, head + endless + b"\xec\x80" * 500_000)
    for width in (b"\0", b"\xff"):
        name = f"{width[0]} pixels wide, it says"
        yield _odd(name, "webm", _ANY, _patched, "webm", b"\xb0\x81", 0, width)


def _flvs() -> Iterator[OddFile]:
    deep = b"\x02\0\x0aonMetaData" + b"\x03\0\1a" * 20_000
    long = b"\x02\0\x0aonMetaData\x08\0\x01\0\0" + (b"\0\1a\x02\xff\xff" + b"x" * 65_535) * 100
    yield _odd("objects in objects, 20,000 deep", "flv", _EITHER, _flv_with_script, deep)
    yield _odd("6 MB of metadata", "flv", _EITHER, _flv_with_script, long)
    yield _odd("tags without end", "flv", _BROKEN, bytes, plain("flv")[:13] + (b"\x12" + bytes(14)) * 500_000)


def _mpegs() -> Iterator[OddFile]:
    yield _odd("a bare stream", "mpeg", _FINE, clip, "mpeg", muxer="mpeg1video", codec="mpeg1video")
    yield _odd("4,095 × 4,095 claimed", "mpeg", _EITHER, _mpeg_claiming, b"\xff\xff\xff")
    yield _odd("0 × 0 claimed", "mpeg", _BROKEN, _mpeg_claiming, bytes(3))
    yield _odd("16,383 × 16,383 claimed", "mpeg", _REFUSED, _mpeg_claiming, b"\xff\xff\xff", extended=True)
    yield _odd("packs without end", "mpeg", _BROKEN, bytes, plain("mpeg")[:12] * 500_000)
    yield _odd("start codes without end", "mpeg", _BROKEN, bytes, b"\0\0\1\xb3" * 500_000)


# How they are made


def png(
    width: int,
    height: int,
    bits: int = 8,
    colour: int = 2,
    *,
    data: bytes | None = None,
    palette: bytes | None = None,
    extra: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """A PNG of this depth and colour type (PNG specification, section 11.2.1), from black to white as it goes right.

    `extra` are chunks that stand before the data.
    """
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row_bytes = (width * samples * bits + 7) // 8
    row = b"\0" + bytes(255 * place // max(1, row_bytes - 1) for place in range(row_bytes))
    if palette is None:
        palette = bytes(255 * place // (3 << bits) for place in range(3 << bits)) if colour == 3 else b""
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)),
            _chunk(b"PLTE", palette) if palette else b"",
            extra,
            _chunk(b"IDAT", zlib.compress(row * height) if data is None else data),
            _chunk(b"IEND", b""),
        )
    )


def jpeg_header(width: int, height: int, *, channels: int = 3, bits: int = 8) -> bytes:
    """A jpeg that promises all this and then holds no more than a few bytes."""
    numbers = range(1, channels + 1)
    frame = struct.pack(">BHHB", bits, height, width, channels) + b"".join(bytes((n, 0x11, 0)) for n in numbers)
    scan = bytes((channels,)) + b"".join(bytes((n, 0)) for n in numbers) + b"\0\x3f\0"
    segments = ((b"\xff\xdb", b"\0" + b"\1" * 64), (b"\xff\xc0", frame), (b"\xff\xda", scan))
    return b"\xff\xd8" + b"".join(kind + struct.pack(">H", len(body) + 2) + body for kind, body in segments) + bytes(20)


def jpeg_of_scans(scans: int) -> bytes:
    """A progressive jpeg of 12 megapixels, its last scan as often as that: 150 kB for 3,000 times 12 megapixels."""
    content = encoded(Image.new("RGB", (4_000, 3_000), "gray"), "jpeg", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def _cut(form: str, left: float) -> bytes:
    return plain(form)[: max(1, int(len(plain(form)) * left))]


def _zeroed(form: str, place: float) -> bytes:
    content = plain(form)
    start, length = int(len(content) * place), len(content) // 10
    return content[:start] + bytes(length) + content[start + length :]


def _beginning(form: str, rest: bytes) -> bytes:
    return plain(form)[:32] + rest


def _continued(form: str, more: Callable[[Any], bytes]) -> bytes:
    return plain(form) + more(form)


@cache
def _noise(count: object) -> bytes:
    return np.random.default_rng(7).bytes(count if isinstance(count, int) else 5_000)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@cache
def _zeros_packed() -> bytes:
    """A quarter of a gigabyte of zeros, in a megabyte."""
    packer, piece = zlib.compressobj(1), bytes(1 << 24)
    return b"".join([*(packer.compress(piece) for _ in range(16)), packer.flush()])


def _png_with(kind: bytes) -> bytes:
    """A picture with 256 packed MB in a chunk of this kind; without one, in its data."""
    packed = _zeros_packed()
    return png(8, 8, extra=_chunk(kind, b"a\0\0" + packed)) if kind else png(1, 1, data=packed)


def _png_of_frames(frames: int) -> bytes:
    first, *others = (Image.new("L", (2, 2), step % 251) for step in range(frames))
    return encoded(first, "png", save_all=True, append_images=others)


_EXIF_OF_64_KB: Final = b"\xff\xe1\xff\xfeExif\0\0" + bytes(65_526)


def _jpeg_with(segment: bytes, *, times: int) -> bytes:
    jpeg = encoded(scene(), "jpeg")
    return jpeg[:2] + segment * times + jpeg[2:]


def _looping_exif() -> bytes:
    """One directory whose next one, and whose Exif directory, is itself."""
    return b"Exif\0\0II*\0\x08\0\0\0" + b"\1\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)


def _gif_screen(width: int, height: int, rest: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + rest


def _gif_with_comment(blocks: int) -> bytes:
    return plain("gif")[:-1] + b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0;"


def _webp_claiming(extended: bytes) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + extended + b"VP8L" + struct.pack("<I", 8) + b"\x2f" + bytes(7)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def _behind_ftyp(brand: bytes, boxes: bytes) -> bytes:
    return _box(b"ftyp", brand + bytes(4) + brand) + boxes


def _nested(kind: bytes, levels: int) -> bytes:
    return b"".join(struct.pack(">I", 8 * (levels - level)) + kind for level in range(levels))


def _patched(form: str, kind: bytes, offset: int, value: bytes) -> bytes:
    """The honest file with other bytes so far behind the first occurrence of this name."""
    return _patched_bytes(plain(form), kind, offset, value)


def _patched_bytes(content: bytes, kind: bytes, offset: int, value: bytes) -> bytes:
    at = content.index(kind) + len(kind) + offset
    return content[:at] + value + content[at + len(value) :]


def _large_metadata(_form: object) -> bytes:
    return _box(b"udta", _box(b"\xa9nam", struct.pack(">HH", 0xFFFF, 0) + bytes(20 << 20)))


def _many_tracks(tracks: int) -> bytes:
    content = clip("mp4", frames=2)
    start, at = content.index(b"moov") - 4, content.index(b"trak") - 4
    track = content[at : at + int.from_bytes(content[at : at + 4], "big")]
    return content[:start] + _box(b"moov", content[start + 8 : at] + track * tracks)


def _packed_contents() -> bytes:
    """A compressed movie header (QuickTime File Format, "Compressed Movie Resources")."""
    packed = _box(b"dcom", b"zlib") + _box(b"cmvd", struct.pack(">I", 1 << 30) + _zeros_packed())
    return _box(b"ftyp", b"qt  " + bytes(8)) + _box(b"moov", _box(b"cmov", packed))


def _without_key_frame() -> bytes:
    return _patched_bytes(clip("mp4", key_every=600), b"mdat", 0, bytes(400))


def _riff(body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"AVI " + body


def _nested_lists(levels: int) -> bytes:
    return b"".join(b"LIST" + struct.pack("<I", 12 * (levels - level) - 8) + b"hdrl" for level in range(levels))


def _large_index(_form: object) -> bytes:
    return b"idx1" + struct.pack("<I", 32_000_000) + b"00dc" * 8_000_000


def _element(kind: bytes, body: bytes) -> bytes:
    return kind + (len(body) | 1 << 56).to_bytes(8, "big") + body


def _nested_tags(levels: int) -> bytes:
    body = b""
    for _ in range(levels):
        body = _element(b"\x67\xc8", body)
    return _element(b"\x12\x54\xc3\x67", _element(b"\x73\x73", body))


def _flv_with_script(script: bytes) -> bytes:
    content = plain("flv")
    tag = b"\x12" + len(script).to_bytes(3, "big") + bytes(7) + script
    return content[:13] + tag + struct.pack(">I", len(tag)) + content[13:]


def _mpeg_claiming(size: bytes, *, extended: bool = False) -> bytes:
    """A bare stream whose every sequence header claims this size (12 bits a side; an extension has two more for each,
    ISO/IEC 13818-2, section 6.2.2.3)."""
    codec = "mpeg2video" if extended else "mpeg1video"
    start, *sequences = clip("mpeg", muxer=codec, codec=codec).split(b"\0\0\1\xb3")
    content = b"\0\0\1\xb3".join([start, *(size + sequence[3:] for sequence in sequences)])
    if extended:
        start, *extensions = content.split(b"\0\0\1\xb5")
        wide = (bytes((e[0], e[1] | 0x01, e[2] | 0xE0)) + e[3:] if e[0] >> 4 == 1 else e for e in extensions)
        content = b"\0\0\1\xb5".join([start, *wide])
    return content


ODD_FILES: Final = tuple(
    chain(
        *(_damaged(), _pngs(), _jpegs(), _gifs(), _webps(), _heics()),
        *(_mp4s(), _avis(), _webms(), _flvs(), _mpegs()),
    )
)
