"""The command line `sluice`: everything on this machine (`up`, `demo`) and the client of a running Sluice.

`app.py` holds the commands, one short function each. Behind them: `up.py`, `parts.py` and `part_logs.py` (Kafka,
Postgres and the three services as children), `supervision.py` (what is done when one dies), `demo.py`;
`connection.py`, `client.py`, `sending.py` and `watching.py` (talking to the api and the notifier); `board.py` (pure:
what a watcher knows), `display.py` and `hints.py` (how it is shown).
For operators: `operator_app.py` (the commands), `operators.py` (what they do), `operating.py` (what they open),
`log_tail.py`, `doctor.py`.
Errors are `CliError`: a message for a person and an exit code, never a traceback.
"""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C is heeded and unprintable characters are replaced from the first moment on."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        from services.cli.app import main as run  # noqa: PLC0415  # importing takes long enough to be interrupted

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


__all__ = ["main"]
