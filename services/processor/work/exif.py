"""EXIF, cleaned: what a camera wrote into a picture, as plain JSON that the log and Postgres can hold.

Keys are the names of the EXIF standard (CIPA DC-008), values text, numbers or short lists of numbers. Left out: maker
notes, embedded thumbnails and other blobs, whatever is no finite number or no text, and what exceeds the budget.
A position becomes decimal degrees under `GPS`. Damaged EXIF costs itself, never the picture.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from PIL import ExifTags, Image

from services.processor.work.port import storable

EXIF_BYTES_MAX = 1 << 20
JSON_BYTES_MAX = 16_000
_TEXT_CHARACTERS_MAX = 500
_NUMBERS_MAX = 16
_BLOB_TEXT_BYTES_MAX = 1_000

_DROPPED = {
    ExifTags.Base.MakerNote,
    ExifTags.Base.MakerNoteSafety,
    ExifTags.Base.ExifOffset,
    ExifTags.Base.GPSInfo,
    ExifTags.Base.ExifInteroperabilityOffset,
    ExifTags.Base.PrintImageMatching,
    0x8773,  # an ICC profile; colours are converted by it, nobody wants to read it
    0x02BC,  # XMP
    0x83BB,  # IPTC
    0x8649,  # Photoshop's blocks
}
_UTF16_TAGS = range(0x9C9B, 0x9CA0)  # XPTitle, XPComment, XPAuthor, XPKeywords, XPSubject

_WHEN = re.compile(r"(\d{4})[:\-](\d\d)[:\-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_OFFSET = re.compile(r"([+\-])(\d\d):(\d\d)")


def read_exif(picture: Image.Image) -> Image.Exif:
    """The picture's EXIF, empty where there is none, or where it is damaged or absurdly large."""
    raw = picture.info.get("exif")
    if isinstance(raw, bytes) and len(raw) > EXIF_BYTES_MAX:
        return Image.Exif()
    try:
        exif = picture.getexif()
        exif.get_ifd(ExifTags.IFD.Exif)
        exif.get_ifd(ExifTags.IFD.GPSInfo)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # a parser fed by strangers raises anything; the picture is good all the same
        return Image.Exif()
    return exif


def orientation(exif: Image.Exif) -> int:
    """1 to 8, as the EXIF standard counts them; 1 (upright) where nothing sensible is said."""
    value = exif.get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1  # noqa: PLR2004  # the eight of the standard


def cleaned(exif: Image.Exif) -> dict[str, Any]:
    """EXIF as JSON, at most `JSON_BYTES_MAX` bytes; later entries that do not fit are left out."""
    clean: dict[str, Any] = {}
    left_bytes = JSON_BYTES_MAX - len("{}")
    for name, value in _entries(exif):
        cost_bytes = len(json.dumps({name: value}))
        if cost_bytes <= left_bytes:
            clean[name] = value
            left_bytes -= cost_bytes
    return clean


def taken_at(exif: Image.Exif) -> str | None:
    """When the picture was taken, RFC 3339 in UTC; None where the camera did not say.

    DateTimeOriginal counts, else DateTimeDigitized, each with its own fraction of a second and UTC offset. Without an
    offset (cameras before EXIF 2.31 have none) the camera's clock is taken for UTC: the hours may be off, the order of
    one camera's pictures is right.
    """
    details = exif.get_ifd(ExifTags.IFD.Exif)
    for date_tag, fraction_tag, offset_tag in (
        (ExifTags.Base.DateTimeOriginal, ExifTags.Base.SubsecTimeOriginal, ExifTags.Base.OffsetTimeOriginal),
        (ExifTags.Base.DateTimeDigitized, ExifTags.Base.SubsecTimeDigitized, ExifTags.Base.OffsetTimeDigitized),
    ):
        moment = _moment(_text(details.get(date_tag)), _text(details.get(fraction_tag)), _text(details.get(offset_tag)))
        if moment is not None:
            return moment
    return None


def _entries(exif: Image.Exif) -> Iterator[tuple[str, Any]]:
    position = _position(exif.get_ifd(ExifTags.IFD.GPSInfo))
    if position:
        yield "GPS", position
    for tags in (exif, exif.get_ifd(ExifTags.IFD.Exif)):
        for tag, raw in tags.items():
            name = ExifTags.TAGS.get(tag)
            if name is None or tag in _DROPPED:
                continue
            value = _value(tag, raw)
            if value is not None:
                yield name, value


