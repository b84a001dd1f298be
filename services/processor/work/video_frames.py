"""Frames of a video as they are decoded, and what of one is kept: a small picture, and whether it shows anything.

Key frames are decoded one at a time, each for itself; `played` decodes from the beginning, frame after frame. Colours
become RGB by what the frame says of itself, where it says nothing as players guess: HD as BT.709, else as BT.601.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, cast

import av.error
import numpy as np
from av.buffer import Buffer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from services.processor.work.thumbnails import THUMBNAIL_SIDE_MAX, fitted, on_white

_CLEAR_CONTRAST: Final = 16.0
"""The standard deviation of a frame's gray values (0 to 255) from which on it shows something."""
_PIXEL_SHAPE_MAX: Final = 8
_HD_LINES: Final = 720

# AVColorSpace, as far as scaling knows them: RGB, BT.709, FCC, BT.470 BG, SMPTE 240M and BT.2020.
_COLOUR_SPACES: Final = frozenset({0, 1, 4, 5, 7, 9})
_BT709, _BT601 = 1, 5


@dataclass(frozen=True, slots=True)
class Sight:
    """A decoded frame, small and in RGB, but not turned yet.

    `width` and `height` are its whole size, of square pixels; `matrix` says how it is to be shown (nine numbers,
    ISO/IEC 14496-12, section 8.2.2.3), None where it is upright.
    """

    small: Image.Image
    width: int
    height: int
    matrix: tuple[int, ...] | None
    contrast: float

    @property
    def is_clear(self) -> bool:
        return self.contrast >= _CLEAR_CONTRAST


def key_frame(decoder: VideoCodecContext, packet: "Packet[VideoStream]") -> list[VideoFrame]:
    """What this packet alone shows; raises FFmpegError."""
    try:
        return [*decoder.decode(packet), *decoder.decode(None)]
    finally:
        decoder.flush_buffers()


def played(decoder: VideoCodecContext, packets: Iterable["Packet[VideoStream]"]) -> Iterator[VideoFrame]:
    """The frames of these packets one after the other; what cannot be decoded is left out."""
    for packet in packets:
        if packet.size:
            yield from _decoded(decoder, packet)
    yield from _decoded(decoder, None)


def sight_of(frame: VideoFrame, pixel_shape: Fraction | None) -> Sight:
    """Raises FFmpegError where the frame's kind of pixels cannot be shown."""
    width, height = _with_square_pixels(frame.width, frame.height, pixel_shape)
    if frame.colorspace not in _COLOUR_SPACES:
        frame.colorspace = _BT709 if frame.height >= _HD_LINES else _BT601
    small_width, small_height = fitted(width, height, side_max=THUMBNAIL_SIDE_MAX)
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    scaled = frame.reformat(
        small_width, small_height, format="rgba" if has_alpha else "rgb24", interpolation="AREA", threads=1
    )
    small = on_white(Image.fromarray(scaled.to_ndarray()))
    contrast = float(np.asarray(small.convert("L"), dtype=np.float64).std())
    return Sight(small, width, height, _matrix(frame), contrast)


def _decoded(decoder: VideoCodecContext, packet: "Packet[VideoStream] | None") -> list[VideoFrame]:
    try:
        return decoder.decode(packet)
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return []


def _with_square_pixels(width: int, height: int, pixel_shape: Fraction | None) -> tuple[int, int]:
    """The size as shown: a pixel may be wider or narrower than high (DVDs); what is absurd is no such thing."""
    if pixel_shape is None or not Fraction(1, _PIXEL_SHAPE_MAX) <= pixel_shape <= _PIXEL_SHAPE_MAX:
        return width, height
    return max(1, round(width * pixel_shape)), height


def _matrix(frame: VideoFrame) -> tuple[int, ...] | None:
    side_data = cast("Mapping[str, Buffer]", frame.side_data)
    if "DISPLAYMATRIX" not in side_data:
        return None
    return tuple(np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32).tolist())
