"""How blobs are named: a file `{upload_id}/{random}`, a thumbnail `{upload_id}/thumb-{epoch}-{attempt}`.

Nothing else is a name, so none leads out of the store. Pure, but for the random part.
"""

import re
import secrets
from collections.abc import Iterable

from schemas.errors import PartError

NAME = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/[A-Za-z0-9_-]{1,100}", re.ASCII)
UPLOAD_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
THUMBNAIL = re.compile(r"thumb-(\d+)-(\d+)", re.ASCII)
_RANDOM_BYTES = 9


class BlobMissing(PartError):  # noqa: N818  # named for what it says
    """There is no blob of that name; it was removed, or never was."""

    def __init__(self, text: str) -> None:
        super().__init__(text, told="its bytes are not in the blob store")


def fresh_name(upload_id: str) -> str:
    """A name that no blob had before."""
    return f"{upload_id}/{secrets.token_urlsafe(_RANDOM_BYTES)}"


def known_name(name: str) -> str:
    """The name, if it is one; raises BlobMissing for what is no blob's name."""
    if not NAME.fullmatch(name):
        raise BlobMissing(f"{name[:80]!r} is not the name of a blob")
    return name


def thumbnail_name(upload_id: str, *, epoch: int, attempt: int) -> str:
    return known_name(f"{upload_id}/thumb-{epoch}-{attempt}")


def newest_thumbnail(files: Iterable[str], upload_id: str, *, attempt: int) -> str:
    """Of the files an upload has here, the name of the thumbnail this attempt made; raises BlobMissing.

    Where several epochs made one under the same attempt, all but the newest were superseded (or the attempt was
    interrupted), so the newest epoch's counts.
    """
    found = (THUMBNAIL.fullmatch(file) for file in files)
    epochs = [int(match[1]) for match in found if match and int(match[2]) == attempt]
    if not epochs:
        raise BlobMissing(f"upload {upload_id} has no thumbnail")
    return thumbnail_name(upload_id, epoch=max(epochs), attempt=attempt)
