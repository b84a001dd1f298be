"""How the lane's process and its child talk: JSON objects, each behind its length in 4 bytes, big-endian.

Both ends import this, and nothing else of each other, so the child starts without the service's libraries. Neither
end believes a length blindly: a frame over `FRAME_BYTES_MAX` means the other side is broken.
"""

import json
import os
from typing import Any

FRAME_BYTES_MAX = 1 << 20
_LENGTH_BYTES = 4


class BrokenFrameError(Exception):
    """What came is no frame of this protocol."""


def encode(message: dict[str, Any]) -> bytes:
    """The message as a frame; raises TypeError where something in it is no JSON."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def read(descriptor: int) -> dict[str, Any] | None:
    """The next message from a blocking pipe; None when its other end was closed, even in the middle of one."""
    head = _read_exactly(descriptor, _LENGTH_BYTES)
    body = head and _read_exactly(descriptor, _checked(int.from_bytes(head, "big")))
    return _decode(body) if body else None


def write(descriptor: int, frame: bytes) -> None:
    """Sends an encoded message through a blocking pipe."""
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class Splitter:
    """Cuts a stream of bytes, as it comes, into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now; raises BrokenFrameError."""
        self._bytes += data
        messages = []
        while (end := self._end_of_first()) is not None:
            messages.append(_decode(self._bytes[_LENGTH_BYTES:end]))
            del self._bytes[:end]
        return messages

    def _end_of_first(self) -> int | None:
        if len(self._bytes) < _LENGTH_BYTES:
            return None
        end = _LENGTH_BYTES + _checked(int.from_bytes(self._bytes[:_LENGTH_BYTES], "big"))
        return end if len(self._bytes) >= end else None


def _checked(length: int) -> int:
    if not 0 < length <= FRAME_BYTES_MAX:
        raise BrokenFrameError(f"a frame of {length} bytes was announced, 1 to {FRAME_BYTES_MAX} are allowed")
    return length


def _decode(body: bytes | bytearray) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise BrokenFrameError(f"a frame that is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise BrokenFrameError(f"a frame holds a {type(message).__name__} where an object belongs")
    return message


def _read_exactly(descriptor: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(descriptor, count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
