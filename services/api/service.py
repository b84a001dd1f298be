"""What the api says of itself: status, configuration, and the pages for people."""

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from schemas.requests import CONTENT_TYPES
from schemas.views import ConfigView, LimitsView, StatusView
from services.api import pages
from services.api.answers import answer
from services.api.openapi import document
from services.api.routes import By, With

VERSION = version("sluice")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

router = APIRouter()


@router.get("/v1/status", response_model=StatusView, summary="How the service is", tags=["Service"])
async def get_status(_by: By, resources: With) -> Response:
    await resources.health.look_again()
    degraded = resources.health.degraded()
    head, projected = resources.tail.position(), resources.tail.projected()
    return answer(
        StatusView(
            mode="degraded" if degraded else "full",
            degraded=degraded,
            version=VERSION,
            head=str(head),
            projected=str(projected) if projected.offsets else None,
            lag=resources.tail.unprojected(),
            oldest_unfinished_s=resources.health.oldest_unfinished_s(),
            processors=list(resources.health.processors),
        )
    )


@router.get("/v1/config", response_model=ConfigView, summary="Limits, and where progress is told", tags=["Service"])
async def get_config(resources: With) -> Response:
    limits = resources.limits
    return answer(
        ConfigView(
            notifier_url=resources.settings.notifier_url,
            version=VERSION,
            limits=LimitsView(
                files_max=limits.files_max,
                batch_bytes_max=limits.batch_bytes_max,
                file_bytes_max=limits.file_bytes_max,
                content_types=list(CONTENT_TYPES),
            ),
        )
    )


@router.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request) -> Response:
    return JSONResponse(document(request.app))


@router.get("/docs", include_in_schema=False)
async def get_docs(request: Request) -> Response:
    return HTMLResponse(pages.reference(document(request.app)), headers=_PAGE_HEADERS)


@router.get("/", include_in_schema=False)
async def get_home(request: Request) -> Response:
    address = str(request.base_url).rstrip("/")
    return HTMLResponse(pages.home(version=VERSION, address=address), headers=_PAGE_HEADERS)
