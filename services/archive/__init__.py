"""The log as files: exported while it is in use, whole or as a part, and imported into an empty topic.

An archive is a folder, or a prefix of a bucket: `manifest.json` and `segments/PARTITION/FIRST-OFFSET.ndjson.zst`, each
segment whole or not there. `exporting.py` makes one, `importing.py` takes one in, `selecting.py` says what a slice and
an erasure keep, `lines.py` and `manifest.py` are the format. Bytes of uploads are no part of it: back up the blobs.
"""
