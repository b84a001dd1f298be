"""Which handlers are installed: the Python entry points of the group `sluice.work`.

Only names are read here. The handlers' modules, with their decoders, are imported by the child process alone, which
answers what each can do; one that is missing or broken costs its own content types, never the service.
"""

from importlib.metadata import entry_points

GROUP = "sluice.work"


def installed_handlers() -> dict[str, str]:
    """Entry-point name → reference (`package.module:attribute`), in the order of their names."""
    return {entry.name: entry.value for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}
