"""Videos made for tests, by PyAV itself: small, of every format that is taken, with what cameras and tools do to them.

Their frames are `pictures.scene`, so that a wrong turn or a lost colour shows in the corners.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.pictures import scene

CONTENT_TYPES = {
    "mp4": "video/mp4",
    "mov": "video/quicktime",
    "avi": "video/x-msvideo",
    "webm": "video/webm",
    "mpeg": "video/mpeg",
    "flv": "video/x-flv",
}
CODECS = {"mp4": "mpeg4", "mov": "mpeg4", "avi": "mjpeg", "webm": "libvpx", "mpeg": "mpeg2video", "flv": "flv"}
_PIXELS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le", "huffyuv": "yuv422p", "qtrle": "argb", "png": "rgba"}
_QUICK = {"libvpx": {"deadline": "good", "cpu-used": "5"}, "libx264": {"preset": "ultrafast"}}


def clip(
    form: str,
    *,
    frames: int = 20,
    size: tuple[int, int] = (160, 100),
    show: Callable[[int], Image.Image] | None = None,
    codec: str = "",
    muxer: str = "",
    rate: Fraction | int = 25,
    key_every: int = 5,
    turn: Sequence[Any] = (),
    pixel_shape: Fraction | None = None,
    sound_s: float = 0.0,
    metadata: Mapping[str, str] | None = None,
    **muxer_options: str,
) -> bytes:
    """A video whose frames are what `show` gives for 0, 1, 2 …; `turn` goes to PyAV's set_display_rotation."""
    show = show or (lambda step: scene(*size, step=step % 4))
    codec = codec or CODECS[form]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(path, "w", format=muxer or form, options=dict(muxer_options)) as container:
            container.metadata.update(metadata or {})
            video = container.add_stream(codec, rate=rate, options={"g": str(key_every), **_QUICK.get(codec, {})})
            (video.width, video.height), video.pix_fmt = size, _PIXELS.get(codec, "yuv420p")
            if turn:
                video.set_display_rotation(*turn)
            if pixel_shape is not None:
                video.codec_context.sample_aspect_ratio = pixel_shape
            sound = _sound_stream(container, form) if sound_s else None
            for step in range(frames):
                container.mux(video.encode(_frame(show(step))))
            container.mux(video.encode())
            if sound is not None:
                _mux_silence(container, sound, sound_s)
        return path.read_bytes()


def sound_only(form: str) -> bytes:
    """A file of this form in which nothing is to be seen."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        _mux_silence(container, _sound_stream(container, form), 0.5)
    return file.getvalue()


def with_cover() -> bytes:
    """Music in an mp4, with a cover picture and no video."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = _sound_stream(container, "mp4")
        container.mux(cover.encode(_frame(scene(64, 64))))
        container.mux(cover.encode())
        _mux_silence(container, sound, 0.5)
    return file.getvalue()


def _frame(picture: Image.Image) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.array(picture), format="rgba" if picture.mode == "RGBA" else "rgb24")


def _sound_stream(container: Any, form: str) -> Any:
    codec = {"webm": "libopus", "mpeg": "mp2", "avi": "mp2"}.get(form, "aac")
    return container.add_stream(codec, rate=48_000)


def _mux_silence(container: Any, sound: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 48_000), 960):
        silence = av.AudioFrame(format=sound.format.name, layout="stereo", samples=960)
        for plane in silence.planes:
            plane.update(bytes(plane.buffer_size))
        silence.sample_rate, silence.pts = 48_000, start
        container.mux(sound.encode(silence))
    container.mux(sound.encode())
