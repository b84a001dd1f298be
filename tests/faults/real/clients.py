"""Clients that write down what they ask and what becomes of it: batches made, filled, sealed, given up and retried.

A request without an answer, and an answer that says so itself, are `unknown`; only what certainly was not done is
`fail`. What is not settled is asked again with the same key, as clients should, mostly; some give up, some ask twice
at once. Names are never used twice, so that the log shows what came of each request.
"""

import asyncio
import io
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from tests.faults.checking import Operation
from tests.faults.checking.history import Outcome, What

TURNS_MAX = 60
PAUSE_S = 0.2
TIMEOUT_S = 12.0
GIVES_UP = 0.03
ASKS_TWICE = 0.1
NOT_SURE = frozenset({"outcome_unknown", "internal_error"})
AGAIN = frozenset(
    {"unreachable", "log_unavailable", "database_unavailable", "projection_behind", "storage_unavailable"}
)
NOT_A_PICTURE = b"this is only text, whatever its name says"
_numbers = itertools.count(1)

Files = Mapping[str, bytes]


def a_picture(name: str) -> bytes:
    """A small JPEG like no other."""
    content = io.BytesIO()
    Image.new("RGB", (48, 32), (len(name) * 7 % 256, 90, 160)).save(content, "JPEG", comment=name.encode())
    return content.getvalue()


def a_broken_picture(name: str) -> bytes:
    """It begins like a JPEG, and nobody can decode it."""
    return b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + name.encode() + b"\x5a" * 500


