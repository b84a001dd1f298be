"""What a file is, told by its first bytes and never by its name: one of the formats that are taken, or None.

Pure. The rules are those of the formats' own headers; where a container holds several kinds (RIFF, ISO base media,
EBML), the kind it names decides.
"""

from collections.abc import Callable

SNIFF_BYTES = 512
"""As many first bytes as are looked at."""

_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_HEIF_BRANDS = frozenset({b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_MP4_BRANDS = frozenset(
    {b"isom", b"iso2", b"iso3", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"mp71", b"avc1", b"hvc1", b"dash"}
    | {b"M4V ", b"M4VH", b"M4VP", b"MSNV", b"f4v ", b"XAVC"}
)
_AUDIO_BRANDS = frozenset({b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B "})
_QUICKTIME_ATOMS = frozenset({b"moov", b"mdat", b"wide", b"pnot"})
_EBML = b"\x1aE\xdf\xa3"
_EBML_DOC_TYPE = b"\x42\x82"


def sniff(head: bytes) -> str | None:
    """The content type of a file that begins with `head`; None where it is none of those that are taken."""
    for magic, content_type in _BY_MAGIC:
        if head.startswith(magic):
            return content_type
    return next((found for look in _BY_STRUCTURE if (found := look(head)) is not None), None)


def _riff(head: bytes) -> str | None:
    if head[:4] != b"RIFF":
        return None
    return {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}.get(head[8:12])


def _iso_media(head: bytes) -> str | None:
    """ISO/IEC 14496-12 and QuickTime: a box of length, type `ftyp`, major brand, version, compatible brands."""
    if head[4:8] in _QUICKTIME_ATOMS:
        return "video/quicktime"
    if head[4:8] != b"ftyp":
        return None
    box = head[: int.from_bytes(head[:4], "big")]
    major = box[8:12]
    brands = {major, *(box[place : place + 4] for place in range(16, len(box), 4))}
    if major in _HEIC_BRANDS or (major in _HEIF_BRANDS and not brands & _AVIF_BRANDS):
        return "image/heic"
    if major == b"qt  ":
        return "video/quicktime"
    if major not in _AUDIO_BRANDS | _AVIF_BRANDS | _HEIF_BRANDS and brands & _MP4_BRANDS:
        return "video/mp4"
    return None


def _ebml(head: bytes) -> str | None:
    """RFC 8794: WebM is the document type `webm`; other documents, such as Matroska's, are not taken."""
    at = head.find(_EBML_DOC_TYPE)
    if not head.startswith(_EBML) or at < 0:
        return None
    size_at = at + len(_EBML_DOC_TYPE)
    size_bytes = 9 - head[size_at : size_at + 1].ljust(1, b"\0")[0].bit_length()
    return "video/webm" if head[size_at + size_bytes :].startswith(b"webm") else None


_BY_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"FLV\x01", "video/x-flv"),
    (b"\x00\x00\x01\xba", "video/mpeg"),
    (b"\x00\x00\x01\xb3", "video/mpeg"),
)
_BY_STRUCTURE: tuple[Callable[[bytes], str | None], ...] = (_riff, _iso_media, _ebml)
