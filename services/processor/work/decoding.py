"""Decoding what strangers send: only what the header says is small enough, all of it, and with errors that are true.

Every frame is decoded, so a broken file is known to be broken; a jpeg at a fraction of its size, though its whole
stream is read all the same (damage that leaves a jpeg's stream decodable cannot be told from a picture). A GIF without
its trailer and a PNG without its end count as broken off. Decoders stumble in many ways over damaged files, and some
call a file broken when there is no memory for it: here it is sorted out which is which.
"""

import math
import resource
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from schemas.errors import WorkCode
from services.processor.work.containers import BrokenContainerError, check_png, gif_shape, jpeg_scans, webp_pixels
from services.processor.work.port import Progress, WorkError
from services.processor.work.thumbnails import THUMBNAIL_SIDE_MAX, fitted

# What the file itself says it is → how the contract calls it. A phone's MPO is a jpeg with others behind it; the first
# is the picture.
_FORMATS: Final = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "HEIF": "heic"}
OPENED_AS: Final = ("JPEG", "PNG", "WEBP", "GIF", "HEIF")

# The decoders of these call a file broken when there is no memory for it: what they take at most, with some room
# (measured: 6 for a progressive jpeg in full colour, 16 for WebP, 9 for HEIC).
_DECODING_BYTES_PER_PIXEL: Final = {"JPEG": 8, "MPO": 8, "WEBP": 20, "HEIF": 16}

# Damaged files make Pillow's parsers stumble in all these ways.
_DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What may be decoded, judged by the header: pixels of one frame, its longer side, frames, pixels of all frames,
    and pixels of all scans of a jpeg (each goes through the whole picture; an honest one has ten or so)."""

    pixels_max: int = 100_000_000
    side_pixels_max: int = 65_535
    frames_max: int = 2_000
    all_frames_pixels_max: int = 1_000_000_000
    all_scans_pixels_max: int = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture says about itself before anything of it is decoded; sizes in pixels, as stored."""

    format: str
    width: int
    height: int
    frames: int
    scans: int = 1


def refuse_bombs(header: Header, limits: ImageLimits) -> None:
    """Raises WorkError (`media_too_complex`, final) where decoding would take more than the limits allow."""
    pixels = header.width * header.height
    too_much = (
        (pixels > limits.pixels_max, f"has {pixels:,} pixels, {limits.pixels_max:,} are allowed"),
        (
            max(header.width, header.height) > limits.side_pixels_max,
            f"is {header.width}×{header.height} pixels, a side may have {limits.side_pixels_max:,}",
        ),
        (header.frames > limits.frames_max, f"has {header.frames:,} frames, {limits.frames_max:,} are allowed"),
        (
            pixels * header.frames > limits.all_frames_pixels_max,
            f"has {pixels * header.frames:,} pixels in all its frames, {limits.all_frames_pixels_max:,} are allowed",
        ),
        (
            pixels * header.scans > limits.all_scans_pixels_max,
            f"has {pixels:,} pixels in {header.scans:,} scans, {limits.all_scans_pixels_max:,} are allowed in all",
        ),
    )
    for exceeds, what in too_much:
        if exceeds:
            raise WorkError(WorkCode.MEDIA_TOO_COMPLEX, f"The picture {what}.", final=True)


def checked_container(path: Path, limits: ImageLimits) -> int | None:
    """Finds what decoders pass over: a PNG's checksums and end, a GIF's end. Returns how many frames a GIF has."""
    with path.open("rb") as file:
        start = file.read(8)
    try:
        if start == b"\x89PNG\r\n\x1a\n":
            check_png(path)
        shape = gif_shape(path) if start.startswith(b"GIF8") else None
    except BrokenContainerError as error:
        raise WorkError(WorkCode.CORRUPT_MEDIA, f"The picture is damaged: {error}.", final=True) from error
    if shape is None:
        return None
    refuse_bombs(Header("gif", shape.width, shape.height, shape.frames), limits)
    return shape.frames


