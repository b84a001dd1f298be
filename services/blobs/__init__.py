"""The blob store: the bytes of files and thumbnails, in a local folder.

`BlobStore` opens, reads, moves and removes; `Intake` takes the files of one request while they stream in. A blob is
named `{upload_id}/{random}`, a thumbnail `{upload_id}/thumb-{epoch}-{attempt}`; names are fresh, never reused or
renamed over (that is 60 to 100 times slower on ext4), and checked whenever they are read back.
"""

from services.blobs.intake import Incoming, Intake, Room
from services.blobs.sniff import SNIFF_BYTES, sniff
from services.blobs.store import Blob, BlobMissing, BlobStore, StorageUnavailable

__all__ = [
    "SNIFF_BYTES",
    "Blob",
    "BlobMissing",
    "BlobStore",
    "Incoming",
    "Intake",
    "Room",
    "StorageUnavailable",
    "sniff",
]
