"""Kafka and Postgres for whoever has none: real servers, from pinned wheels and jars, as children of this process.

    async with EmbeddedKafka(data_dir=folder) as kafka, EmbeddedPostgres(data_dir=folder) as postgres:
        kafka.bootstrap_servers, postgres.url

Needs nothing but Python on Linux or macOS: no Java, no Docker, no root. Data is kept in the folder and used again by
the next start. Settings that name external servers win over this; that is decided by the caller.

`python -m services.embedded` does what the very first start would do (fetch Kafka, prepare its quick start) and ends.
"""

from services.embedded.errors import EmbeddedError
from services.embedded.kafka import EmbeddedKafka
from services.embedded.postgres import EmbeddedPostgres

__all__ = ["EmbeddedError", "EmbeddedKafka", "EmbeddedPostgres"]
