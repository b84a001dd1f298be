"""The work on one picture: jpeg, png, webp, gif and heic.

It reads as the steps happen: the header says whether the picture may be decoded at all, then every frame is decoded
(`decoding`), then the first one becomes the thumbnail as a person sees it, upright, on white, in sRGB, and from it come
the hashes (`hashes`); what the camera wrote is cleaned (`exif`). What a second try cannot mend is a final WorkError;
MemoryError passes through to the child process, which knows its limits.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pillow_heif
from PIL import Image, ImageCms

from schemas.errors import WorkCode
from services.processor.work import exif
from services.processor.work.decoding import (
    OPENED_AS,
    Header,
    ImageLimits,
    checked_container,
    decoded_small,
    decoder_errors,
    decoding_bytes_max,
    header_of,
    memory_left_bytes,
    opened,
    pillow_set_up,
    refuse_bombs,
)
from services.processor.work.hashes import blurhash, phash
from services.processor.work.port import Job, Progress, WorkError
from services.processor.work.thumbnails import on_white, write_thumbnail

_ICC_BYTES_MAX: Final = 4 << 20
_HEIF_THREADS_MAX: Final = 2

# The EXIF orientation → how to turn what is stored into what is shown (EXIF 2.32, tag 0x0112).
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES: Final = frozenset({5, 6, 7, 8})


class ImageHandler:
    """The handler of pictures; its options are the fields of `ImageLimits`."""

    content_types = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif", "image/heic", "image/heif"})

    def __init__(self, limits: ImageLimits | None = None) -> None:
        self._limits = limits or ImageLimits()

    def warm_up(self, options: Mapping[str, Any]) -> None:
        """Loads the codecs and does everything once, on a picture of nothing, so that no file waits for it."""
        self._limits = ImageLimits(**options)
        pillow_heif.register_heif_opener(
            thumbnails=False,  # else an embedded thumbnail would be decoded where the picture is meant
            depth_images=False,
            aux_images=False,
            decode_threads=_HEIF_THREADS_MAX,
        )
        nothing = Image.new("RGBA", (32, 32))
        for name in ("JPEG", "PNG", "WEBP", "GIF"):
            encoded = io.BytesIO()
            nothing.convert("RGB").save(encoded, name)
            with Image.open(encoded, formats=OPENED_AS) as picture:
                picture.load()
        shown = _shown(nothing, icc=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), turn=None)
        phash(shown)
        blurhash(shown)

    def work(self, job: Job, progress: Progress) -> dict[str, Any]:
        left_bytes = memory_left_bytes()
        with pillow_set_up(self._limits):
            try:
                return self._result(job, progress)
            except WorkError as error:
                if error.code is WorkCode.CORRUPT_MEDIA and decoding_bytes_max(job.path) > left_bytes:
                    raise MemoryError from error  # a good file must not be blamed for it
                raise

    def _result(self, job: Job, progress: Progress) -> dict[str, Any]:
        progress("reading", 5)
        gif_frames = checked_container(job.path, self._limits)
        with opened(job.path) as picture:
            header = header_of(picture, gif_frames, job.path)
            refuse_bombs(header, self._limits)
            progress("decoding", 15)
            with decoder_errors():
                small = decoded_small(picture, header, job.path, progress)
            details = exif.read_exif(picture)
            icc = picture.info.get("icc_profile")
        progress("describing", 80)
        return _described(small, header, details=details, icc=icc, thumbnail_path=job.thumbnail_path)


def _described(
    small: Image.Image, header: Header, *, details: Image.Exif, icc: bytes | None, thumbnail_path: Path
) -> dict[str, Any]:
    """The contract's result; the thumbnail is written on the way."""
    turn = exif.orientation(details)
    shown = _shown(small, icc=icc, turn=_TURNS.get(turn))
    width, height = (header.height, header.width) if turn in _SWAPS_SIDES else (header.width, header.height)
    return {
        "kind": "image",
        "format": header.format,
        "width": width,
        "height": height,
        "frames": header.frames,
        "exif": exif.cleaned(details),
        "taken_at": exif.taken_at(details),
        "phash": phash(shown),
        "blurhash": blurhash(shown),
        "thumbnail": write_thumbnail(shown, thumbnail_path),
    }


def _shown(small: Image.Image, *, icc: bytes | None, turn: Image.Transpose | None) -> Image.Image:
    """As a person sees it: on white, in sRGB, upright."""
    small = _in_srgb(on_white(small), icc)
    return small if turn is None else small.transpose(turn)


def _in_srgb(small: Image.Image, icc: bytes | None) -> Image.Image:
    """Colours by the picture's own profile; where that is missing, damaged or another mode's, as they are."""
    if icc and len(icc) <= _ICC_BYTES_MAX:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(small, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            converted = None
        if converted is not None:
            return converted
    return small.convert("RGB")


handler = ImageHandler()
