"""Where an archive is: a folder, or a prefix of an S3 bucket. Names are relative; what is put is there whole or not.

In a folder everything is on the disk when `put` returns. A bucket is reached as the AWS_* variables of the environment
say (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL and so on); of its errors only the code is told, since their text
may repeat keys.
"""

import asyncio
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import S3Store

_REQUEST_TIMEOUT_S = 60
_ERROR_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


class PlaceUnavailable(Exception):  # noqa: N818  # a state that may pass
    """The folder or bucket cannot be read or written; the message says why."""


class Place(Protocol):
    """As text: what a person calls it."""

    async def get(self, name: str) -> bytes | None:
        """What was put there under this name; None where nothing was. Raises PlaceUnavailable."""

    async def put(self, name: str, data: bytes) -> None:
        """Put it there, over what was there before. Raises PlaceUnavailable."""


def place_of(text: str) -> Place:
    """The place that a person named: `s3://bucket/prefix`, or a folder. Raises ValueError."""
    if not text.startswith("s3://"):
        return Folder(Path(text))
    if not urlsplit(text).netloc:
        raise ValueError(f"{text} names no bucket: write s3://bucket/prefix")
    return Bucket(text.rstrip("/"))


class Folder:
    """A folder, made when something is put there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    async def get(self, name: str) -> bytes | None:
        try:
            return await asyncio.to_thread((self._path / name).read_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PlaceUnavailable(f"{self._path / name} cannot be read: {error.strerror}") from error

    async def put(self, name: str, data: bytes) -> None:
        try:
            await asyncio.to_thread(_write_durably, self._path / name, data)
        except OSError as error:
            raise PlaceUnavailable(f"{self._path / name} cannot be written: {error.strerror}") from error


class Bucket:
    """A prefix of an S3 bucket."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = S3Store.from_url(
            url,
            client_options={
                "allow_http": True,  # the endpoint's scheme decides, and the default one is https
                "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
            },
        )

    def __str__(self) -> str:
        return self._url

    async def get(self, name: str) -> bytes | None:
        try:
            return bytes(await (await self._store.get_async(name)).bytes_async())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable(name, "read", error) from None

    async def put(self, name: str, data: bytes) -> None:
        try:
            await self._store.put_async(name, data)
        except (BaseError, OSError) as error:
            raise self._unavailable(name, "written", error) from None

    def _unavailable(self, name: str, what: str, error: Exception) -> PlaceUnavailable:
        code = _ERROR_CODE.search(str(error))
        reason = code[1] if code else type(error).__name__
        return PlaceUnavailable(
            f"{self._url}/{name} cannot be {what} ({reason}): check the bucket's name and rights and the AWS_ variables"
        )


def _write_durably(file: Path, data: bytes) -> None:
    """Whole or not at all, and on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as fresh:
        fresh.write(data)
        fresh.flush()
        os.fsync(fresh.fileno())
    partial.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
