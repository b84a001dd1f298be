"""Which bytes a GET asks for: one range, or the whole (RFC 9110, section 14). Pure."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """From `start` up to and without `stop`; `partial` where it was asked for as a range."""

    start: int
    stop: int
    partial: bool


def wanted(header: str | None, *, size_bytes: int) -> Span | None:
    """The span a `Range` header asks for; None where it lies outside. What is not understood asks for the whole."""
    match = _RANGE.fullmatch(header or "")
    if match is None or not (match[1] or match[2]):
        return Span(0, size_bytes, partial=False)
    if match[1]:
        start = int(match[1])
        stop = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
    else:
        start, stop = max(0, size_bytes - int(match[2])), size_bytes
    if match[1] and match[2] and int(match[2]) < start:
        return Span(0, size_bytes, partial=False)
    return Span(start, stop, partial=True) if start < stop else None


def names(header: str | None, etag: str) -> bool:
    """Whether an `If-None-Match` header names this ETag, by the weak comparison (RFC 9110, section 13.1.2)."""
    given = [each.strip().removeprefix("W/") for each in (header or "").split(",")]
    return etag in given or given == ["*"]


def unchanged(header: str | None, etag: str) -> bool:
    """Whether a range may be given: without `If-Range`, or where that is exactly this ETag, which is a strong one
    (RFC 9110, section 13.1.5)."""
    return header is None or header.strip() == etag
