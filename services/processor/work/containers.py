"""What files say about themselves without being decoded, where Pillow does not tell.

Whether a PNG or a GIF is whole: Pillow is content without a PNG's end, and takes a GIF that breaks off between two
blocks for a shorter animation. A whole one ends with IEND (PNG specification, section 5.6) or with its trailer (GIF89a
specification, section 27). How much a GIF holds, how often a jpeg is gone through, and how large a WebP is, whose
decoder says nothing when it fails.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PNG_SIGNATURE_BYTES = 8
_PIECE_BYTES = 1 << 20
_TRAILER, _EXTENSION, _IMAGE = b";", b"!", b","
_SCAN = b"\xff\xda"
_HEADER_BYTES = 13
_DESCRIPTOR_BYTES = 9


class BrokenContainerError(Exception):
    """The file is not whole; says where it is damaged or breaks off."""


@dataclass(frozen=True, slots=True)
class GifShape:
    """`width` and `height` cover the screen and every frame, in pixels."""

    frames: int
    width: int
    height: int


def check_png(path: Path) -> None:
    """Every chunk's checksum, to the end; raises BrokenContainerError."""
    with path.open("rb") as file:
        _take(file, _PNG_SIGNATURE_BYTES)
        kind = b""
        while kind != b"IEND":
            left, kind = int.from_bytes(_take(file, 4), "big"), _take(file, 4)
            checksum = zlib.crc32(kind)
            while left:
                piece = _take(file, min(left, _PIECE_BYTES))
                checksum, left = zlib.crc32(piece, checksum), left - len(piece)
            if checksum != int.from_bytes(_take(file, 4), "big"):
                raise BrokenContainerError(f"the checksum before byte {file.tell()} is wrong")


def gif_shape(path: Path) -> GifShape:
    """What a GIF holds; raises BrokenContainerError."""
    with path.open("rb") as file:
        header = _take(file, _HEADER_BYTES)
        _skip_palette(file, flags=header[10])
        frames, width, height = 0, _u16(header, 6), _u16(header, 8)
        while (block := _take(file, 1)) != _TRAILER:
            if block == _EXTENSION:
                _take(file, 1)
                _skip_data(file)
            elif block == _IMAGE:
                right, bottom = _skip_image(file)
                frames, width, height = frames + 1, max(width, right), max(height, bottom)
            else:
                raise BrokenContainerError(f"there is no GIF block at byte {file.tell() - 1}")
    return GifShape(frames, width, height)


def jpeg_scans(path: Path) -> int:
    """How many scans a jpeg has at most: in one's data no such marker can stand (ITU-T T.81, section B.1.1.5)."""
    scans, last = 0, b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            scans += (last + piece).count(_SCAN)
            last = piece[-1:]
    return scans


def _skip_image(file: BinaryIO) -> tuple[int, int]:
    """Passes over one frame; its right and bottom edge on the screen."""
    descriptor = _take(file, _DESCRIPTOR_BYTES)
    _skip_palette(file, flags=descriptor[8])
    _take(file, 1)
    _skip_data(file)
    return _u16(descriptor, 0) + _u16(descriptor, 4), _u16(descriptor, 2) + _u16(descriptor, 6)


def _skip_palette(file: BinaryIO, *, flags: int) -> None:
    if flags & 0x80:
        _take(file, 3 << ((flags & 7) + 1))


def _skip_data(file: BinaryIO) -> None:
    while length := _take(file, 1)[0]:
        _take(file, length)


def _take(file: BinaryIO, count: int) -> bytes:
    taken = file.read(count)
    if len(taken) < count:
        raise BrokenContainerError(f"the file breaks off after {file.tell()} bytes")
    return taken


def _u16(octets: bytes, at: int) -> int:
    return int.from_bytes(octets[at : at + 2], "little")


def webp_pixels(path: Path) -> int:
    """Pixels of a WebP's canvas by its first chunk (RFC 9649, sections 2.5 to 2.7); 0 where that cannot be read."""
    with path.open("rb") as file:
        start = file.read(30)
    chunk = start[12:16]
    if len(start) < 30:  # noqa: PLR2004  # as far as the three kinds of first chunk are read
        return 0
    if chunk == b"VP8X":
        return (int.from_bytes(start[24:27], "little") + 1) * (int.from_bytes(start[27:30], "little") + 1)
    if chunk == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    return (_u16(start, 26) & 0x3FFF) * (_u16(start, 28) & 0x3FFF) if chunk == b"VP8 " else 0
