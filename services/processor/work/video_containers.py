"""What video files say about their own length, read without a demuxer: whether one breaks off.

Demuxers take a file that breaks off for a shorter one, so the parts that state their length are followed here, from one
to the next, and each must end within the file: boxes (ISO/IEC 14496-12, section 4.2), RIFF lists, elements of EBML
(RFC 8794, section 6), tags (FLV 10.1, annex E.4.1), packets of an MPEG program stream (ISO/IEC 13818-1, section 2.5.3).
What cannot be told is a cut exactly between two parts where nothing states the length of the whole: fragmented mp4,
webm written live, flv and mpeg. Where something else stands than a part, the walk ends and the demuxer judges.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from services.processor.work.containers import BrokenContainerError

PARTS_MAX: Final = 300_000
"""As many parts are followed; a file of more of them is cut into shreds on purpose, and not checked further."""

_MEDIA_BOXES: Final = frozenset({b"moov", b"moof", b"mdat"})
_RIFF_LENGTH_UNKNOWN: Final = (0, 0xFFFFFFFF)
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_FLV_TAG_TYPES: Final = frozenset({8, 9, 18})  # audio, video, script data
_PACK, _END = b"\xba", b"\xb9"


def check_video(path: Path, content_type: str) -> None:
    """Follows the parts to the file's end; raises BrokenContainerError where one ends behind it."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        _CHECKS[content_type](file, size_bytes)


def starts_as_program_stream(path: Path) -> bool:
    """Whether an MPEG file begins with a pack, and is not a bare video sequence."""
    with path.open("rb") as file:
        return file.read(4) == b"\0\0\1" + _PACK


def _check_boxes(file: BinaryIO, size_bytes: int) -> None:
    at, kinds = 0, set()
    for _ in range(PARTS_MAX):
        head = _read(file, at, 16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length <= 1:  # 0: to the end of the file; 1: the length stands behind the kind
            length = int.from_bytes(head[8:16], "big") if length else size_bytes - at
        if len(head) < 8 or length < 8:  # noqa: PLR2004  # the length and the kind of a box take so many
            break
        if kind in _MEDIA_BOXES:
            _must_end_within(at + length, size_bytes, f"the {kind.decode()} box")
        kinds.add(kind)
        at += length
        if at >= size_bytes:
            break
    if at >= size_bytes and b"moov" not in kinds:
        raise BrokenContainerError("the table of contents (moov) is missing, as when a recording was not finished")


def _check_riff(file: BinaryIO, size_bytes: int) -> None:
    at = 0
    for _ in range(PARTS_MAX):
        head = _read(file, at, 8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in _RIFF_LENGTH_UNKNOWN:
            break
        at += 8 + length
        _must_end_within(at, size_bytes, "the RIFF list")
        at += length & 1


def _check_ebml(file: BinaryIO, size_bytes: int) -> None:
    """A segment whose length is known must fit; in one written live, every element down to the blocks."""
    at = 0
    for _ in range(PARTS_MAX):
        head = _read(file, at, 12)
        id_bytes = _vint_bytes(head)
        length_bytes = _vint_bytes(head[id_bytes:])
        if not head or id_bytes > 4 or length_bytes > 8:  # noqa: PLR2004  # as long as RFC 8794 allows
            break
        kind = int.from_bytes(head[:id_bytes], "big")
        value = int.from_bytes(head[id_bytes : id_bytes + length_bytes], "big") & ((1 << 7 * length_bytes) - 1)
        at += id_bytes + length_bytes
        if value == (1 << 7 * length_bytes) - 1:  # all ones: the length is not known
            if kind not in (_SEGMENT, _CLUSTER):
                break
            continue
        at += value
        _must_end_within(at, size_bytes, "an element")
        if kind == _SEGMENT:
            break


def _check_flv(file: BinaryIO, size_bytes: int) -> None:
    at = int.from_bytes(_read(file, 5, 4), "big") + 4
    for _ in range(PARTS_MAX):
        head = _read(file, at, 4)
        if not head or head[0] & 0x1F not in _FLV_TAG_TYPES:
            break
        at += 11 + int.from_bytes(head[1:], "big") + 4
        _must_end_within(at, size_bytes, "a tag")


def _check_program_stream(file: BinaryIO, size_bytes: int) -> None:
    at = 0
    for _ in range(PARTS_MAX):
        head = _read(file, at, 14)
        code = head[3:4]
        if head[:3] != b"\0\0\1" or b"" < code < _END:
            break
        if code == _END:
            at += 4
        elif code == _PACK:
            at += 14 + (head[-1] & 7) if head[4:5] >= b"\x40" else 12  # MPEG-2 sets two bits 01, MPEG-1 four 0010
        else:
            at += 6 + int.from_bytes(head[4:6], "big")
        _must_end_within(at, size_bytes, "a packet")


def _must_end_within(end: int, size_bytes: int, what: str) -> None:
    if end > size_bytes:
        raise BrokenContainerError(f"{what} should reach to byte {end:,}, the file breaks off after {size_bytes:,}")


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _vint_bytes(octets: bytes) -> int:
    """How many bytes the variable-size integer takes that begins here (RFC 8794, section 4); 9 where none does."""
    return 9 - octets[0].bit_length() if octets else 9


_CHECKS: Final[dict[str, Callable[[BinaryIO, int], None]]] = {
    "video/mp4": _check_boxes,
    "video/quicktime": _check_boxes,
    "video/x-msvideo": _check_riff,
    "video/webm": _check_ebml,
    "video/x-flv": _check_flv,
    "video/mpeg": _check_program_stream,
}
