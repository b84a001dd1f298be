"""What the api's routes work with, opened once by main.py and handed on by name."""

from dataclasses import dataclass

from fastapi import Request

from schemas.events import Limits
from services.api.health import Health
from services.api.rates import Rates
from services.api.reading import Reading
from services.api.writing import Writing
from services.auth import Authenticator
from services.blobs import BlobStore
from services.database import Database
from services.settings import Settings
from services.tail import Tail


@dataclass(slots=True)
class Resources:
    """One of each; see their modules."""

    settings: Settings
    limits: Limits
    authenticator: Authenticator
    rates: Rates
    tail: Tail
    database: Database
    blobs: BlobStore
    writing: Writing
    reading: Reading
    health: Health


def resources_of(request: Request) -> Resources:
    resources: Resources = request.app.state.resources
    return resources
