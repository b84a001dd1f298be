"""What must hold after any fault, looked for in what was recorded: pure, so it can be shown to catch what it should.

`history` is what clients and the harness write down, `checker.violations` what is wrong with it, a sentence each.
"""

from tests.faults.checking.checker import violations
from tests.faults.checking.history import Answer, Away, Evidence, Looked, Operation, Rows, Settled, Stream, Usage

__all__ = [
    "Answer",
    "Away",
    "Evidence",
    "Looked",
    "Operation",
    "Rows",
    "Settled",
    "Stream",
    "Usage",
    "violations",
]
