"""Pictures made for tests: small, of any mode and format, whole or damaged; and the job that asks for one to be worked.

`scene` is a picture with something to see in every corner, so that a wrong turn or a lost frame shows.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pillow_heif
from PIL import Image, ImageDraw

from services.processor.work.port import Job

pillow_heif.register_heif_opener()

CONTENT_TYPES = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "heic": "image/heic",
}
CORNER_COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 220), (235, 220, 40))


def scene(width: int = 320, height: int = 200, *, mode: str = "RGB", step: int = 0) -> Image.Image:
    """Corners in red, green, blue and yellow (clockwise from the top left), and a disc that moves with `step`."""
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    half_width, half_height = width // 2, height // 2
    for colour, (x, y) in zip(CORNER_COLOURS, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True):
        corner = (x * half_width, y * half_height, x * half_width + half_width - 1, y * half_height + half_height - 1)
        draw.rectangle(corner, fill=colour)
    radius = max(1, min(width, height) // 6)
    x, y = half_width // 2 + step * radius, half_height
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 250, 250))
    return picture if mode == "RGB" else picture.convert(mode)


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    """The picture as a file of this form (`jpeg`, `png`, `webp`, `gif`, `heic`)."""
    file = io.BytesIO()
    picture.save(file, "HEIF" if form == "heic" else form.upper(), **options)
    return file.getvalue()


def animated(form: str, *, frames: int = 5, width: int = 120, height: int = 80) -> bytes:
    first, *others = (scene(width, height, step=step) for step in range(frames))
    return encoded(first, form, save_all=True, append_images=others, duration=50)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises that many pixels: the classic decompression bomb."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + _chunk(b"IEND", b"")
    )


def gif_of_frames(frames: int, *, side: int = 4) -> bytes:
    """A GIF of so many one-colour frames, a few bytes each."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * frames + b";"


def exif_of(base: dict[int, Any], *, details: dict[int, Any] | None = None, gps: dict[int, Any] | None = None) -> bytes:
    """EXIF from tags of the first directory, the Exif directory and the GPS directory."""
    exif = Image.Exif()
    exif.update(base)
    exif.get_ifd(0x8769).update(details or {})
    exif.get_ifd(0x8825).update(gps or {})
    return exif.tobytes()


def job_for(folder: Path, content: bytes, *, content_type: str = "image/jpeg", name: str = "picture") -> Job:
    """A job for these bytes, laid into the folder; its thumbnail goes there too."""
    path = folder / name
    path.write_bytes(content)
    return Job(
        upload_id="018f0000-0000-7000-8000-000000000001",
        batch_id="018f0000-0000-7000-8000-000000000002",
        filename=name,
        content_type=content_type,
        size_bytes=len(content),
        sha256="0" * 64,
        path=path,
        thumbnail_path=folder / f"{name}.thumb",
    )


def corners(picture: Image.Image) -> Sequence[int]:
    """Which of `CORNER_COLOURS` is seen in each corner, clockwise from the top left."""
    picture = picture.convert("RGB")
    right, bottom = picture.width * 7 // 8, picture.height * 7 // 8
    left, top = picture.width // 8, picture.height // 8
    return [_nearest(picture.getpixel(at)) for at in ((left, top), (right, top), (right, bottom), (left, bottom))]


def _nearest(seen: Any) -> int:
    distances = [sum((a - b) ** 2 for a, b in zip(seen, colour, strict=True)) for colour in CORNER_COLOURS]
    return distances.index(min(distances))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
