"""What can be stored: the pure checks that keep out of the log what Postgres cannot hold.

Text without NUL and lone surrogates, numbers without NaN and infinities, and JSON objects under a cap in bytes and in
levels. Whatever passes here comes back from the log as it went in: decoders refuse what is nested deeper than they can
follow, so that must not get as far as the log.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import to_json

METADATA_BYTES_MAX = 16_000
RESULT_BYTES_MAX = 32_000
FILENAME_BYTES_MAX = 255
NAME_CHARACTERS_MAX = 200
ERROR_MESSAGE_CHARACTERS_MAX = 1_000
USER_ID_CHARACTERS_MAX = 255
NESTING_LEVELS_MAX = 64
_INTEGER_BITS_MAX = 1_024  # as large as a double can be, so every JSON reader makes a number of it


def storable_text(text: str) -> str:
    """`text` itself; ValueError where it holds a NUL or a lone surrogate."""
    if "\0" in text:
        raise ValueError("holds a NUL character, which cannot be stored")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half a surrogate pair, which is no text") from error
    return text


def storable_json(value: Any, *, levels_max: int = NESTING_LEVELS_MAX) -> Any:
    """`value` itself; ValueError where something in it cannot be stored or is no JSON."""
    if not isinstance(value, dict | list):
        _storable_leaf(value)
        return value
    if levels_max <= 0:
        raise ValueError(f"is nested more than {NESTING_LEVELS_MAX} levels deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"holds the key {key!r:.40}, which is no text")  # noqa: TRY004  # pydantic's way
            storable_text(key)
    for item in value.values() if isinstance(value, dict) else value:
        storable_json(item, levels_max=levels_max - 1)
    return value


def _storable_leaf(value: Any) -> None:
    if isinstance(value, str):
        storable_text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"holds {value}, which is no JSON number")
    elif isinstance(value, int):
        if value.bit_length() > _INTEGER_BITS_MAX:
            raise ValueError(f"holds a number of {value.bit_length()} bits, {_INTEGER_BITS_MAX} are allowed")
    elif value is not None:
        raise ValueError(f"holds a {type(value).__name__}, which is no JSON")


def json_bytes(value: Any) -> int:
    """How many bytes the value takes as compact UTF-8 JSON."""
    return len(to_json(value))


def _capped(bytes_max: int) -> AfterValidator:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        storable_json(value)
        if (size := json_bytes(value)) > bytes_max:
            raise ValueError(f"takes {size} bytes as JSON, {bytes_max} are allowed")
        return value

    return AfterValidator(check)


def _filename(text: str) -> str:
    if len(text.encode()) > FILENAME_BYTES_MAX:
        raise ValueError(f"takes {len(text.encode())} bytes, {FILENAME_BYTES_MAX} are allowed")
    return text


STORABLE = AfterValidator(storable_text)
"""Stands last in an annotation, so that errors of length and pattern read as such."""
Filename = Annotated[str, Field(min_length=1, max_length=FILENAME_BYTES_MAX), STORABLE, AfterValidator(_filename)]
Metadata = Annotated[dict[str, Any], _capped(METADATA_BYTES_MAX)]
Result = Annotated[dict[str, Any], _capped(RESULT_BYTES_MAX)]
