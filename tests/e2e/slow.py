"""Batches whose work takes some seconds: pictures of many pixels and few bytes, quick to send and slow to work on."""

from pathlib import Path

from PIL import Image


def slow_pictures(folder: Path, count: int) -> list[Path]:
    """`count` names of one such picture."""
    picture = folder / "slow.png"
    Image.radial_gradient("L").resize((6_000, 5_000)).convert("RGB").save(picture, compress_level=1)
    names = [folder / f"slow-{number}.png" for number in range(count)]
    for name in names:
        name.hardlink_to(picture)
    return names
