"""The work on one video: mp4, mov, avi, webm, mpeg and flv.

It reads as the steps happen: the container is followed to its end (`video_containers`), opened under limits
(`demuxing`) and looked through (`video_survey`), which gives a frame (`video_frames`); turned upright it becomes the
thumbnail, and from that come the hashes. What a file claims about its length and pace counts only where its packets
bear it out. What a second try cannot mend is a final WorkError; MemoryError passes through to the child process.
"""

import io
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from schemas.errors import WorkCode
from services.processor.work.containers import BrokenContainerError
from services.processor.work.decoding import memory_left_bytes
from services.processor.work.demuxing import FORMATS, VideoLimits, demuxer_errors, opened_video
from services.processor.work.hashes import blurhash, phash
from services.processor.work.port import Job, Progress, WorkError
from services.processor.work.thumbnails import write_thumbnail
from services.processor.work.video_containers import check_video
from services.processor.work.video_frames import Sight
from services.processor.work.video_survey import Survey, look_from_the_beginning, look_through

_DURATION_S_MAX: Final = 366 * 86_400
_FPS_MAX: Final = 1_000
_DURATION_TOLERANCE: Final = (0.01, 0.1)
_FPS_TOLERANCE: Final = (0.05, 0.0)
"""By how much a claim may miss what was measured: as a share of it, and beside that in its unit."""
_EARLIEST: Final = datetime(1990, 1, 1, tzinfo=UTC)
"""Before that nobody took digital videos: clocks that were never set say 1904, 1970 or 1980."""
_DECODING_BYTES_PER_PIXEL: Final = 16

