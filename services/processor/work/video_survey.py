"""Looking through a video once: how long it really is, and a frame that tells what is to be seen.

Every packet is taken from the file, so one that cannot be followed to its end is noticed; only a few key frames are
decoded. The first one stands in for the others until one from a tenth of the file on, then from two tenths and so on,
shows something: films begin and end in the dark, and what is nearly of one colour tells nothing. Where none does, and
where there are no key frames, the film is played from its beginning for a while. Damage in frames that nobody decodes
is not noticed.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import Any, Final

import av.error
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from services.processor.work.demuxing import VideoLimits, refuse_large_frames
from services.processor.work.port import Progress
from services.processor.work.video_frames import Sight, key_frame, played, sight_of

TRIES_MAX: Final = 9
PLAYED_FRAMES_MAX: Final = 250
PLAYED_PIXELS_MAX: Final = 1_000_000_000
_TENTH: Final = 0.1
_TIMED: Final = ("video", "audio")


@dataclass(slots=True)
class Extent:
    """Where the packets of one track lie on its clock, in ticks of `time_base`."""

    time_base: Fraction
    packets: int = 0
    first: int | None = None
    last: int = 0
    end: int = 0

    def add(self, ticks: int | None, duration: int) -> None:
        self.packets += 1
        if ticks is None:
            return
        if self.first is None:
            self.first = self.last = self.end = ticks
        self.first, self.last = min(self.first, ticks), max(self.last, ticks)
        self.end = max(self.end, ticks + duration)

    def frames_per_second(self) -> float | None:
        """The mean from the first packet to the last; None of fewer than two."""
        if self.first is None or self.last <= self.first:
            return None
        return float((self.packets - 1) / ((self.last - self.first) * self.time_base))

    def span_s(self) -> tuple[float, float] | None:
        """Start and end; None where no packet has a time. A last one of no length counts as a mean one."""
        if self.first is None:
            return None
        mean = (self.last - self.first) // max(1, self.packets - 1)
        end = self.end if self.end > self.last else self.last + mean
        return float(self.first * self.time_base), float(end * self.time_base)


@dataclass(slots=True)
class Survey:
    """What a look through a video has brought.

    `opening` is its first key frame, `later` the one of most contrast behind the first tenth; `why_not` what the
    decoder said last, `whole` whether all packets were followed.
    """

    extents: dict[int, Extent] = field(default_factory=dict)
    opening: Sight | None = None
    later: Sight | None = None
    tries: int = 0
    why_not: av.error.FFmpegError | None = None
    whole: bool = True

    def sight(self) -> Sight | None:
        """The frame that tells most: a clear one from behind the beginning, else the one of most contrast."""
        if self.later is not None and self.later.is_clear:
            return self.later
        return _clearer(self.opening, self.later)

    def duration_s(self) -> float | None:
        """From the first track's beginning to the last one's end."""
        spans = [span for extent in self.extents.values() if (span := extent.span_s()) is not None]
        return max(end for _, end in spans) - min(start for start, _ in spans) if spans else None

    def count(self, packet: "Packet[Any]") -> None:
        extent = self.extents.get(packet.stream_index)
        if extent is None:
            extent = self.extents[packet.stream_index] = Extent(packet.time_base)
        extent.add(packet.dts if packet.pts is None else packet.pts, packet.duration or 0)

    def wants_another(self) -> bool:
        return self.tries < TRIES_MAX and not (self.later is not None and self.later.is_clear)


def look_through(
    container: InputContainer, video: VideoStream, *, size_bytes: int, limits: VideoLimits, progress: Progress
) -> Survey:
    """Raises FFmpegError where the file cannot be followed to its end, WorkError where a frame is too large."""
    survey = Survey()
    _set_up_decoder(video, limits)
    timed = {stream.index for stream in container.streams if stream.type in _TIMED}
    place, next_try = 0.0, 0.0
    for count, packet in enumerate(container.demux()):
        if count >= limits.packets_max:
            survey.whole = False
            break
        if not packet.size or packet.is_discard or packet.stream_index not in timed:
            continue
        survey.count(packet)
        place = max(place, (packet.pos or 0) / size_bytes)
        progress("scanning", 20 + int(place * 50))
        is_candidate = packet.is_keyframe and packet.stream_index == video.index
        if is_candidate and place >= next_try and survey.wants_another():
            _try_key_frame(survey, video, packet, limits)
            next_try = _TENTH * survey.tries
    return survey


def look_from_the_beginning(container: InputContainer, video: VideoStream, survey: Survey, limits: VideoLimits) -> None:
    """Plays a fresh container until a frame is clear, and keeps the clearest."""
    _set_up_decoder(video, limits)
    packets = islice(container.demux(video), limits.packets_max)
    for count, frame in enumerate(played(video.codec_context, packets), start=1):
        sight = _sight(video, frame, limits)
        survey.opening = _clearer(survey.opening, sight)
        pixels = count * frame.width * frame.height
        if sight.is_clear or count >= PLAYED_FRAMES_MAX or pixels >= PLAYED_PIXELS_MAX:
            break


def _try_key_frame(survey: Survey, video: VideoStream, packet: "Packet[Any]", limits: VideoLimits) -> None:
    survey.tries += 1
    try:
        sights = [_sight(video, frame, limits) for frame in key_frame(video.codec_context, packet)[:1]]
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        refuse_large_frames(video.codec_context.width, video.codec_context.height, limits)
        survey.why_not = error
        return
    for sight in sights:
        if survey.tries == 1:
            survey.opening = sight
        else:
            survey.later = _clearer(survey.later, sight)


def _sight(video: VideoStream, frame: VideoFrame, limits: VideoLimits) -> Sight:
    refuse_large_frames(frame.width, frame.height, limits)
    return sight_of(frame, video.sample_aspect_ratio)


def _clearer(one: Sight | None, other: Sight | None) -> Sight | None:
    both = [sight for sight in (one, other) if sight is not None]
    return max(both, key=lambda sight: sight.contrast, default=None)


def _set_up_decoder(video: VideoStream, limits: VideoLimits) -> None:
    video.codec_context.thread_count = 1
    video.codec_context.options = {"max_pixels": str(limits.pixels_max)}
