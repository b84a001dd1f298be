"""The one error of this package: its text says what is wrong, with which value, and what to do about it."""


class EmbeddedError(Exception):
    """An embedded server cannot be had. Shown to people as it is, without a traceback."""
