"""Assistants at `/mcp`, through the SDK's own client, on a real api; where work is done, beside a real processor."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult

from services.api.mcp import OPEN_PER_USER_MAX
from services.auth import make_token
from services.demo import PICTURES
from tests.integration.api_client import (
    DONE_TIMEOUT_S,
    SECRET,
    Person,
    RunningApi,
    a_picture,
    answered,
    api_settings,
    code_of,
    processor_beside,
    running_api,
)

ENDS_TIMEOUT_S = 60
ACCEPT = {"Accept": "application/json, text/event-stream"}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


@contextlib.asynccontextmanager
async def assistant(
    api: RunningApi, *, user: str = "ada", scopes: tuple[str, ...] = (), mode: str = "auto"
) -> AsyncIterator[Client]:
    """An assistant with a token of the user."""
    headers = {"Authorization": f"Bearer {make_token(user, SECRET, ttl_s=600, scopes=scopes)}"}
    async with httpx2.AsyncClient(headers=headers, trust_env=False, timeout=ENDS_TIMEOUT_S) as http:
        transport = streamable_http_client(f"{api.url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


async def called(client: Client, tool: str, **arguments: Any) -> Any:
    """What a tool gave; fails for an error. The client checks it against the tool's schema."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, text_of(result)
    return result.structured_content


