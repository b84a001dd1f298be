"""The ASGI app: FastAPI for the calls without files, raw routes for those that stream bytes, problems for all errors.

Raw routes are two to three times faster per file and hand the body on as it comes; what they take and answer is told to
the OpenAPI document in `openapi.py`.
"""

from typing import Any

from fastapi import FastAPI
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import Scope

from services.api import content, filing, routes, service
from services.api.answers import Guard, install_problems
from services.api.lingering import Lingering
from services.api.resources import Resources
from services.serving import health_routes

_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST", "PUT", "DELETE"],
    "allow_headers": [
        "Authorization",
        "Content-Type",
        "Idempotency-Key",
        "If-None-Match",
        "If-Range",
        "Last-Event-ID",
        "Mcp-Protocol-Version",
        "Mcp-Session-Id",
        "Range",
        "Repr-Digest",
        "traceparent",
        "tracestate",
    ],
    "expose_headers": [
        "Content-Disposition",
        "Content-Range",
        "ETag",
        "Location",
        "Mcp-Session-Id",
        "RateLimit",
        "RateLimit-Policy",
        "Retry-After",
        "Sluice-Position",
    ],
    "max_age": 600,
}
"""What pages of the origins in SLUICE_ALLOWED_ORIGINS may send and read. No credentials: a token is no cookie."""


class _Anything(Convertor[str]):
    """The rest of the path, slashes and line breaks included: what a filename may hold is decided elsewhere."""

    regex = r"[\s\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


class _RawRoute(Route):
    """A route that names itself in the scope, as FastAPI's own do, so that metrics can name it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, child_scope if match is Match.NONE else {**child_scope, "route": self}


def described_app() -> FastAPI:
    """The app with the routes that describe themselves, and nothing behind them."""
    app = FastAPI(
        title="Sluice",
        version=service.VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(routes.router)
    app.include_router(service.router)
    return app


def build_app(resources: Resources) -> FastAPI:
    """The app that serves with these resources."""
    app = described_app()
    app.state.resources = resources
    app.router.routes.extend(
        [
            *health_routes(resources.health.problems),
            _RawRoute("/v1/batches", filing.post_batch, methods=["POST"]),
            _RawRoute("/v1/batches/{batch_id}/uploads", filing.post_uploads, methods=["POST"]),
            _RawRoute("/v1/batches/{batch_id}/uploads/{filename:anything}", filing.put_upload, methods=["PUT"]),
            _RawRoute("/v1/uploads/{upload_id}/content", content.get_content, methods=["GET"]),
            _RawRoute("/v1/uploads/{upload_id}/thumbnail", content.get_thumbnail, methods=["GET"]),
        ]
    )
    install_problems(app)
    app.add_middleware(Guard)
    app.add_middleware(Lingering)
    # Outermost: a page may read errors too.
    app.add_middleware(CORSMiddleware, allow_origins=resources.settings.origins, **_CORS)
    return app
