"""Two short descriptions of how a picture looks, both made from its thumbnail.

The perceptual hash tells whether two pictures look alike (few differing bits, whatever their sizes and codecs). The
blurhash is a placeholder that a browser paints before the picture is there.
"""

from typing import Final

import numpy as np
from blurhash_rs import blurhash_encode
from numpy.typing import NDArray
from PIL import Image

from services.processor.work.thumbnails import fitted

_PHASH_SIDE: Final = 8
_SAMPLE_SIDE: Final = 32
_BLURHASH_SIDE: Final = 32
_BLURHASH_COMPONENTS_LONG: Final = 4
_BLURHASH_COMPONENTS_SHORT: Final = 3
_STEADY_DECIMALS: Final = 3


def _cosines() -> NDArray[np.float64]:
    """The 8 slowest of the 32 waves of a type-II discrete cosine transform, one a row."""
    wave = np.arange(_PHASH_SIDE)[:, np.newaxis]
    sample = np.arange(_SAMPLE_SIDE)[np.newaxis, :]
    return 2 * np.cos(np.pi * wave * (2 * sample + 1) / (2 * _SAMPLE_SIDE))


_COSINES = _cosines()


def phash(picture: Image.Image) -> str:
    """64 bits as 16 hex digits: which of the 8×8 slowest waves of the picture are stronger than the median one.

    Differences count in bits; below about 10 two pictures are the same to the eye. Rounding keeps the bits of a plain
    surface, whose waves are all noise of the arithmetic, the same on every machine.
    """
    gray = picture.convert("L").resize((_SAMPLE_SIDE, _SAMPLE_SIDE), Image.Resampling.LANCZOS)
    waves = np.round(_COSINES @ np.asarray(gray, dtype=np.float64) @ _COSINES.T, _STEADY_DECIMALS)
    return np.packbits(waves > np.median(waves)).tobytes().hex()


def blurhash(picture: Image.Image) -> str:
    """The blurhash (https://blurha.sh) of an RGB picture, with more detail along its longer side."""
    small = picture.resize(fitted(*picture.size, side_max=_BLURHASH_SIDE), Image.Resampling.BOX)
    along, across = _BLURHASH_COMPONENTS_LONG, _BLURHASH_COMPONENTS_SHORT
    return blurhash_encode(small, *((along, across) if small.width >= small.height else (across, along)))
