"""The blob store: the bytes of files and thumbnails, in a local folder or in an S3 bucket.

A `BlobStore` opens, reads, moves and removes, and is opened by `services.opening`; `Intake` takes the files of one
request while they stream in. A blob is named `{upload_id}/{random}`, a thumbnail `{upload_id}/thumb-{epoch}-{attempt}`;
names are fresh, never reused or written over, and checked whenever they are read back.
"""

from services.blobs.intake import Incoming, Intake, Room
from services.blobs.local import LocalBlobs
from services.blobs.naming import BlobMissing
from services.blobs.s3 import S3Blobs
from services.blobs.shelf import Lying, Shelf
from services.blobs.sniff import SNIFF_BYTES, sniff
from services.blobs.store import Blob, BlobStore, LocalFile, StorageUnavailable

__all__ = [
    "SNIFF_BYTES",
    "Blob",
    "BlobMissing",
    "BlobStore",
    "Incoming",
    "Intake",
    "LocalBlobs",
    "LocalFile",
    "Lying",
    "Room",
    "S3Blobs",
    "Shelf",
    "StorageUnavailable",
    "sniff",
]