@contextmanager
def opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    with decoder_errors():
        picture = Image.open(path, formats=OPENED_AS)
    with picture:
        assert isinstance(picture, ImageFile.ImageFile)
        yield picture


def header_of(picture: ImageFile.ImageFile, gif_frames: int | None, path: Path) -> Header:
    name = _FORMATS[picture.format or ""]
    if name == "jpeg":
        return Header(name, *picture.size, frames=1, scans=jpeg_scans(path))
    return Header(name, *picture.size, frames=gif_frames or int(getattr(picture, "n_frames", 1)))


def decoded_small(picture: ImageFile.ImageFile, header: Header, path: Path, progress: Progress) -> Image.Image:
    """Decodes all there is; the frame that is shown first, at thumbnail size but else as stored."""
    target = (THUMBNAIL_SIDE_MAX, THUMBNAIL_SIDE_MAX)
    drafted = picture.draft(None, target) if header.format == "jpeg" else None
    picture.load()
    small = _resizable(picture).resize(
        fitted(header.width, header.height, side_max=THUMBNAIL_SIDE_MAX),
        Image.Resampling.BICUBIC,
        box=drafted[1] if drafted else None,
        reducing_gap=1.0,
    )
    shown_first = picture.tell()
    for frame in range(header.frames):
        if frame != shown_first:
            _decode_frame(picture, header, path, frame)
            progress("decoding", 15 + 60 * (frame + 1) // header.frames)
    return small


def _decode_frame(picture: ImageFile.ImageFile, header: Header, path: Path, frame: int) -> None:
    if header.format == "heic":
        with Image.open(path, formats=OPENED_AS) as again:  # a HEIF file keeps what it decoded, until it is closed
            again.seek(frame)
            again.load()
    else:
        picture.seek(frame)
        picture.load()


def _resizable(picture: Image.Image) -> Image.Image:
    """The picture in a mode that can be scaled without harm: gray, colour or CMYK of 8 bits, with alpha or without."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        return picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    if picture.mode in ("L", "RGB", "CMYK"):
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")


@contextmanager
def pillow_set_up(limits: ImageLimits) -> Iterator[None]:
    """Pillow with our limit (it raises above twice its own, also where a decoder meets a size after the header)."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = (limits.pixels_max + 1) // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow remarks about odd files interests nobody
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def decoder_errors() -> Iterator[None]:
    """What decoders raise about a file, as final WorkErrors; trouble of this machine (memory, an errno) passes."""
    try:
        yield
    except Image.DecompressionBombError as error:
        allowed = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise WorkError(
            WorkCode.MEDIA_TOO_COMPLEX,
            f"The picture has more than the {allowed:,} pixels that are allowed.",
            final=True,
        ) from error
    except UnidentifiedImageError as error:
        raise WorkError(
            WorkCode.CORRUPT_MEDIA, "The file is not a picture, or the beginning of it is damaged.", final=True
        ) from error
    except _DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise WorkError(
            WorkCode.CORRUPT_MEDIA, f"The picture cannot be decoded: {str(error) or type(error).__name__}.", final=True
        ) from error


def memory_left_bytes() -> float:
    """How much more address space this process may take; infinity where nothing limits it."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    statistics = Path("/proc/self/statm")
    if limit_bytes == resource.RLIM_INFINITY or not statistics.exists():
        return math.inf
    return limit_bytes - int(statistics.read_text().split()[0]) * resource.getpagesize()


def decoding_bytes_max(path: Path) -> int:
    """What decoding may have needed at most; 0 where the file is no such picture, or its decoder owns up by itself."""
    with suppress(WorkError), opened(path) as picture:
        return picture.width * picture.height * _DECODING_BYTES_PER_PIXEL.get(picture.format or "", 0)
    return webp_pixels(path) * _DECODING_BYTES_PER_PIXEL["WEBP"]
