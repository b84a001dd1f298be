"""The command line `sluice`: everything on this machine (`up`, `demo`) and the client of a running Sluice.

`app.py` holds the commands, one short function each. Behind them: `up.py` and `parts.py` (Kafka, Postgres and the
three services as children), `demo.py`; `connection.py`, `client.py`, `sending.py` and `watching.py` (talking to the api
and the notifier); `board.py` (pure: what a watcher knows), `display.py` and `hints.py` (how it is shown).
Errors are `CliError`: a message for a person and an exit code, never a traceback.
"""

from services.cli.app import main

__all__ = ["main"]
