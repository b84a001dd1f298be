"""The ASGI app: FastAPI for the calls without files, raw routes for those that stream bytes, problems for all errors.

Raw routes are two to three times faster per file and hand the body on as it comes; what they take and answer is told to
the OpenAPI document in `openapi.py`.
"""

from fastapi import FastAPI
from starlette.routing import Match, Route
from starlette.types import Scope

from services.api import content, filing, routes, service
from services.api.answers import Guard, install_problems
from services.api.resources import Resources
from services.serving import health_routes


class _RawRoute(Route):
    """A route that names itself in the scope, as FastAPI's own do, so that metrics can name it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, child_scope if match is Match.NONE else {**child_scope, "route": self}


def build_app(resources: Resources) -> FastAPI:
    """The app that serves with these resources."""
    app = FastAPI(
        title="Sluice",
        version=service.VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.resources = resources
    app.state.settings = resources.settings
    app.router.routes.extend(
        [
            *health_routes(resources.all_problems),
            _RawRoute("/v1/batches", filing.post_batch, methods=["POST"]),
            _RawRoute("/v1/batches/{batch_id}/uploads", filing.post_uploads, methods=["POST"]),
            _RawRoute("/v1/batches/{batch_id}/uploads/{filename:path}", filing.put_upload, methods=["PUT"]),
            _RawRoute("/v1/uploads/{upload_id}/content", content.get_content, methods=["GET"]),
            _RawRoute("/v1/uploads/{upload_id}/thumbnail", content.get_thumbnail, methods=["GET"]),
        ]
    )
    app.include_router(routes.router)
    app.include_router(service.router)
    install_problems(app)
    app.add_middleware(Guard)
    return app
