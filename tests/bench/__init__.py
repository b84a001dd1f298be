"""Measuring how fast Sluice is; see `__main__.py`."""
