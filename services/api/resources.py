"""What the api's routes work with, opened once by main.py and handed on by name."""

from dataclasses import dataclass, field

from fastapi import Request

from schemas.events import Limits
from services.api.reading import Reading
from services.api.writing import Writing
from services.blobs import BlobStore
from services.database import Database
from services.settings import Settings
from services.tail import Tail


@dataclass(slots=True)
class Resources:
    """`problems`: what keeps the api from being ready, beside what the tail says of itself."""

    settings: Settings
    limits: Limits
    tail: Tail
    database: Database
    blobs: BlobStore
    writing: Writing
    reading: Reading
    problems: list[str] = field(default_factory=list)

    def all_problems(self) -> list[str]:
        """Why this api cannot do all it should, in sentences; empty when it can."""
        return [*self.tail.problems(), *self.problems]


def resources_of(request: Request) -> Resources:
    resources: Resources = request.app.state.resources
    return resources
