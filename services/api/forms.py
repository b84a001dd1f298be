"""Reading `multipart/form-data` (RFC 7578) as it streams in: files into the intake, small fields into memory.

Only as much is in memory as the intake lets wait, whatever the size of the body. Every part counts towards the
request's fingerprint, the refused ones too, so a repetition is known as one and another body is not taken for it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from schemas.errors import Code, RequestError
from schemas.requests import parts_hash, safe_filename
from services.api.asking import body_of, content_length
from services.blobs import Incoming, Intake

PARTS_MAX = 10_000
FIELD_BYTES_MAX = 64 * 1024
_HEADER_CHARSET = "latin-1"
"""Takes any byte, so that one odd name does not end the whole form; what it says is told by `_utf8`."""


@dataclass(slots=True)
class FilePart:
    """A file of the form. `filename` is None where nothing is left of the name it came with; `whole` is false where
    reading stopped before its end, as it was clear by then that it is not taken."""

    place: int
    field: str
    given_name: str
    filename: str | None
    upload_id: str
    incoming: Incoming
    whole: bool = True


@dataclass(slots=True)
class TextPart:
    place: int
    field: str
    incoming: Incoming
    content: bytes = b""


@dataclass(slots=True)
class Form:
    """What came, in order. Judged and hashed once it was read to its end."""

    files: list[FilePart] = field(default_factory=list)
    texts: list[TextPart] = field(default_factory=list)

    @property
    def body_hash(self) -> str:
        """The fingerprint of the body: hex SHA-256 over its parts in order."""
        parts = [
            *((part.place, part.field, part.filename or "", part.incoming.sha256) for part in self.files),
            *((part.place, part.field, "", part.incoming.sha256) for part in self.texts),
        ]
        return parts_hash(part[1:] for part in sorted(parts))

    def text(self, name: str) -> str | None:
        """The value of a field; raises RequestError where it is no UTF-8 or came twice."""
        values = [part.content for part in self.texts if part.field == name]
        if len(values) > 1:
            raise RequestError(Code.INVALID_REQUEST, f"the field {name!r} came {len(values)} times; send it once")
        try:
            return values[0].decode() if values else None
        except UnicodeDecodeError:
            raise RequestError(Code.INVALID_REQUEST, f"the field {name!r} is not UTF-8") from None


@dataclass(slots=True)
class FormReader:
    """Reads one form. `upload_id_at`: the id for the file at a place; `known`: whether its bytes are here already;
    `bytes_max`: the longest body that is read."""

    intake: Intake
    fields: frozenset[str]
    upload_id_at: Callable[[int], str]
    known: Callable[[str], bool]
    bytes_max: int
    form: Form = field(default_factory=Form)
    _part: FilePart | TextPart | None = None
    _places: int = 0
    _field_bytes: int = 0

    async def read(self, request: Request) -> Form:
        """The whole form; raises RequestError, ClientDisconnect, StorageUnavailable."""
        length = content_length(request)
        self._check_length(length or 0)
        came = 0
        try:
            parser = PushMultipartParser(
                boundary_of(request),
                content_length=-1 if length is None else length,
                max_segment_count=PARTS_MAX,
                header_charset=_HEADER_CHARSET,
            )
            async with contextlib.aclosing(body_of(request)) as chunks:
                async for chunk in chunks:
                    came += len(chunk)
                    self._check_length(came)
                    for event in parser.parse(chunk):
                        await self._take(event)
            parser.close()
        except ParserLimitReached as error:
            if self._places >= PARTS_MAX:
                raise RequestError(Code.TOO_MANY_FILES, f"the form has more than {PARTS_MAX} parts") from error
            raise RequestError(Code.INVALID_REQUEST, "the headers of a part of the form are too long") from error
        except MultipartError as error:
            raise RequestError(Code.INVALID_REQUEST, f"the body is no multipart/form-data: {error}") from error
        await self.intake.flush()
        return self.form

    def _check_length(self, size_bytes: int) -> None:
        if size_bytes > self.bytes_max:
            raise RequestError(
                Code.BATCH_TOO_LARGE,
                f"the form has {size_bytes} bytes or more, and no batch may have so many; send its files one by one, "
                "or in several batches",
            )

    async def _take(self, event: MultipartSegment | bytes | None) -> None:
        if isinstance(event, MultipartSegment):
            self._part = self._begin(event)
            return
        assert self._part is not None, "the parser names a part before it gives its bytes"
        if event is None:
            await self.intake.end(self._part.incoming)
            return
        if isinstance(self._part, TextPart):
            self._take_text(self._part, event)
        await self.intake.write(self._part.incoming, bytes(event))

    def _begin(self, segment: MultipartSegment) -> FilePart | TextPart:
        place, self._places = self._places, self._places + 1
        name = _utf8(segment.name or "")
        if segment.filename is None:
            if name not in self.fields:
                raise RequestError(Code.INVALID_REQUEST, f"the field {name!r:.80} is not known, and it is no file")
            text = TextPart(place, name, self.intake.begin(self.upload_id_at(place), hash_only=True))
            self.form.texts.append(text)
            return text
        given_name = _utf8(segment.filename)
        upload_id, filename = self.upload_id_at(place), safe_filename(given_name)
        incoming = self.intake.begin(upload_id, hash_only=filename is None or self.known(upload_id))
        part = FilePart(place, name, given_name, filename, upload_id, incoming)
        self.form.files.append(part)
        return part

    def _take_text(self, part: TextPart, chunk: bytes) -> None:
        self._field_bytes += len(chunk)
        if self._field_bytes > FIELD_BYTES_MAX:
            raise RequestError(Code.INVALID_REQUEST, f"the form's text fields take more than {FIELD_BYTES_MAX} bytes")
        part.content += chunk


def _utf8(header: str) -> str:
    """A name from a part's headers; one that is not UTF-8 keeps what can be read of it."""
    return header.encode(_HEADER_CHARSET).decode("utf-8", "replace")


def boundary_of(request: Request) -> str:
    """The boundary of a form; raises RequestError where the request carries none."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise RequestError(
            Code.INVALID_REQUEST, "send the files as multipart/form-data, with a boundary in Content-Type"
        )
    return str(options["boundary"])