@dataclass(slots=True)
class Journal:
    """What all clients of a scene wrote down. `on_batch` hears of each batch that was made, and by whom."""

    operations: list[Operation] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    on_batch: Callable[[str, str], None] = lambda _batch_id, _user: None


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what it came to."""

    outcome: Outcome
    code: str | None
    answer: httpx.Response | None
    begin_s: float
    end_s: float

    @property
    def position(self) -> str | None:
        return self.answer.headers.get("sluice-position") if self.answer is not None else None

    @property
    def settled(self) -> bool:
        return self.outcome == "ok" or (self.outcome == "fail" and self.code not in AGAIN)


Note = Callable[[Asked], None]


class Client:
    """One user at one or several replicas of the api."""

    def __init__(self, user: str, *, urls: Sequence[str], token: str, journal: Journal, chance: random.Random) -> None:
        self.user = user
        self.journal = journal
        self._urls = urls
        self._chance = chance
        self._http = httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_S, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def live(self, stop: asyncio.Event, *, pause_s: float = 0.1) -> None:
        """One batch after the other, until told to stop."""
        while not stop.is_set():
            await self.some_batch()
            await asyncio.sleep(pause_s)

    async def some_batch(self) -> None:
        """A batch of one kind or another."""
        kind = self._chance.choices(("open", "form", "cancelled", "deleted", "broken"), (6, 3, 1, 1, 1))[0]
        match kind:
            case "form":
                await self.filled_batch(self._chance.randint(1, 3))
            case "broken":
                await self.batch_with_a_broken_file()
            case "cancelled":
                await self.abandoned_batch("cancel")
            case "deleted":
                await self.abandoned_batch("delete")
            case _:
                await self.open_batch(puts=self._chance.randint(1, 3), posts=self._chance.randint(0, 2))

    # Kinds of batches

    async def open_batch(self, *, puts: int, posts: int) -> str | None:
        """Made open, filled by both ways, sealed; its id, None where it was not made for certain."""
        batch_id = await self.create()
        if batch_id is None:
            return None
        for _ in range(puts):
            await self.put(batch_id)
        if posts:
            await self.post(batch_id, [self._a_name() for _ in range(posts)], with_text=self._chance.random() < 0.3)
        await self.tell(batch_id, "seal")
        return batch_id

    async def filled_batch(self, files: int) -> str | None:
        """Made and sealed with one form."""
        name = self._a_name("batch")
        names = [self._a_name() for _ in range(files)]
        contents = {each: a_picture(each) for each in names}

        def note(asked: Asked) -> None:
            self._note("create", name, asked, ids=_batch_ids(asked))
            self._note_files(asked, contents)

        asked = await self._insist(note, "POST", "/v1/batches", key=name, files=contents, data={"name": name})
        ids = _batch_ids(asked)
        if not ids:
            return None
        self.journal.on_batch(ids[0], self.user)
        return ids[0]

    async def abandoned_batch(self, how: What) -> str | None:
        """Given up with its files still waiting, or already done."""
        batch_id = await self.create()
        if batch_id is not None:
            await self.post(batch_id, [self._a_name() for _ in range(3)])
            await self.tell(batch_id, how)
        return batch_id

    async def batch_with_a_broken_file(self) -> str | None:
        """One of its files fails, and is tried again by its user when the batch ended."""
        batch_id = await self.create()
        if batch_id is None:
            return None
        await self.put(batch_id)
        asked = await self.put(batch_id, broken=True)
        await self.tell(batch_id, "seal")
        if asked.answer is not None and asked.outcome == "ok" and await self._ended(batch_id):
            upload_id = asked.answer.json()["id"]
            await self._insist(
                lambda each: self._note("retry", upload_id, each),
                "POST",
                f"/v1/uploads/{upload_id}/retry",
                key=self._a_name("retry"),
            )
        return batch_id

    # Requests

    async def create(self, **wish: Any) -> str | None:
        name = self._a_name("batch")
        asked = await self._insist(
            lambda each: self._note("create", name, each, ids=_batch_ids(each)),
            *("POST", "/v1/batches"),
            key=name,
            json={"name": name, **wish},
        )
        ids = _batch_ids(asked)
        if not ids:
            return None
        self.journal.on_batch(ids[0], self.user)
        return ids[0]

    async def put(self, batch_id: str, *, broken: bool = False) -> Asked:
        name = self._a_name()
        content = a_broken_picture(name) if broken else a_picture(name)
        return await self._insist(self._notes_file(name), "PUT", _place(batch_id, name), content=content)

    async def put_once(self, batch_id: str, content: bytes) -> Asked:
        """As it is answered at first, whatever that is."""
        name = self._a_name()
        asked = await self._once("PUT", _place(batch_id, name), content=content)
        self._notes_file(name)(asked)
        return asked

    def _notes_file(self, name: str) -> Note:
        def note(asked: Asked) -> None:
            ids = (asked.answer.json()["id"],) if asked.outcome == "ok" and asked.answer is not None else ()
            self._note("upload", name, asked, ids=ids)

        return note

    async def post(self, batch_id: str, names: Sequence[str], *, with_text: bool = False) -> Asked:
        contents = {name: a_picture(name) for name in names}
        if with_text:
            contents[self._a_name()] = NOT_A_PICTURE
        path = f"/v1/batches/{batch_id}/uploads"
        return await self._insist(
            lambda asked: self._note_files(asked, contents), "POST", path, key=self._a_name("key"), files=contents
        )

    async def tell(self, batch_id: str, what: What) -> Asked:
        """Seal, cancel or delete."""
        if what == "delete":
            self.journal.deleted.add(batch_id)
            return await self._insist(
                lambda asked: self._note(what, batch_id, asked), "DELETE", f"/v1/batches/{batch_id}"
            )
        return await self._insist(
            lambda asked: self._note(what, batch_id, asked), "POST", f"/v1/batches/{batch_id}/{what}"
        )

    async def batch(self, batch_id: str, **params: str) -> dict[str, Any] | None:
        """What GET gives, asked until it is answered; None for 404."""
        for _ in range(TURNS_MAX):
            asked = await self._once("GET", f"/v1/batches/{batch_id}", params=params)
            if asked.outcome == "ok" and asked.answer is not None:
                body: dict[str, Any] = asked.answer.json()
                return body
            if asked.code == "not_found":
                return None
            await asyncio.sleep(PAUSE_S)
        raise AssertionError(f"GET of batch {batch_id} was never answered")

    async def _ended(self, batch_id: str) -> bool:
        for _ in range(TURNS_MAX):
            batch = await self.batch(batch_id)
            if batch is None or batch["completed_at"] is not None:
                return batch is not None
            await asyncio.sleep(PAUSE_S)
        return False

    async def _insist(self, note: Note, method: str, path: str, **request: Any) -> Asked:
        """Ask until it is settled, as a rule; each time is noted."""
        for _ in range(TURNS_MAX):
            asked = await self._asked(note, method, path, **request)
            if asked.settled or (asked.outcome == "unknown" and self._chance.random() < GIVES_UP):
                break
            await asyncio.sleep(PAUSE_S)
        return asked

    async def _asked(self, note: Note, method: str, path: str, **request: Any) -> Asked:
        times = 2 if self._chance.random() < ASKS_TWICE else 1
        both: list[Awaitable[Asked]] = [self._once(method, path, **request) for _ in range(times)]
        answers = await asyncio.gather(*both)
        for asked in answers:
            note(asked)
        return next((asked for asked in answers if asked.outcome == "ok"), answers[0])

    async def _once(
        self, method: str, path: str, *, key: str | None = None, files: Files | None = None, **request: Any
    ) -> Asked:
        if files is not None:
            request["files"] = [("files", (name, content)) for name, content in files.items()]
        begin_s = time.monotonic()
        answer: httpx.Response | None = None
        try:
            headers = {"Idempotency-Key": key} if key else {}
            answer = await self._http.request(
                method, f"{self._chance.choice(self._urls)}{path}", headers=headers, **request
            )
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return Asked("fail", "unreachable", None, begin_s, time.monotonic())
        except httpx.TransportError as error:
            return Asked("unknown", type(error).__name__, None, begin_s, time.monotonic())
        if answer.is_success:
            return Asked("ok", None, answer, begin_s, time.monotonic())
        code = code_of(answer)
        unsure = code in NOT_SURE or answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
        return Asked("unknown" if unsure else "fail", code, answer, begin_s, time.monotonic())

    def _note(self, what: What, mark: str, asked: Asked, *, ids: tuple[str, ...] = ()) -> None:
        position = asked.position if asked.outcome == "ok" else None
        self.journal.operations.append(
            Operation(what, mark, asked.outcome, asked.begin_s, asked.end_s, asked.code, ids, position)
        )

    def _note_files(self, asked: Asked, contents: Files) -> None:
        """Of a form that was answered with ok, some files may be refused all the same."""
        accepted, rejected = {}, {}
        if asked.outcome == "ok" and asked.answer is not None:
            body = asked.answer.json()
            accepted = {each["filename"]: each["id"] for each in body["accepted"]}
            rejected = {each["filename"]: each["code"] for each in body["rejected"]}
        for name in contents:
            if name in rejected:
                refused = Asked("fail", rejected[name], None, asked.begin_s, asked.end_s)
                self._note("upload", name, refused)
            else:
                self._note("upload", name, asked, ids=(accepted[name],) if name in accepted else ())

    def _a_name(self, kind: str = "") -> str:
        number = next(_numbers)
        return f"{kind}-{self.user}-{number}" if kind else f"{self.user}-{number}.jpg"


def code_of(answer: httpx.Response) -> str:
    """The code of a problem; of anything else its status."""
    try:
        return str(answer.json()["code"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return str(answer.status_code)


def _place(batch_id: str, name: str) -> str:
    return f"/v1/batches/{batch_id}/uploads/{name}"


def _batch_ids(asked: Asked) -> tuple[str, ...]:
    if asked.outcome != "ok" or asked.answer is None:
        return ()
    body = asked.answer.json()
    return (str(body.get("batch", body)["id"]),)
