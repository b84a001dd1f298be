"""How the processes did: even with the log in time after each healing, never ready without what they need, and as small
at the end as at the beginning.
"""

from collections import defaultdict
from collections.abc import Iterator

from tests.faults.checking.history import Evidence, Usage

SETTLED_WITHIN_S = 30.0
NOTICED_WITHIN_S = 10.0
"""How long a service may say ready after a part went away: the longest silence it puts up with, and a look."""
NEEDS = {"kafka": ("api", "notifier", "processor"), "postgres": ("api", "notifier", "processor")}
GROWTH_MAX = {"memory_bytes": 96 << 20, "descriptors": 40, "tasks": 60}


def violations(evidence: Evidence) -> Iterator[str]:
    for settled in evidence.settled:
        if settled.seconds is None or settled.seconds > SETTLED_WITHIN_S:
            took = "never" if settled.seconds is None else f"only after {settled.seconds:.1f} s"
            yield f"after {settled.after}: the read models were even with the log {took}"
    yield from _too_confident(evidence)
    held: dict[tuple[str, int], list[Usage]] = defaultdict(list)
    for usage in evidence.usage:
        held[usage.service, usage.pid].append(usage)
    for (service, pid), usages in held.items():
        yield from _grown(service, pid, usages)


def _too_confident(evidence: Evidence) -> Iterator[str]:
    for away in evidence.away:
        for kind in NEEDS.get(away.part, ()):
            for look in evidence.looks:
                is_one = look.service.partition("-")[0] == kind
                if is_one and look.ready and away.from_s + NOTICED_WITHIN_S < look.at_s < away.to_s:
                    yield (
                        f"{look.service} said ready {look.at_s - away.from_s:.1f} s after {away.part} went away, which "
                        "it cannot do without"
                    )
                    break


def _grown(service: str, pid: int, usages: list[Usage]) -> Iterator[str]:
    """The first look is at a process that is still warming up."""
    if len(usages) <= 2:  # a beginning and an end beside the first
        return
    for name, most in GROWTH_MAX.items():
        first, last = getattr(usages[1], name), getattr(usages[-1], name)
        if last - first > most:
            yield f"{service} (pid {pid}) grew: {name} from {first} to {last}"
