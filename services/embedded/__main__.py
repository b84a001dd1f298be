"""Do now, when installing say, what the very first start of the embedded Kafka would do: fetch it and prepare it."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from services.embedded import EmbeddedError, EmbeddedKafka


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


async def start_once() -> None:
    with tempfile.TemporaryDirectory(prefix="sluice-kafka-") as scratch:
        async with EmbeddedKafka(data_dir=Path(scratch), log=say):
            pass


if __name__ == "__main__":
    try:
        asyncio.run(start_once())
    except EmbeddedError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell gives who was ended by SIGINT
