"""Opening what strangers call a video: one given format, one given file, and nothing that either leads to.

The demuxer is forced from the content type, so no file is guessed into a playlist, a script or an image sequence; it
reads from an open file and is refused any other, so it reaches neither the network nor the disk. What FFmpeg says about
a file becomes a final WorkError here; want of memory passes, for the child process knows its limits.
"""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, Final, NoReturn

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from schemas.errors import WorkCode
from services.processor.work.decoding import memory_left_bytes
from services.processor.work.port import WorkError
from services.processor.work.video_containers import starts_as_program_stream

FORMATS: Final = {
    "video/mp4": "mp4",
    "video/quicktime": "mov",
    "video/x-msvideo": "avi",
    "video/webm": "webm",
    "video/mpeg": "mpeg",
    "video/x-flv": "flv",
}
"""Content type → how the contract calls the format."""

_DEMUXERS: Final = {"mp4": "mov", "webm": "matroska"}
_BARE_MPEG: Final = "mpegvideo"
_OPENING_BYTES_MAX: Final = 256 << 20
"""With so much memory left every honest file can be opened."""
_STREAMS_MAX: Final = 200
"""Where the demuxer gives up; how many may be worked is a limit."""


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What is looked at: pixels of a frame and its longer side (8K passes), tracks, packets that are followed, and how
    much of a file may be read, for how long, to find out what is in it."""

    pixels_max: int = 36_000_000
    side_pixels_max: int = 16_384
    tracks_max: int = 32
    packets_max: int = 1_000_000
    probe_bytes_max: int = 5_000_000
    probe_s_max: float = 20.0


class _GivenFile:
    """The one file a demuxer may read, without its name: that leads nowhere else.

    Until `opened` is called reading takes no longer than the limit. Places that are none, as damaged files name them,
    are an error of the file, not of this machine.
    """

    def __init__(self, file: BinaryIO, limits: VideoLimits) -> None:
        self._file = file
        self._deadline_s = monotonic() + limits.probe_s_max
        self.tell = file.tell

    def opened(self) -> None:
        self._deadline_s = math.inf

    def read(self, count: int) -> bytes:
        if monotonic() >= self._deadline_s:
            raise WorkError(WorkCode.WORK_TIMEOUT, "It took too long to find out what is in the video.")
        return self._file.read(count)

    def seek(self, place: int, whence: int) -> int:
        try:
            return self._file.seek(place, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -errno.EINVAL


@contextmanager
def opened_video(path: Path, content_type: str, limits: VideoLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and the video in it that a player would show; raises WorkError where there is none."""
    with path.open("rb") as file:
        with demuxer_errors("The video cannot be opened"):
            container = open_container(file, _demuxer(path, content_type), limits)
        with container:
            yield container, _shown_video(container, limits)


def open_container(file: BinaryIO, demuxer: str, limits: VideoLimits) -> InputContainer:
    """By this demuxer, and nothing but this file; raises FFmpegError, WorkError, MemoryError."""
    left_bytes = memory_left_bytes()
    given = _GivenFile(file, limits)
    try:
        container = av.open(
            given,
            "r",
            format=demuxer,
            options={"threads": "1"},
            container_options={
                "probesize": str(limits.probe_bytes_max),
                "max_streams": str(_STREAMS_MAX),
                "enable_drefs": "0",
            },
            metadata_errors="replace",
            io_open=_refuse_another_file,
        )
    except MemoryError as error:  # which is also what FFmpeg says of too many streams
        if left_bytes < _OPENING_BYTES_MAX:
            raise
        raise _too_complex("lists more than can be held in memory") from error
    given.opened()
    return container


@contextmanager
def demuxer_errors(what: str) -> Iterator[None]:
    """What FFmpeg raises about a file, as a WorkError that begins with `what`; MemoryError passes."""
    try:
        yield
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise WorkError(WorkCode.CORRUPT_MEDIA, f"{what}: {error.strerror}.", final=True) from error


def refuse_large_frames(width: int, height: int, limits: VideoLimits) -> None:
    """Raises WorkError (`media_too_complex`, final) where decoding would take more than the limits allow."""
    if width * height > limits.pixels_max:
        raise _too_complex(f"has frames of {width * height:,} pixels, {limits.pixels_max:,} are allowed")
    if max(width, height) > limits.side_pixels_max:
        raise _too_complex(f"is {width}×{height} pixels, a side may have {limits.side_pixels_max:,}")


def _shown_video(container: InputContainer, limits: VideoLimits) -> VideoStream:
    """The first video that is no cover picture, one marked as the default before others."""
    if len(container.streams) > limits.tracks_max:
        raise _too_complex(f"has {len(container.streams):,} tracks, {limits.tracks_max:,} are allowed")
    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        raise WorkError(WorkCode.CORRUPT_MEDIA, "The file holds no video.", final=True)
    known = [stream for stream in videos if stream.codec_context is not None]  # type: ignore[redundant-expr]  # its stub errs
    if not known:
        raise WorkError(WorkCode.CORRUPT_MEDIA, "The video's codec is none that is known here.", final=True)
    video = max(known, key=lambda stream: bool(stream.disposition & Disposition.default))
    refuse_large_frames(video.codec_context.width, video.codec_context.height, limits)
    return video


def _demuxer(path: Path, content_type: str) -> str:
    name = FORMATS[content_type]
    if name == "mpeg" and not starts_as_program_stream(path):
        return _BARE_MPEG
    return _DEMUXERS.get(name, name)


def _refuse_another_file(_url: str, _flags: int, _options: Any) -> NoReturn:
    raise WorkError(
        WorkCode.CORRUPT_MEDIA, "The video consists of other files, which did not come with it.", final=True
    )


def _too_complex(what: str) -> WorkError:
    return WorkError(WorkCode.MEDIA_TOO_COMPLEX, f"The video {what}.", final=True)
