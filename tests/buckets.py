"""A real S3 API on loopback: moto's server in threads of this process, which keeps what it holds while it is away.

`environment` is what a process needs to find it. What lies in the bucket is looked at with boto3, never with our own
client.
"""

import contextlib
import functools
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from services.embedded.folders import free_ports

BUCKET = "sluice-tests"


@dataclass
class S3:
    """The server, with one bucket; `begin` and `end` take it away and bring it back on the same port."""

    port: int
    prefix: str
    server: ThreadedMotoServer | None = None

    @property
    def url(self) -> str:
        """For SLUICE_BLOB_URL."""
        return f"s3://{BUCKET}/{self.prefix}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "sluice",
            "AWS_SECRET_ACCESS_KEY": "a secret for tests",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",  # no test may ask this machine for credentials
        }

    def begin(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def end(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    @functools.cached_property
    def client(self) -> Any:
        return boto3.client("s3")

    def names(self) -> set[str]:
        """Every object under the prefix, without it."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/").get("Contents", [])
        return {each["Key"].removeprefix(f"{self.prefix}/") for each in found}

    def content(self, name: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")["Body"].read()
        return content

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}", Body=content)

    def unfinished(self) -> list[str]:
        """The uploads of parts that were begun, and neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [each["Key"] for each in found if each["Key"].startswith(f"{self.prefix}/")]


@contextlib.contextmanager
def a_bucket() -> Iterator[S3]:
    """An S3 server with an empty bucket, under a prefix of its own; this process finds it, too."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request helps nobody here
    s3 = S3(port=free_ports(1)[0], prefix=f"t{uuid.uuid4().hex[:12]}/blobs")
    before = {name: os.environ.get(name) for name in s3.environment}
    os.environ.update(s3.environment)
    s3.begin()
    try:
        s3.client.create_bucket(Bucket=BUCKET)
        yield s3
    finally:
        s3.end()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