def _value(tag: int, raw: object) -> Any:
    """The value as plain JSON, or None where it is none."""
    if tag in _UTF16_TAGS:
        return _utf16(raw)
    if isinstance(raw, (str, bytes)):
        return _text(raw)
    if isinstance(raw, (tuple, list)):
        numbers = [_number(item) for item in raw[: _NUMBERS_MAX + 1]]
        return numbers if 0 < len(numbers) <= _NUMBERS_MAX and None not in numbers else None
    return _number(raw)


def _text(raw: object) -> str | None:
    """Text, readable; EXIF calls it ASCII, cameras and phones write UTF-8, and Pillow reads it as Latin-1."""
    if isinstance(raw, bytes):
        raw = _blob_text(raw)
    if not isinstance(raw, str):
        return None
    with suppress(UnicodeError):  # then it was Latin-1, or proper text, after all
        raw = raw.encode("latin-1").decode()
    return storable(raw.split("\0", 1)[0])[:_TEXT_CHARACTERS_MAX] or None


def _blob_text(raw: bytes) -> str | None:
    """Text from a tag of undefined type, such as ExifVersion or UserComment (which names its code in 8 bytes first)."""
    raw = raw.removeprefix(b"ASCII\0\0\0").rstrip(b"\0 ")
    if len(raw) > _BLOB_TEXT_BYTES_MAX or not raw.isascii():
        return None
    text = raw.decode("ascii")
    return text if text.isprintable() else None


def _utf16(raw: object) -> str | None:
    """Text of the XP… tags, which Windows writes as bytes of UTF-16."""
    octets = bytes(raw) if isinstance(raw, tuple) and all(isinstance(o, int) and 0 <= o < 256 for o in raw) else raw  # noqa: PLR2004
    if not isinstance(octets, bytes):
        return None
    text = octets.decode("utf-16-le", errors="ignore")
    return storable(text.split("\0", 1)[0])[:_TEXT_CHARACTERS_MAX] or None


def _number(raw: object) -> int | float | None:
    if isinstance(raw, bool) or not hasattr(raw, "__float__"):
        return None
    try:
        value = float(raw)
    except (ArithmeticError, ValueError):
        return None
    if isinstance(raw, int):
        return raw
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _position(gps: Mapping[int, Any]) -> dict[str, float]:
    """Decimal degrees (south and west negative) and metres above sea level; empty where there is no whole position."""
    latitude = _degrees(gps.get(ExifTags.GPS.GPSLatitude), _text(gps.get(ExifTags.GPS.GPSLatitudeRef)), 90)
    longitude = _degrees(gps.get(ExifTags.GPS.GPSLongitude), _text(gps.get(ExifTags.GPS.GPSLongitudeRef)), 180)
    if latitude is None or longitude is None:
        return {}
    position = {"latitude": latitude, "longitude": longitude}
    altitude = _number(gps.get(ExifTags.GPS.GPSAltitude))
    if altitude is not None:
        below_sea = gps.get(ExifTags.GPS.GPSAltitudeRef) in (1, b"\x01")
        position["altitude_m"] = round(-altitude if below_sea else altitude, 1)
    return position


def _degrees(parts: object, hemisphere: str | None, degrees_max: int) -> float | None:
    if not isinstance(parts, tuple) or len(parts) != 3:  # noqa: PLR2004  # degrees, minutes, seconds
        return None
    degrees = 0.0
    for part, unit in zip(parts, (1, 60, 3600), strict=True):
        number = _number(part)
        if number is None:
            return None
        degrees += number / unit
    if not 0 <= degrees <= degrees_max:
        return None
    return round(-degrees if hemisphere in ("S", "W") else degrees, 7)


def _moment(when: str | None, fraction: str | None, offset: str | None) -> str | None:
    found = _WHEN.match(when or "")
    if found is None:
        return None
    digits = re.match(r"\d{1,6}", fraction or "")
    try:
        local = datetime(*(int(part) for part in found.groups()), tzinfo=_zone(offset))  # type: ignore[arg-type, misc]  # six parts fill year to second
        moment = local.astimezone(UTC).replace(microsecond=int(digits[0].ljust(6, "0")) if digits else 0)
    except (ValueError, OverflowError):
        return None
    return moment.isoformat(timespec="milliseconds" if digits else "seconds").replace("+00:00", "Z")


def _zone(offset: str | None) -> timezone:
    found = _OFFSET.match(offset or "")
    if found is None:
        return UTC
    minutes = int(found[2]) * 60 + int(found[3])
    return timezone(timedelta(minutes=-minutes if found[1] == "-" else minutes))