async def refused(client: Client, tool: str, **arguments: Any) -> tuple[str, str]:
    """The code and the text of a tool's error."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert result.structured_content is not None
    code = str(result.structured_content["code"])
    assert f"({code})" in text_of(result)
    return code, text_of(result)


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert content.type == "text"
    return content.text


async def test_every_tool_says_what_it_is_for_what_it_takes_and_what_it_changes(api: RunningApi) -> None:
    async with assistant(api) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        instructions = client.instructions

    assert list(tools) == [
        "list_batches",
        "get_batch",
        "list_uploads",
        "get_upload",
        "failed_uploads",
        "batch_history",
        "wait_for_batch",
        "retry_failed",
        "cancel_batch",
    ]
    assert instructions is not None
    assert "list_batches" in instructions
    for tool in tools.values():
        assert tool.description
        assert tool.output_schema
        assert tool.input_schema["additionalProperties"] is False
        assert all(taken["description"] for taken in tool.input_schema["properties"].values())
    changing = {name for name, tool in tools.items() if tool.annotations and not tool.annotations.read_only_hint}
    assert changing == {"retry_failed", "cancel_batch"}


@pytest.mark.parametrize("mode", ["2026-07-28", "legacy"])
async def test_an_assistant_follows_a_batch_to_its_end_and_learns_what_failed(
    api: RunningApi, ada: Person, mode: str
) -> None:
    names = ("cat.png", "broken-download.jpg", "coffee.webp")
    heard: list[tuple[float, float | None, str | None]] = []

    async def hear(done: float, total: float | None, message: str | None) -> None:
        heard.append((done, total, message))

    async with contextlib.AsyncExitStack() as stack:
        # When a person sends pictures, the assistant waits for them, and then a processor comes.
        client = await stack.enter_async_context(assistant(api, mode=mode))
        sent = (await ada.send("/v1/batches", {name: (PICTURES / name).read_bytes() for name in names})).json()
        batch_id = sent["batch"]["id"]
        wish = {"batch_id": batch_id, "timeout_s": ENDS_TIMEOUT_S}
        waiting = asyncio.create_task(client.call_tool("wait_for_batch", wish, progress_callback=hear))
        await until_waited_for(api, batch_id)
        await stack.enter_async_context(processor_beside(api.settings))
        waited: Any = (await waiting).structured_content

        # Then it is told how far they are and what became of them, as the REST API says it.
        assert (waited["ended"], waited["batch"]["status"]) == (True, "completed")
        assert waited["next_step"] == "1 of 3 files failed; failed_uploads says why."
        assert [done for done, _, _ in heard] == sorted(done for done, _, _ in heard)
        assert heard[-1] == (3, 3, "completed: 3 of 3 files done, 1 failed")
        assert waited["batch"] == (await ada.get(f"/v1/batches/{batch_id}")).json()
        assert await called(client, "get_batch", batch_id=batch_id) == waited["batch"]
        uploads = await called(client, "list_uploads", batch_id=batch_id)
        assert uploads == (await ada.get(f"/v1/batches/{batch_id}/uploads")).json()
        broken = uploads["items"][1]
        assert await called(client, "get_upload", upload_id=broken["id"]) == broken
        await answered(lambda: ada.get("/v1/batches", min_position=waited["batch"]["position"]), 200)
        for whose in ({}, {"batch_id": batch_id}):
            failures = await called(client, "failed_uploads", **whose)
            assert failures == {"items": [broken], "batches": 1, "truncated": False}
        assert broken["error"]["code"] == "corrupt_media"

        # When it tries the failed one again, against all hope.
        before = waited["batch"]["position"]
        again = await called(client, "retry_failed", batch_id=batch_id)
        waited = await called(client, "wait_for_batch", batch_id=batch_id, timeout_s=ENDS_TIMEOUT_S)

        # Then the batch was worked once more, perhaps before it was shown, and ended as before.
        assert again["position"] != before
        assert (again["status"] == "processing") == (again["completed_at"] is None)
        assert (waited["ended"], waited["batch"]["failed_uploads"]) == (True, 1)
        assert (await called(client, "get_upload", upload_id=broken["id"]))["attempts"] == broken["attempts"] + 1


async def test_an_assistant_reads_how_a_batch_came_to_be_as_it_is(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch(name="n")
    open_position = (await ada.get(f"/v1/batches/{batch_id}")).json()["position"]
    await ada.put(batch_id, "a.jpg", a_picture())
    await ada.post(f"/v1/batches/{batch_id}/seal")

    async with assistant(api) as client:
        first = await called(client, "batch_history", batch_id=batch_id, limit=2)
        second = await called(client, "batch_history", batch_id=batch_id, cursor=first["next_cursor"])
        then = await called(client, "get_batch", batch_id=batch_id, at=open_position)

    events = [*first["items"], *second["items"]]
    assert [event["type"] for event in events] == [
        "sluice.BatchCreated.v1",
        "sluice.UploadQueued.v1",
        "sluice.BatchSealed.v1",
    ]
    assert [event["ignored"] for event in events] == [None, None, None]
    assert (then["sealed"], then["total_uploads"], then["position"]) == (False, 0, events[0]["position"])


async def test_a_batch_is_cancelled_once_and_for_all(api: RunningApi, ada: Person) -> None:
    sent = (await ada.send("/v1/batches", {"a.jpg": a_picture(), "b.jpg": a_picture()})).json()["batch"]

    async with assistant(api) as client:
        cancelled = await called(client, "cancel_batch", batch_id=sent["id"])
        again = await called(client, "cancel_batch", batch_id=sent["id"])
        waited = await called(client, "wait_for_batch", batch_id=sent["id"])
        code, text = await refused(client, "retry_failed", batch_id=sent["id"])

    assert (cancelled["status"], cancelled["cancelled_uploads"]) == ("cancelled", 2)
    assert again == cancelled
    assert (waited["ended"], waited["batch"]) == (True, cancelled)
    assert code == "batch_ended"
    assert "get_batch shows how it ended" in text


async def test_a_wait_is_bounded_and_says_that_an_open_batch_may_never_end(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()

    async with assistant(api) as client:
        waited = await called(client, "wait_for_batch", batch_id=batch_id, timeout_s=0.1)

    assert waited["ended"] is False
    assert "call wait_for_batch again" in waited["next_step"]
    assert "sealed" in waited["next_step"]


async def test_a_wait_for_a_batch_that_is_deleted_meanwhile_says_so(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()

    async with assistant(api) as client:
        waiting = asyncio.create_task(refused(client, "wait_for_batch", batch_id=batch_id))
        await until_waited_for(api, batch_id)
        await ada.http.delete(f"/v1/batches/{batch_id}")
        code, text = await waiting

    assert code == "not_found"
    assert "was deleted" in text


async def test_an_api_that_stops_lets_those_who_wait_go(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", stop_timeout_s=45
    )
    async with contextlib.AsyncExitStack() as stack:
        stopping = await stack.enter_async_context(contextlib.AsyncExitStack())
        api = await stopping.enter_async_context(running_api(settings))
        batch_id = await (await api.person("ada")).opens_batch()
        client = await stack.enter_async_context(assistant(api))
        await client.list_tools()  # which it would ask for later, to check the answer
        waiting = asyncio.create_task(called(client, "wait_for_batch", batch_id=batch_id))
        await until_waited_for(api, batch_id)

        began_s = time.monotonic()
        await stopping.aclose()
        waited = await waiting

    assert (waited["ended"], waited["batch"]["id"]) == (False, batch_id)
    assert time.monotonic() - began_s < settings.stop_timeout_s


async def test_errors_say_the_code_and_what_to_do(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()
    upload = (await ada.put(batch_id, "a.jpg", a_picture())).json()
    elsewhere = await ada.opens_batch()

    async with assistant(api) as client, assistant(api, user="grace") as stranger:
        code, text = await refused(client, "get_batch", batch_id="no-such-batch")
        assert code == "not_found"
        assert "list_batches" in text
        assert (await refused(stranger, "get_batch", batch_id=batch_id))[0] == "not_found"
        assert (await refused(stranger, "cancel_batch", batch_id=batch_id))[0] == "not_found"
        assert (await called(stranger, "list_batches"))["items"] == []

        code, text = await refused(client, "list_uploads", batch=batch_id)
        assert code == "invalid_request"
        assert "batch_id: Field required" in text
        assert "batch: Extra inputs are not permitted" in text
        code, text = await refused(client, "wait_for_batch", batch_id=batch_id, timeout_s=100_000)
        assert code == "invalid_request"
        assert "timeout_s" in text

        code, text = await refused(client, "retry_failed", batch_id=batch_id, upload_id=upload["id"])
        assert code == "not_failed"
        assert "failed_uploads" in text
        code, text = await refused(client, "retry_failed", batch_id=elsewhere, upload_id=upload["id"])
        assert code == "not_found"
        assert batch_id in text
        code, text = await refused(client, "get_batches")
        assert code == "not_found"
        assert "list_batches" in text


async def test_the_token_decides_what_an_assistant_may_do(api: RunningApi, ada: Person) -> None:
    batch_id = await ada.opens_batch()

    async with assistant(api, scopes=("read",)) as client:
        assert (await called(client, "get_batch", batch_id=batch_id))["id"] == batch_id
        code, text = await refused(client, "cancel_batch", batch_id=batch_id)
        assert code == "forbidden_scope"
        assert "`write`" in text

    initialize = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}
    without = await ada.http.post("/mcp", json=initialize, headers={"Authorization": ""})
    assert (without.status_code, code_of(without)) == (401, "unauthorized")
    assert without.headers["WWW-Authenticate"] == "Bearer"


async def test_a_page_of_another_origin_may_not_call(api: RunningApi, ada: Person) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    accept = {"Accept": "application/json, text/event-stream"}

    foreign = await ada.http.post("/mcp", json=message, headers={**accept, "Origin": "https://evil.example"})
    own = await ada.http.post("/mcp", json=message, headers={**accept, "Origin": api.url})
    got = await ada.http.get("/mcp", headers=accept)
    strange = [
        await ada.http.post("/mcp", json=message, headers={**accept, "Origin": origin})
        for origin in ("http://[", "null", "https://[::1", "//")
    ]

    assert (foreign.status_code, code_of(foreign)) == (403, "forbidden_scope")
    assert [(each.status_code, code_of(each)) for each in strange] == [(403, "forbidden_scope")] * 4
    assert own.status_code == 200, own.text
    assert (got.status_code, got.headers["Allow"]) == (405, "POST")


async def test_what_is_no_message_of_mcp_is_refused_with_a_problem(ada: Person) -> None:
    text = await ada.http.post("/mcp", content=b"{}", headers={**ACCEPT, "Content-Type": "text/plain"})
    none = await ada.http.post("/mcp", content=b"{}", headers=ACCEPT)
    large = await ada.http.post("/mcp", json={**LIST, "params": {"x": "x" * 70_000}}, headers=ACCEPT)
    fine = await ada.http.post("/mcp", json={**LIST, "params": {"_meta": {"x": "x" * 60_000}}}, headers=ACCEPT)

    assert [code_of(each) for each in (text, none, large)] == ["invalid_request"] * 3
    assert "application/json" in text.json()["detail"]
    assert "65536 bytes" in large.json()["detail"]
    assert fine.status_code == 200, fine.text


async def test_a_message_counts_as_a_request_of_its_user(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka,
        database_url=database_url,
        unique=unique,
        blobs=tmp_path / "blobs",
        rate_limit_per_s=0.01,
        rate_limit_burst=3,
    )
    async with running_api(settings) as api:
        ada, grace = await api.person("ada"), await api.person("grace")
        answers = [await ada.http.post("/mcp", json=LIST, headers=ACCEPT) for _ in range(3)]
        refused = await ada.http.post("/mcp", json=LIST, headers=ACCEPT)
        others = await grace.http.post("/mcp", json=LIST, headers=ACCEPT)

    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.headers["RateLimit"].split(";")[1] for answer in answers] == ["r=2", "r=1", "r=0"]
    assert (refused.status_code, code_of(refused)) == (429, "rate_limited")
    assert int(refused.headers["Retry-After"]) > 0
    assert others.status_code == 200


async def test_a_user_waits_only_so_often_at_once_and_others_are_not_kept_waiting(api: RunningApi, ada: Person) -> None:
    grace = await api.person("grace")
    batch_id = await ada.opens_batch()
    call = {"name": "wait_for_batch", "arguments": {"batch_id": batch_id, "timeout_s": ENDS_TIMEOUT_S}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}

    async def send() -> int:
        return (await ada.http.post("/mcp", json=message, headers=ACCEPT, timeout=ENDS_TIMEOUT_S)).status_code

    # Given as many waits as one user may have open.
    waits = [asyncio.create_task(send()) for _ in range(OPEN_PER_USER_MAX)]
    await until_waited_for(api, batch_id, by=OPEN_PER_USER_MAX)

    # When the user asks for more, and another user for something.
    refused = await ada.http.post("/mcp", json=LIST, headers=ACCEPT)
    others = await grace.http.post("/mcp", json=LIST, headers=ACCEPT)
    await ada.post(f"/v1/batches/{batch_id}/cancel")
    ended = await asyncio.gather(*waits)
    await answered(lambda: ada.http.post("/mcp", json=LIST, headers=ACCEPT), 200)

    # Then only the one too many was refused, and only for as long as they were open.
    assert (refused.status_code, code_of(refused)) == (429, "rate_limited")
    assert "Retry-After" in refused.headers
    assert ended == [200] * OPEN_PER_USER_MAX
    assert others.status_code == 200


async def test_hundreds_who_ask_for_the_tools_keep_nobody_from_writing(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka, database_url=database_url, unique=unique, blobs=tmp_path / "blobs", tail_lag_max_s=2
    )
    async with running_api(settings) as api:
        ada, grace = await api.person("ada"), await api.person("grace")

        for _ in range(3):  # a machine that stands still keeps people from writing, too: once, but not each time
            await api.tail.caught_up()
            asking = [asyncio.create_task(ada.http.post("/mcp", json=LIST, headers=ACCEPT)) for _ in range(200)]
            made = [await grace.post("/v1/batches", json={}) for _ in range(20)]
            answers = await asyncio.gather(*asking)
            if {answer.status_code for answer in made} == {201}:
                break

        assert [answer.status_code for answer in made] == [201] * 20
        assert {answer.status_code for answer in answers} <= {200, 429}


async def until_waited_for(api: RunningApi, batch_id: str, *, by: int = 1) -> None:
    """Return when somebody waits for this batch in the api; `by`: as many."""
    async with asyncio.timeout(DONE_TIMEOUT_S):
        while not ((held := api.tail.peek(batch_id)) and held.users >= by):  # noqa: ASYNC110  # it tells facts, not who holds
            await asyncio.sleep(0.01)
