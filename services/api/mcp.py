"""MCP at `/mcp`: streamable HTTP without sessions, for assistants that act for one user.

The token is the REST API's, in the same header, and every call of a tool goes through the REST API with it, in this
process; so there is nothing here that could allow more. It counts as one request of its user beside those calls, and a
user may have `OPEN_PER_USER_MAX` open at once: a wait for a batch lasts long. An error of a tool is an answer of its
own that says the code and what to do. A call from a page of another origin is refused (MCP, streamable HTTP, security
warning). What the tools are: `tools.py`.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI, Request
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    ToolAnnotations,
)
from mcp_types import Tool as ToolDescription
from pydantic import ValidationError
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from schemas.errors import MEANINGS, Code, RequestError, problem
from schemas.views import BatchView
from services.api.answers import invalid
from services.api.asking import JSON_BYTES_MAX, small_body
from services.api.resources import resources_of
from services.api.service import VERSION
from services.api.tools import TOOLS, Arguments, Call, Tool
from services.auth import bearer
from services.database import DatabaseUnavailable
from services.lifecycle import cancelled, first_of
from services.tail import Tail

PATH = "/mcp"
OPEN_PER_USER_MAX = 32
INSTRUCTIONS = """Sluice takes batches of pictures and videos and works their files one by one; these tools show one
user's batches and uploads (files) and can retry or cancel them. Start with list_batches. Files are not sent here: over
HTTP with POST /v1/batches, or with `sluice upload`."""
_ADVICE = {
    Code.NOT_FOUND: "list_batches and list_uploads show the ids there are.",
    Code.FORBIDDEN_SCOPE: "Tell the user that this token may not do it.",
    Code.OUTCOME_UNKNOWN: "Look with get_batch whether it was done before you repeat it.",
    Code.BATCH_ENDED: "get_batch shows how it ended.",
    Code.NOT_FAILED: "failed_uploads shows what can be retried.",
}


class Assistants:
    """The MCP server of one api."""

    def __init__(self, app: FastAPI, *, tail: Tail) -> None:
        self._tail = tail
        self._rest = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api")
        self._leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open: Counter[str] = Counter()
        # Once: the schemas take 17 ms to make, and whoever connects asks for them.
        self._offered = ListToolsResult(tools=[_described(tool) for tool in TOOLS.values()])
        server = Server(
            "sluice",
            title="Sluice",
            version=VERSION,
            instructions=" ".join(INSTRUCTIONS.split()),
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
        )
        self._sessions = StreamableHTTPSessionManager(server, stateless=True, max_request_body_size=JSON_BYTES_MAX)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: one request to `/mcp`; raises RequestError where it may not be made."""
        request = Request(scope, receive)
        resources = resources_of(request)
        _check_origin(request, resources.settings.origins)
        token = bearer(request.headers.get("authorization"))
        # A message of MCP is always a POST: what it changes, if anything, is decided by the REST calls it leads to.
        principal = await resources.authenticator.authenticate(token, scope="read")
        allowance = request.state.allowance = resources.rates.take(principal.user_id, now_s=time.monotonic())
        if allowance is not None:
            allowance.check()
        _check_type(request)
        with self._place(principal.user_id):
            body = await small_body(request)
            await self._sessions.handle_request(scope, _with_body(body, receive), send)

    async def run(self, running: asyncio.Event) -> None:
        """Answer until cancelled."""
        async with self._rest, self._sessions.run():
            running.set()
            await asyncio.get_running_loop().create_future()

    def dismiss(self) -> None:
        """Let those who wait for a batch go with what is known, since the api stops."""
        if not self._leaving.done():
            self._leaving.set_result(None)

    @contextlib.contextmanager
    def _place(self, user_id: str) -> Iterator[None]:
        """One of the user's places; raises RequestError(RATE_LIMITED) where all are taken."""
        if self._open[user_id] >= OPEN_PER_USER_MAX:
            raise RequestError(
                Code.RATE_LIMITED,
                f"you have {OPEN_PER_USER_MAX} requests to {PATH} open; ask again once one of them was answered",
            )
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]

    async def _list_tools(
        self, _context: ServerRequestContext[Any], _params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        return self._offered

    async def _call_tool(self, context: ServerRequestContext[Any], params: CallToolRequestParams) -> CallToolResult:
        async def report(batch: BatchView) -> None:
            done = batch.processed_uploads + batch.cancelled_uploads
            message = f"{batch.status}: {done} of {batch.total_uploads} files done, {batch.failed_uploads} failed"
            await context.session.report_progress(done, batch.total_uploads, message)

        assert isinstance(context.request, Request), "streamable HTTP hands the request on"
        call = Call(_Rest(self._rest, context.request), self._tail, report, self._leaving)
        try:
            tool = _known(params.name)
            view = await tool.run(call, _arguments(tool, params.arguments))
        except DatabaseUnavailable as error:
            return _refused(RequestError(Code.DATABASE_UNAVAILABLE, error.told))
        except RequestError as error:
            return _refused(error)
        shown = view.model_dump_json()
        return CallToolResult(content=[TextContent(text=shown)], structured_content=json.loads(shown))


class _Rest:
    """The REST API as the sender of a request, without a wire between."""

    def __init__(self, http: httpx.AsyncClient, request: Request) -> None:
        self._http = http
        self._headers = {
            name: request.headers[name] for name in ("authorization", "traceparent") if name in request.headers
        }

    async def get(self, path: str, **query: Any) -> Any:
        asked = {name: value for name, value in query.items() if value is not None}
        return _body(await self._http.get(path, params=asked, headers=self._headers))

    async def post(self, path: str) -> Any:
        return _body(await self._http.post(path, headers=self._headers))


class _McpRoute(Route):
    """Names itself in the scope, so that metrics can name it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, child_scope if match is Match.NONE else {**child_scope, "route": self}


@contextlib.asynccontextmanager
async def assisted(app: FastAPI, *, tail: Tail) -> AsyncIterator[Assistants]:
    """The app with `/mcp`, which answers as long as the block lasts."""
    assistants = Assistants(app, tail=tail)
    app.router.routes.append(_McpRoute(PATH, assistants, methods=["POST"]))
    running = asyncio.Event()
    # In a task of its own: the SDK's task group must be left by the task that entered it.
    task = asyncio.create_task(assistants.run(running), name="mcp")
    try:
        await first_of(task, asyncio.create_task(running.wait()))
        yield assistants
    finally:
        await cancelled(task)


def _check_origin(request: Request, allowed: tuple[str, ...]) -> None:
    """Raises RequestError for a call that a page of another origin makes in a browser, unless that origin may."""
    origin = request.headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return
    if (host := _host_of(origin)) is None or host != request.headers.get("host"):
        raise RequestError(
            Code.FORBIDDEN_SCOPE,
            f"pages of {origin:.200} may not call {PATH}; SLUICE_ALLOWED_ORIGINS names those that may",
        )


def _host_of(origin: str) -> str | None:
    """Host and port of an origin; None where it is none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _check_type(request: Request) -> None:
    """Raises RequestError for a body that does not say it is JSON."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            Code.INVALID_REQUEST,
            f"Content-Type must be application/json, and not {given!r:.80}: send a JSON-RPC message",
        )


def _with_body(body: bytes, receive: Receive) -> Receive:
    """What gives the body that was read already, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return messages.pop() if messages else await receive()

    return receiving


def _known(name: str) -> Tool:
    if name not in TOOLS:
        raise RequestError(Code.NOT_FOUND, f"there is no tool {name!r:.80}; there are {', '.join(TOOLS)}")
    return TOOLS[name]


def _arguments(tool: Tool, given: Mapping[str, Any] | None) -> Arguments:
    try:
        return tool.takes.model_validate(given or {})
    except ValidationError as error:
        raise invalid(error.errors()) from None


def _described(tool: Tool) -> ToolDescription:
    return ToolDescription(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.takes.model_json_schema(),
        output_schema=tool.gives.model_json_schema(mode="serialization"),
        annotations=ToolAnnotations(
            read_only_hint=not tool.changes,
            destructive_hint=tool.ends_work,
            idempotent_hint=tool.repeatable or not tool.changes,
            open_world_hint=False,
        ),
    )


def _refused(error: RequestError) -> CallToolResult:
    """An error as the assistant reads it: what is wrong, the code, and what to do."""
    retry_after_s = MEANINGS[error.code].retry_after_s
    advice = _ADVICE.get(error.code) or (f"Call again in {retry_after_s} s." if retry_after_s else "")
    text = f"{error.detail.rstrip('.')} ({error.code}). {advice}".rstrip()
    return CallToolResult(content=[TextContent(text=text)], structured_content=problem(error), is_error=True)


def _body(answer: httpx.Response) -> Any:
    """The JSON of an answer; raises RequestError where it is a problem."""
    found = answer.json()
    if answer.is_success:
        return found
    raise RequestError(Code(found["code"]), found["detail"])
