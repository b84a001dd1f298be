"""What can be stored: the pure checks that keep out of the log what Postgres cannot hold.

Text without NUL and lone surrogates, numbers without NaN and infinities, and JSON objects under a cap in bytes.
"""

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator

METADATA_BYTES_MAX = 16_000
RESULT_BYTES_MAX = 32_000
FILENAME_BYTES_MAX = 255
NAME_CHARACTERS_MAX = 200
ERROR_MESSAGE_CHARACTERS_MAX = 1_000
USER_ID_CHARACTERS_MAX = 255


def storable_text(text: str) -> str:
    """`text` itself; ValueError where it holds a NUL or a lone surrogate."""
    if "\0" in text:
        raise ValueError("holds a NUL character, which cannot be stored")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair, which is no text") from error
    return text


def storable_json(value: Any) -> Any:
    """`value` itself; ValueError where a text or number in it cannot be stored."""
    match value:
        case str():
            storable_text(value)
        case float() if not math.isfinite(value):
            raise ValueError(f"holds {value}, which is no JSON number")
        case dict():
            for key, item in value.items():
                storable_text(key)
                storable_json(item)
        case list():
            for item in value:
                storable_json(item)
        case _:
            pass
    return value


def json_bytes(value: Any) -> int:
    """How many bytes the value takes as compact UTF-8 JSON."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


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


Text = Annotated[str, AfterValidator(storable_text)]
Filename = Annotated[Text, AfterValidator(_filename)]
Metadata = Annotated[dict[str, Any], _capped(METADATA_BYTES_MAX)]
Result = Annotated[dict[str, Any], _capped(RESULT_BYTES_MAX)]
