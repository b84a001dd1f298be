"""Records that say nothing to this version of Sluice, each wrong in its own way."""

import json
import uuid
from dataclasses import replace

from schemas.events import Envelope, encode
from schemas.records import NewRecord
from tests.examples import a_batch_created

MEGABYTE = 1_000_000


def a_record() -> NewRecord:
    """One that would be well."""
    envelope = Envelope(id=str(uuid.uuid4()), source="/tests", time="2026-01-01T12:00:00Z")
    return encode(a_batch_created(name=None), envelope)


def with_data(**changes: object) -> NewRecord:
    record = a_record()
    data = {**json.loads(record.value or b"{}"), **changes}
    return replace(record, value=json.dumps({name: value for name, value in data.items() if value is not ...}).encode())


def with_headers(**changes: bytes | None) -> NewRecord:
    record = a_record()
    headers = {**dict(record.headers), **changes}
    return replace(record, headers=tuple((name, value) for name, value in headers.items() if value is not None))


def poisons() -> dict[str, NewRecord]:
    """Records that say nothing to this version of Sluice, by what is wrong with them."""
    return {
        "bad JSON": replace(a_record(), value=b'{"batch_id": '),
        "no UTF-8": replace(a_record(), value=b"\xff\xfe\x00"),
        "unknown type": with_headers(ce_type=b"sluice.BatchFolded.v1"),
        "unknown version": with_headers(ce_type=b"sluice.BatchCreated.v9"),
        "missing fields": with_data(limits=...),
        "wrong types": with_data(limits="none"),
        "no headers": replace(a_record(), headers=()),
        "bad headers": with_headers(ce_type=b"\xff\xff", ce_id=None),
        "tombstone": replace(a_record(), value=None),
        "another key": replace(a_record(), key=b"somebody else"),
        "a field of a megabyte": with_data(name="x" * MEGABYTE),
    }
