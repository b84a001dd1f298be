"""How often each fault was injected, and how it went: what is printed at the end of a run, and stands in
docs/operations.md.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_injected: Counter[str] = Counter()
_violated: Counter[str] = Counter()


def injected(fault: str) -> None:
    """A fault struck once more."""
    _injected[fault] += 1


def violated(faults: Iterable[str], violations: int) -> None:
    """After these faults so much did not hold."""
    for fault in faults:
        _violated[fault] += violations


def shared() -> dict[str, list[int]]:
    """All of it, to be taken by another process."""
    return {fault: [times, _violated[fault]] for fault, times in _injected.items()}


def take(other: Mapping[str, Sequence[int]]) -> None:
    """Add what another process shared."""
    for fault, (times, violations) in other.items():
        _injected[fault] += times
        _violated[fault] += violations


def lines() -> list[str]:
    """The table, as Markdown."""
    if not _injected:
        return []
    width = max(map(len, _injected))
    rows = [f"| {'fault':<{width}} | injected | result |", f"|{'-' * (width + 2)}|---------:|--------|"]
    for fault, times in sorted(_injected.items()):
        result = f"{_violated[fault]} violations" if _violated[fault] else "held"
        rows.append(f"| {fault:<{width}} | {times:>8} | {result} |")
    return rows
