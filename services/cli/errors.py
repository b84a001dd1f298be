"""What can go wrong on the command line, as the person who typed it is told."""

import contextlib
from collections.abc import Iterator

EXIT_FAILURE = 1
EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130


class CliError(Exception):
    """Shown as it is, on standard error, without a traceback: what is wrong, with which value, what to do."""

    exit_code = EXIT_FAILURE


class WrongUse(CliError):  # noqa: N818  # reads as what it is where it is raised
    """The command was not given what it needs; trying again with the same arguments cannot help."""

    exit_code = EXIT_WRONG_USE


class Refused(CliError):  # noqa: N818  # the api's word for it
    """The api answered with a problem; `code` is one of the contract's."""

    def __init__(self, *, status: int, code: str, detail: str) -> None:
        super().__init__(f"{detail} ({code})")
        self.status = status
        self.code = code
        self.detail = detail


class Unreachable(CliError):  # noqa: N818  # the same
    """Nobody answers at an address."""


class Interrupted(CliError):  # noqa: N818  # reads as what happened
    """Ctrl-C while files were being sent, or watched."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, batch_id: str) -> None:
        super().__init__(
            f"Stopped. Batch {batch_id} keeps what was sent so far: `sluice status {batch_id}` shows it, "
            f"`sluice cancel {batch_id}` ends it."
        )


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Out of a task group come groups of errors; the first one is what a person needs."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
