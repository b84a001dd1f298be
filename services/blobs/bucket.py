"""The requests that are made of an S3 bucket, and what their failures mean to people.

Endpoint, region and credentials come from the AWS_* variables, which the client reads itself; an endpoint without TLS
is used where one is named. Requests are tried again for some seconds and never wait without a bound. What a server says
in an error is passed on as its code only: its text may repeat keys.
"""

import re
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from services.blobs.naming import BlobMissing
from services.blobs.store import StorageUnavailable

T = TypeVar("T")

COPY_BYTES_MAX = 5_000_000_000
_KEYS_AT_ONCE = 1_000
_CONNECT_TIMEOUT_S = 3
_REQUEST_TIMEOUT_S = 30
_RETRIES_MAX = 4
_RETRY_TIMEOUT_S = 10
_ENDPOINT = re.compile(r"https?://[^/\s]+")
_ERROR_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_STATUS = re.compile(r"non-2xx status code: (\d{3}[^:\n]*)")
_METADATA_PATHS = ("/latest/api/token", "/latest/meta-data/")
"""Where the client asks for credentials of the machine when it was given none."""
_NO_BUCKET = "NoSuchBucket"
_ADVICE = {
    _NO_BUCKET: "make the bucket, or name another in SLUICE_BLOB_URL",
    "AccessDenied": "let its policy allow listing, reading, writing and deleting",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "AuthorizationHeaderMalformed": "check AWS_REGION",
    "PermanentRedirect": "check AWS_REGION",
    "ExpiredToken": "give fresh credentials",
}


@dataclass(frozen=True, slots=True)
class Key:
    """An object of the bucket. `written_s`: in seconds since 1970."""

    name: str
    size_bytes: int
    written_s: float


class Bucket:
    """Objects under one prefix. Raises StorageUnavailable; BlobMissing where it says so."""

    def __init__(self, name: str, *, prefix: str) -> None:
        self.url = "/".join(filter(None, (f"s3://{name}", prefix)))
        self.answered_s = float("-inf")
        """When it last answered, on the monotonic clock."""
        self.in_trouble = False
        """Whether a request failed since the last one that wrote."""
        try:
            self._store = S3Store(
                name,
                prefix=prefix or None,
                client_options={
                    "allow_http": True,  # the endpoint's scheme decides, and the default one is https
                    "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
                    "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
                },
                retry_config={
                    "max_retries": _RETRIES_MAX,
                    "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S),
                    "backoff": {"max_backoff": timedelta(seconds=2)},
                },
            )
        except BaseError as error:
            reason = f"{self.url} cannot be used with these AWS_ variables: {_first_line(error)}"
            raise StorageUnavailable(reason) from None

    async def start_of(self, key: str, *, bytes_max: int) -> tuple[int, bytes]:
        """The size of an object that is not empty, and its first bytes; raises BlobMissing."""
        found = await self._asked_of(obstore.get_async(self._store, key, options={"range": (0, bytes_max)}))
        return found.meta["size"], bytes(await self._asked(found.bytes_async()))

    async def span(self, key: str, start: int, stop: int) -> bytes:
        """Bytes from `start` up to and without `stop`, held in memory; raises BlobMissing."""
        return bytes(await self._asked_of(obstore.get_range_async(self._store, key, start=start, end=stop)))

    async def size(self, key: str) -> int:
        """Raises BlobMissing."""
        return (await self._asked_of(obstore.head_async(self._store, key)))["size"]

    async def put(self, key: str, content: bytes) -> None:
        """The whole object, or nothing."""
        await self._written(obstore.put_async(self._store, key, content, use_multipart=False))

    async def put_parts(self, key: str, pieces: AsyncIterator[bytes], *, part_bytes: int) -> None:
        """The object, part by part; nothing of it where the pieces end with an error, which is raised.

        A part is sent when its bytes came, and is there before the piece after the next one is asked for.
        """
        await self._written(
            obstore.put_async(
                self._store,
                key,
                pieces,
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=1,
            )
        )

    async def copy(self, source: str, target: str) -> None:
        """Raises BlobMissing. Objects above `COPY_BYTES_MAX` cannot be copied in one request."""
        await self._asked_of(obstore.copy_async(self._store, source, target))

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, those already gone included."""
        if keys:
            await self._written(obstore.delete_async(self._store, keys))

    async def keys(self, folder: str = "") -> AsyncIterator[list[Key]]:
        """All objects whose name begins with `folder` and a slash, in the order of their names."""
        stream = obstore.list(self._store, folder or None, chunk_size=_KEYS_AT_ONCE)
        while (found := await self._asked(anext(stream, None))) is not None:
            yield [Key(each["path"], each["size"], each["last_modified"].timestamp()) for each in found]

    async def folders(self, folder: str) -> list[str]:
        """The names that stand between `folder` and the next slash."""
        found = await self._asked(obstore.list_with_delimiter_async(self._store, folder))
        return [prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]

    async def _written(self, request: Awaitable[T]) -> T:
        answer = await self._asked(request)
        self.in_trouble = False
        return answer

    async def _asked_of(self, request: Awaitable[T]) -> T:
        """Ask for something of an object, which may be missing."""
        return await self._asked(request, may_be_missing=True)

    async def _asked(self, request: Awaitable[T], *, may_be_missing: bool = False) -> T:
        try:
            answer = await request
        except (BaseError, OSError, ValueError) as error:
            if may_be_missing and isinstance(error, FileNotFoundError) and _NO_BUCKET not in str(error):
                self.answered_s = time.monotonic()
                raise BlobMissing("it is not in the blob store") from None
            self.in_trouble = True
            raise StorageUnavailable(said(self.url, error)) from None
        self.answered_s = time.monotonic()
        return answer


def said(url: str, error: Exception) -> str:
    """A failed request as a sentence."""
    text = str(error)
    endpoint = _ENDPOINT.search(text)
    if any(path in text for path in _METADATA_PATHS):
        return f"there are no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    there = f"{url} at {endpoint[0]}" if endpoint else url
    code, status = _ERROR_CODE.search(text), _STATUS.search(text)
    if code is None and status is None:
        return f"{there} cannot be reached ({_cause(text)}): check AWS_ENDPOINT_URL, and that it runs"
    answer = " ".join(match[1] for match in (status, code) if match)
    advice = _ADVICE.get(code[1] if code else "", "see its own log")
    return f"{there} refuses ({answer}): {advice}"


def _cause(text: str) -> str:
    """The last of the causes that are named in a line."""
    return _first_line(text).rpartition(" - ")[2]


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0].strip()
