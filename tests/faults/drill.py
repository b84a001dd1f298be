"""`make drill`: everything that can break breaks, composed at random, on real processes and in the simulator.

Prints its seed first, what it does meanwhile and the table of faults at the end; exits with 1 where an invariant does
not hold, and then names the folder with the history. The same seed breaks the same things in the same order, as far as
processes play along; the simulator plays exactly the same.
"""

import argparse
import asyncio
import contextlib
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from services.observability import configure_logging
from tests.faults.real import table
from tests.faults.real.composing import Stage, act
from tests.faults.real.disks import SmallDisk
from tests.faults.real.servers import Breakable, Part

ACT_S = 60.0
SIMULATED_SHARE = 0.3
SIMULATED_SEEDS_MAX = 100_000
SERVER_BYTES = 4_000_000_000
"""Far more than the acts of an hour put there, and memory only where they did."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make drill", description="break everything at random and see what holds")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="play this drill again")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    configure_logging(service="drill", log_format="console", log_level="error")
    say(f"seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="sluice-drill-"))
    folder.chmod(0o755)  # Postgres may run as another user
    simulated, held = asyncio.run(drill(folder, seed=seed, minutes=options.minutes))
    for line in table.lines():
        say(line)
    if held:
        shutil.rmtree(folder)
    say(f"simulated: {'everything held' if simulated else 'something did not hold, see above'}")
    say(f"real faults: {'everything held' if held else f'something did not hold; the histories are in {folder}'}")
    say(f"seed {seed}")
    sys.exit(0 if simulated and held else 1)


async def drill(folder: Path, *, seed: int, minutes: float) -> tuple[bool, bool]:
    """Whether everything held in the simulator, and with real faults."""
    simulated = await simulate(seed=seed, minutes=minutes * SIMULATED_SHARE)
    return simulated, await real_faults(folder, seed=seed, lasts_s=minutes * 60 * (1 - SIMULATED_SHARE))


async def simulate(*, seed: int, minutes: float) -> bool:
    """As many seeds as there is time for through the simulator, which says itself what it finds."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.simulation"),
        *("--seed", str(seed), "--seeds", str(SIMULATED_SEEDS_MAX), "--minutes", str(minutes)),
    )
    return await process.wait() == 0


async def real_faults(folder: Path, *, seed: int, lasts_s: float) -> bool:
    """One act after the other, on the same Kafka and Postgres."""
    chance = random.Random(seed)
    end_s = time.monotonic() + lasts_s
    held = True
    async with (
        _server("kafka", folder / "servers") as kafka,
        _server("postgres", folder / "servers") as postgres,
    ):
        stage = Stage(kafka, postgres, folder, say)
        while (left_s := end_s - time.monotonic()) > 0:
            found, files = await act(stage, seed=chance.randrange(10**6), lasts_s=min(ACT_S, left_s))
            for sentence in found:
                say(f"  DID NOT HOLD: {sentence}")
            if found:
                held = False
            else:
                shutil.rmtree(files)
                say("  everything held")
    return held


@contextlib.asynccontextmanager
async def _server(part: Part, data_dir: Path) -> AsyncIterator[Breakable]:
    """On a disk of its own where one may be mounted."""
    async with (
        SmallDisk.where_allowed(data_dir / part, size_bytes=SERVER_BYTES) as disk,
        Breakable(part, data_dir=data_dir, disk=disk).running() as server,
    ):
        yield server


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
