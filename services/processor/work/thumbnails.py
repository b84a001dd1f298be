"""What a picture's thumbnail and a video's have in common: shown on white, upright, small, written as JPEG."""

import io
from pathlib import Path
from typing import Final

from PIL import Image

THUMBNAIL_SIDE_MAX: Final = 256
THUMBNAIL_QUALITY: Final = 82


def fitted(width: int, height: int, *, side_max: int) -> tuple[int, int]:
    """The size of a smaller picture of the same shape, no side longer than `side_max`; never larger than it was."""
    scale = min(1.0, side_max / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def on_white(picture: Image.Image) -> Image.Image:
    """The picture without its alpha; one that has none as it is."""
    if picture.mode not in ("LA", "RGBA"):
        return picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def write_thumbnail(shown: Image.Image, path: Path) -> dict[str, int]:
    """Writes the picture as it is; its `width`, `height` and `size_bytes`, as the contract's result has them."""
    encoded = io.BytesIO()
    shown.save(encoded, "JPEG", quality=THUMBNAIL_QUALITY)
    path.write_bytes(encoded.getbuffer())
    return {"width": shown.width, "height": shown.height, "size_bytes": encoded.tell()}
