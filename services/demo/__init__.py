"""What `sluice demo` sends: real pictures that we may ship, and what is expected to become of each.

Sources and licences stand in pictures/SOURCES.md. The demo itself: `services/cli/demo.py`.
"""

from pathlib import Path

PICTURES = Path(__file__).with_name("pictures")
FAILURES = {"broken-download.jpg": "corrupt_media"}
"""The files that are broken on purpose, and the code each must fail with; all others must complete."""


def pictures() -> list[Path]:
    """The shipped pictures by name, the broken ones among them."""
    return sorted(file for file in PICTURES.iterdir() if file.suffix != ".md")