# Where a display matrix sends the axes (are the sides swapped, is the new x negative, is the new y) → how to turn.
_TURNS: Final = {
    (False, False, False): None,
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
_SWAPS_SIDES: Final = frozenset(turn for (swaps, _, _), turn in _TURNS.items() if swaps)


class VideoHandler:
    """The handler of videos; its options are the fields of `VideoLimits`."""

    content_types = frozenset(FORMATS)

    def __init__(self, limits: VideoLimits | None = None) -> None:
        self._limits = limits or VideoLimits()

    def warm_up(self, options: Mapping[str, Any]) -> None:
        """Does everything once, on a video of nothing, so that no file waits for it."""
        self._limits = VideoLimits(**options)
        with av.open(io.BytesIO(_nothing()), "r", format="avi") as container:
            (video,) = container.streams.video
            look_through(container, video, size_bytes=1, limits=self._limits, progress=lambda _stage, _percent: None)

    def work(self, job: Job, progress: Progress) -> dict[str, Any]:
        progress("reading", 5)
        try:
            check_video(job.path, job.content_type)
        except BrokenContainerError as error:
            raise WorkError(WorkCode.CORRUPT_MEDIA, f"The video is damaged: {error}.", final=True) from error
        progress("probing", 15)
        with opened_video(job.path, job.content_type, self._limits) as (container, video):
            survey = self._surveyed(container, video, job, progress)
            progress("describing", 80)
            facts = {
                "codec": video.codec_context.codec.canonical_name,
                "duration_s": duration_s(container, survey),
                "fps": frames_per_second(video, survey),
                "taken_at": taken_at({**video.metadata, **container.metadata}, now=datetime.now(UTC)),
            }
        return _described(_sight(survey), FORMATS[job.content_type], facts, job.thumbnail_path)

    def _surveyed(self, container: InputContainer, video: VideoStream, job: Job, progress: Progress) -> Survey:
        left_bytes = memory_left_bytes()
        with demuxer_errors("The video cannot be read to its end"):
            survey = look_through(container, video, size_bytes=job.size_bytes, limits=self._limits, progress=progress)
        sight = survey.sight()
        if sight is None or not sight.is_clear:
            progress("playing", 70)
            self._play(job, survey)
        needed_bytes = video.codec_context.width * video.codec_context.height * _DECODING_BYTES_PER_PIXEL
        if survey.sight() is None and needed_bytes > left_bytes:
            raise MemoryError  # some decoders call a good video broken when there is no memory for it
        return survey

    def _play(self, job: Job, survey: Survey) -> None:
        """Looks for a clearer frame from the beginning; where memory is short for that, what is there will do."""
        try:
            with (
                opened_video(job.path, job.content_type, self._limits) as (container, video),
                demuxer_errors("The video cannot be played"),
            ):
                look_from_the_beginning(container, video, survey, self._limits)
        except MemoryError:
            if survey.sight() is None:
                raise


def duration_s(container: InputContainer, survey: Survey) -> float | None:
    """Seconds; what the file says where its packets agree, else what they take."""
    claimed = None if container.duration is None else container.duration / av.time_base
    return _borne_out(claimed, survey.duration_s(), survey, tolerance=_DURATION_TOLERANCE, maximum=_DURATION_S_MAX)


def frames_per_second(video: VideoStream, survey: Survey) -> float | None:
    """The mean; what the file says where its packets agree, else what they show."""
    extent = survey.extents.get(video.index)
    measured = None if extent is None else extent.frames_per_second()
    claimed = None if video.average_rate is None else float(video.average_rate)
    return _borne_out(claimed, measured, survey, tolerance=_FPS_TOLERANCE, maximum=_FPS_MAX)


def taken_at(metadata: Mapping[str, str], *, now: datetime) -> str | None:
    """When it was taken, RFC 3339 in UTC; None where the file does not say, or nothing that can be.

    A phone's own date counts, which knows its time zone, before the container's, which is in UTC by its standard.
    """
    texts = (metadata.get("com.apple.quicktime.creationdate"), metadata.get("creation_time"))
    moments = (_moment(text) for text in texts if text)
    for moment in moments:
        if moment is not None and _EARLIEST <= moment <= now + timedelta(days=1):
            timespec = "milliseconds" if moment.microsecond else "seconds"
            return moment.isoformat(timespec=timespec).replace("+00:00", "Z")
    return None


def turn_of(matrix: tuple[int, ...] | None) -> Image.Transpose | None:
    """How to turn what is stored into what is shown, by the nearest right angle; x' = ax + cy, y' = bx + dy."""
    if matrix is None:
        return None
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    swaps = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if swaps else (a, d)
    return _TURNS[swaps, x < 0, y < 0]


def _sight(survey: Survey) -> Sight:
    sight = survey.sight()
    if sight is None:
        why = "" if survey.why_not is None else f": {survey.why_not.strerror}"
        raise WorkError(WorkCode.CORRUPT_MEDIA, f"No frame of the video can be decoded{why}.", final=True)
    return sight


def _described(sight: Sight, form: str, facts: Mapping[str, Any], thumbnail_path: Path) -> dict[str, Any]:
    """The contract's result; the thumbnail is written on the way."""
    turn = turn_of(sight.matrix)
    shown = sight.small if turn is None else sight.small.transpose(turn)
    width, height = (sight.height, sight.width) if turn in _SWAPS_SIDES else (sight.width, sight.height)
    return {
        "kind": "video",
        "format": form,
        "width": width,
        "height": height,
        **facts,
        "phash": phash(shown),
        "blurhash": blurhash(shown),
        "thumbnail": write_thumbnail(shown, thumbnail_path),
    }


def _borne_out(
    claimed: float | None, measured: float | None, survey: Survey, *, tolerance: tuple[float, float], maximum: float
) -> float | None:
    """The claim, unless what was measured speaks against it; None where neither can be."""
    if claimed is not None and measured is not None and survey.whole:
        share, slack = tolerance
        agrees = abs(claimed - measured) <= measured * share + slack
        claimed = claimed if agrees else None
    for value in (claimed, measured):
        if value is not None and math.isfinite(value) and 0 < value <= maximum:
            return round(value, 3)
    return None


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _nothing() -> bytes:
    """A video of one small frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        video = container.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuvj420p"
        for packet in [*video.encode(av.VideoFrame(32, 32, "yuvj420p")), *video.encode()]:
            container.mux(packet)
    return file.getvalue()


handler = VideoHandler()
