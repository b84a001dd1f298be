"""Who asks the api: clients that repeat what stayed unknown, and write down what became of each wish.

A wish is `ok` once it was granted, `refused` once an answer said that nothing of it was or will be done, `unknown`
where no such answer came. What its files and its batch are called is found nowhere else, so the log can be searched for
it; a repetition carries the same Idempotency-Key.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.faults.simulation.processes import Answer, ConnectionLost, Process, Sent, ask
from tests.faults.simulation.world import World

Outcome = Literal["ok", "refused", "unknown"]

REPEATS_MAX = 60
PAUSE_S = 0.3
SENT_AGAIN = {"outcome_unknown", "log_unavailable", "database_unavailable", "storage_unavailable", "projection_behind"}
NOTHING_DONE = SENT_AGAIN - {"outcome_unknown"}
_BOUNDARY = "frontier"


@dataclass(slots=True)
class Wish:
    """What a client wanted and what came of it. `names` of files are its own; `answers` in the order they came."""

    kind: str
    sent: Sent
    names: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    outcome: Outcome = "unknown"
    answers: list[Answer] = field(default_factory=list)

    @property
    def answer(self) -> Answer:
        """The last one; there must be one."""
        return self.answers[-1]

    @property
    def code(self) -> str | None:
        return self.answers[-1].code if self.answers else None


@dataclass(slots=True)
class History:
    """All wishes of all clients, and what was read."""

    wishes: list[Wish] = field(default_factory=list)
    reads: list[tuple[Sent, Answer]] = field(default_factory=list)
    named: dict[str, int] = field(default_factory=dict)

    def name(self, kind: str) -> str:
        """A name nobody had before."""
        self.named[kind] = self.named.get(kind, 0) + 1
        return f"{kind}-{self.named[kind]}"


class Client:
    """One user, who asks any of the replicas. Keys are of this run, so runs differ in the partitions of batches."""

    def __init__(self, world: World, history: History, replicas: Sequence[Process], *, user_id: str) -> None:
        self.user_id = user_id
        self._world = world
        self._history = history
        self._replicas = replicas

    # Wishes

    async def create(self, *, key: str | None = None, expected: int | None = None) -> Wish:
        body = {"name": self._history.name("batch")} | ({} if expected is None else {"expected_uploads": expected})
        sent = self._sent("POST", "/v1/batches", key=key, kind="application/json", body=json.dumps(body).encode())
        return await self._wish(Wish("create", sent, (body["name"],)), again=key is not None)  # type: ignore[arg-type]

    async def post_batch(self, *kinds: str, key: str | None = None) -> Wish:
        """One request with all its files, sealed; the files' names begin with their kinds."""
        return await self._post("post_batch", "/v1/batches", kinds, key)

    async def post_uploads(self, batch_id: str, *kinds: str, key: str | None = None) -> Wish:
        return await self._post("post_uploads", f"/v1/batches/{batch_id}/uploads", kinds, key)

    async def put(self, batch_id: str, filename: str, content: str) -> Wish:
        """Put a file under a name that others may use too."""
        body = content_of(content)
        sent = self._sent("PUT", f"/v1/batches/{batch_id}/uploads/{filename}", body=body)
        return await self._wish(Wish("put", sent, (filename,), (_sha256(body),)), again=True)

    async def seal(self, batch_id: str) -> Wish:
        return await self._wish(Wish("seal", self._sent("POST", f"/v1/batches/{batch_id}/seal")), again=True)

    async def cancel(self, batch_id: str) -> Wish:
        return await self._wish(Wish("cancel", self._sent("POST", f"/v1/batches/{batch_id}/cancel")), again=True)

    async def delete(self, batch_id: str) -> Wish:
        return await self._wish(Wish("delete", self._sent("DELETE", f"/v1/batches/{batch_id}")), again=True)

    async def retry_batch(self, batch_id: str, *, key: str | None = None) -> Wish:
        sent = self._sent("POST", f"/v1/batches/{batch_id}/retry", key=key)
        return await self._wish(Wish("retry", sent), again=key is not None)

    async def retry_upload(self, upload_id: str, *, key: str | None = None) -> Wish:
        sent = self._sent("POST", f"/v1/uploads/{upload_id}/retry", key=key)
        return await self._wish(Wish("retry", sent), again=key is not None)

    async def repeat(self, wish: Wish) -> Wish:
        """The very same request again, as a wish of its own."""
        return await self._wish(Wish(wish.kind, wish.sent, wish.names, wish.sha256), again=True)

    # Reading

    async def read(self, path: str, *, min_position: str | None = None) -> Answer | None:
        """What any replica answers; None where none does for long."""
        query = f"min_position={min_position}" if min_position else ""
        for _ in range(REPEATS_MAX):
            sent = Sent("GET", path, self.user_id, query=query)
            answer = await self._try(sent)
            if answer is not None and answer.code not in SENT_AGAIN:
                self._history.reads.append((sent, answer))
                return answer
            await asyncio.sleep(PAUSE_S)
        return None

    async def until_ended(self, batch_id: str, *, seconds: float = 60) -> str | None:
        """The batch's status once it ended; the status it has after so long; None where it is not there."""
        answer = None
        deadline_s = self._world.loop.now_s + seconds
        while self._world.loop.now_s < deadline_s:
            answer = await self.read(f"/v1/batches/{batch_id}")
            if answer is None or answer.status == 404:
                return None
            if answer.body["status"] in ("completed", "failed", "cancelled"):
                break
            await asyncio.sleep(0.2)
        return None if answer is None else str(answer.body["status"])

    # How

    async def _post(self, kind: str, path: str, kinds: Sequence[str], key: str | None) -> Wish:
        names = tuple(f"{self._history.name(each)}.jpg" for each in kinds)
        bodies = [content_of(name) for name in names]
        sent = self._sent(
            "POST",
            path,
            key=key,
            kind=f"multipart/form-data; boundary={_BOUNDARY}",
            body=b"".join(_parts(names, bodies)),
        )
        return await self._wish(Wish(kind, sent, names, tuple(map(_sha256, bodies))), again=key is not None)

    def _sent(self, method: str, path: str, *, key: str | None = None, kind: str = "", body: bytes = b"") -> Sent:
        headers = [("Idempotency-Key", f"{key}-{self._world.seed}")] if key else []
        headers += [("Content-Type", kind)] if kind else []
        return Sent(method, path, self.user_id, tuple(headers), body)

    async def _wish(self, wish: Wish, *, again: bool) -> Wish:
        """Send it, and, where it may be done twice without harm, again until it is known what came of it."""
        self._history.wishes.append(wish)
        in_doubt = False
        for _ in range(REPEATS_MAX if again else 1):
            answer = await self._try(wish.sent)
            if answer is not None:
                wish.answers.append(answer)
            if answer is None or answer.code in SENT_AGAIN:
                in_doubt = in_doubt or answer is None or answer.code not in NOTHING_DONE
                wish.outcome = "unknown" if in_doubt else "refused"
                await asyncio.sleep(PAUSE_S * (0.5 + self._world.choices.random()))
                continue
            wish.outcome = "ok" if answer.status < 300 else "refused"
            break
        self._world.tell(wish.kind, f"{wish.outcome} {wish.code or ''} {wish.names}")
        return wish

    async def _try(self, sent: Sent) -> Answer | None:
        replica = self._replicas[int(self._world.choices.random() * len(self._replicas))]
        try:
            return await ask(replica, sent)
        except ConnectionLost:
            return None


def content_of(text: str) -> bytes:
    """The bytes of a picture, as far as anybody looks."""
    return b"\xff\xd8\xff\xe0" + text.encode()


def _parts(names: Sequence[str], bodies: Sequence[bytes]) -> Iterator[bytes]:
    for name, body in zip(names, bodies, strict=True):
        yield (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        yield body + b"\r\n"
    yield f"--{_BOUNDARY}--\r\n".encode()


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
