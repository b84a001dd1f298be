"""`sluice demo`: everything started, the shipped pictures sent through it, live, and what became of each.

The demo judges itself: every picture must complete and the one that is broken on purpose must fail with its code.
Which those are: `services/demo`; how all is started: `up.py`.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from services.cli import connection, up
from services.cli.client import Api
from services.cli.connection import Connection
from services.cli.display import Silence, clean, display, outcomes, print_json
from services.cli.hints import addresses, curl_hints
from services.cli.part_logs import Say
from services.cli.sending import Sent
from services.cli.watching import send_and_follow
from services.demo import FAILURES, pictures


class Demo:
    """One run. `complaints` is what did not go as it should; empty after a run where all did."""

    def __init__(self, plan: up.Plan, *, console: Console, stays: bool, as_json: bool = False) -> None:
        self.complaints: list[str] = ["the demo did not come to its end"]
        self.clean = True
        self._plan = plan
        self._console = console
        self._stays = stays
        self._as_json = as_json

    async def run(self, say: Say) -> None:
        """Start, send, watch, judge; with a terminal stay up until told to stop."""
        async with up.running(self._plan, say=say, follow=False) as stack:
            token = connection.make_token(user=connection.DEFAULT_USER, data_dir=self._plan.data_dir)
            here = Connection(api=stack.endpoints["api"], token=token)
            sent, uploads = await stack.parts.unless_one_ends(self._send(here))
            self.complaints = judge(uploads, sent.rejected)
            if self._as_json:
                print_json({"complaints": self.complaints, "accepted": uploads, "rejected": sent.rejected})
            else:
                self._show(stack, sent, uploads, here)
            if self._stays:
                await stack.parts.until_one_ends()
        self.clean = stack.clean

    async def _send(self, here: Connection) -> tuple[Sent, list[dict[str, Any]]]:
        async with contextlib.AsyncExitStack() as stack:
            api = await stack.enter_async_context(Api.open(here))
            batch = await api.create_batch(name="demo")
            shown = Silence() if self._as_json else await stack.enter_async_context(display())
            sent, board = await send_and_follow(api, batch, token=here.token, files=pictures(), shown=shown)
            return sent, [] if sent.batch is None else await api.uploads(board.batch_id, min_position=board.position)

    def _show(self, stack: up.Stack, sent: Sent, uploads: Sequence[Mapping[str, Any]], here: Connection) -> None:
        self._console.print()
        self._console.print(outcomes(uploads, sent.rejected))
        self._console.print()
        for complaint in self.complaints:
            self._console.print(clean(f"NOT as it should be: {complaint}"), style="red", markup=False)
        if not self.complaints:
            broken = ", ".join(FAILURES)
            self._console.print(f"All as it should be: {broken} is broken on purpose, the others completed.\n")
        self._console.print(addresses(stack.endpoints, data_dir=self._plan.data_dir))
        if self._stays and sent.batch is not None:
            for line in curl_hints(here, batch_id=sent.batch["id"]):
                self._console.print(line, markup=False, soft_wrap=True)
        if self._stays:
            self._console.print("\nCtrl-C stops it.", style="bold")


def judge(uploads: Iterable[Mapping[str, Any]], rejected: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each picture that did not end as it should."""
    found = {upload["filename"]: upload for upload in uploads}
    refused = {one["filename"]: one for one in rejected}
    complaints: list[str] = []
    for name in (picture.name for picture in pictures()):
        upload = found.get(name)
        expected = f"failed with {FAILURES[name]}" if name in FAILURES else "completed"
        if upload is None:
            became = f"was not taken: {refused.get(name, {}).get('detail', 'nothing is known of it')}"
        elif upload["error"]:
            became = f"{upload['status']} with {upload['error']['code']}"
        else:
            became = upload["status"]
        if became != expected:
            complaints.append(f"{name} should have {expected}, but {became}")
    return complaints
