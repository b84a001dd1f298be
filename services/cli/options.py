"""The options that several commands have, so that they are named and explained alike."""

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[Path, typer.Option(help="Folder of the data, and of what a running `up` wrote about itself.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Another port than the default; 0: any free one.")]
