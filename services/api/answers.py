"""What goes out: JSON answers with their position, and problems (RFC 9457) for everything that is not granted.

`Guard` stands around the whole app: it counts and times requests, tells each user what is left of their allowance, and
turns what nobody expected into a plain 500, so that no caller ever sees our insides.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.errors import Code, PartError, RequestError
from services.api.ranges import names
from services.blobs import BlobMissing, StorageUnavailable
from services.database import DatabaseUnavailable
from services.eventlog import LogRefused, LogUnavailable
from services.observability import HTTP_SECONDS, logger
from services.serving import problem_answer

_log = logger("api")

POSITION_HEADER = "Sluice-Position"
_METHODS = ("DELETE", "GET", "HEAD", "POST", "PUT")
_FIELDS_NAMED_MAX = 5


def answer(view: BaseModel, *, status: int = 200, position: str | None = None, location: str | None = None) -> Response:
    """A view as JSON; `position` is where the log stands for what was written."""
    headers = {name: value for name, value in ((POSITION_HEADER, position), ("Location", location)) if value}
    return Response(view.model_dump_json(), status_code=status, headers=headers, media_type="application/json")


def shown(request: Request, view: BaseModel) -> Response:
    """A view as JSON, or 304 where the caller has just this already (RFC 9110, section 13)."""
    body = view.model_dump_json().encode()
    etag = f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if names(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def invalid(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """What pydantic found, as one error that names the fields."""
    named = [
        f"{'.'.join(str(place) for place in found['loc']) or 'body'}: {str(found['msg']).removeprefix('Value error, ')}"
        for found in errors[:_FIELDS_NAMED_MAX]
    ]
    return RequestError(Code.INVALID_REQUEST, "; ".join(named))


def install_problems(app: FastAPI) -> None:
    """Answer every error as a problem."""
    app.add_exception_handler(RequestError, _of_request)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(DatabaseUnavailable, _of_part(Code.DATABASE_UNAVAILABLE))
    app.add_exception_handler(LogUnavailable, _of_part(Code.LOG_UNAVAILABLE))
    app.add_exception_handler(LogRefused, _of_part(Code.LOG_UNAVAILABLE))
    app.add_exception_handler(StorageUnavailable, _of_part(Code.STORAGE_UNAVAILABLE))
    app.add_exception_handler(BlobMissing, _of_part(Code.NOT_FOUND))


async def _of_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return problem_answer(error)


async def _of_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_answer(invalid(error.errors()))


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:  # noqa: PLR2004  # the status itself
        found = problem_answer(RequestError(Code.METHOD_NOT_ALLOWED, f"{where} is not offered; see /docs"))
        found.headers["Allow"] = ", ".join(_methods_at(request))
        return found
    if error.status_code == 404:  # noqa: PLR2004  # the status itself
        return problem_answer(RequestError(Code.NOT_FOUND, f"{where} leads nowhere; see /docs"))
    return problem_answer(RequestError(Code.INVALID_REQUEST, str(error.detail)))


def _methods_at(request: Request) -> list[str]:
    """What may be done at this address: several routes may share it."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    return [method for method in _METHODS if takes(method)]


def _of_part(code: Code) -> Any:
    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, PartError)
        _log.debug("part_failed", code=code, route=_route(request.scope), reason=str(error))
        return problem_answer(RequestError(code, error.told))

    return handle


class Guard:
    """ASGI around the app; see the module's text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if (allowance := scope.get("state", {}).get("allowance")) is not None:
                    MutableHeaders(scope=message).update(allowance.headers())
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            _log.debug("client_left", method=scope["method"], route=_route(scope))
        except Exception:
            _log.exception("request_failed", method=scope["method"], route=_route(scope))
            if status:
                raise  # half an answer went out: let the connection break, so nobody takes it for a whole one
            unexpected = RequestError(Code.INTERNAL_ERROR, "something went wrong here; it is logged. Try again later")
            await problem_answer(unexpected)(scope, receive, sending)
        finally:
            seconds = time.monotonic() - began_s
            HTTP_SECONDS.labels(_method(scope), _route(scope), _class(status)).observe(seconds)
            _log.debug("request_ended", method=scope["method"], route=_route(scope), status=status, seconds=seconds)


def _method(scope: Scope) -> str:
    """The method, if it is one of ours: a caller may send any word, and each would be a metric."""
    return str(scope["method"]) if scope["method"] in _METHODS else "other"


def _class(status: int) -> str:
    """`2xx`, `4xx` …; `none` where the caller left before the answer began."""
    return f"{status // 100}xx" if status else "none"


def _route(scope: Scope) -> str:
    """The route's pattern, never the path itself: ids would make a metric of each."""
    return str(getattr(scope.get("route"), "path", "none"))
