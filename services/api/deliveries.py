"""The files one request brought, between the intake and the answer: which are new, what the log made of them.

A fact names its blob, so the blob is there before it. What no upload refers to once the facts were folded is removed:
refused files, ignored ones, and the copy of whoever was second. On an unknown outcome nothing is removed, since the
fact may yet land.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from schemas.batch import Batch, Upload
from schemas.errors import Code, RequestError
from schemas.events import Limits, LogEvent, UploadQueued
from schemas.ids import partition_of
from schemas.views import Rejected
from services.api import decisions
from services.api.asking import Caller
from services.api.decisions import StoredFile
from services.api.forms import FilePart
from services.api.writing import Became, Writing
from services.blobs import Intake
from services.faults import reach
from services.observability import FILES_RECEIVED

_OF_THE_WHOLE_REQUEST = frozenset(
    {Code.NOT_FOUND, Code.BATCH_SEALED, Code.BATCH_ENDED, Code.IDEMPOTENCY_KEY_REUSED, Code.FILENAME_TAKEN}
)


@dataclass(slots=True)
class Delivery:
    """See the module's text. `limits` are those of the files' batch."""

    parts: Sequence[FilePart]
    intake: Intake
    limits: Limits
    became: list[Became] = field(default_factory=list)
    turned_away: dict[str, RequestError] = field(default_factory=dict)

    def new_files(self, uploads: Mapping[str, Upload]) -> list[StoredFile]:
        """The files whose bytes are in the store and that the batch does not have yet."""
        return [
            StoredFile(
                upload_id=part.upload_id,
                filename=part.filename,
                content_type=part.incoming.content_type,
                size_bytes=part.incoming.size_bytes,
                sha256=part.incoming.sha256,
                blob=part.incoming.blob,
            )
            for part in self.parts
            if part.filename and part.incoming.content_type and part.incoming.kept and part.upload_id not in uploads
        ]

    def addable_files(self, batch: Batch, uploads: Mapping[str, Upload]) -> list[StoredFile]:
        """The new files of a batch that still takes any; those of one that does not are turned away, without a fact."""
        files = self.new_files(uploads)
        try:
            decisions.addable(batch)
        except RequestError as error:
            self.turned_away = {file.upload_id: error for file in files}
            return []
        return files

    async def append(self, events: Sequence[LogEvent], *, writing: Writing, caller: Caller) -> None:
        """Append the events of these files and hear what became of them; raises RequestError as `Writing.append`."""
        if not events:
            return
        self.intake.keep()
        reach("api.after_blob")
        try:
            partition = partition_of(self.parts[0].upload_id)
            self.became = await writing.append(events, partition=partition, caller=caller)
        except RequestError as error:
            if error.code is not Code.OUTCOME_UNKNOWN:
                await self._drop(used=frozenset())
            raise

    async def settle(self, batch: Batch, uploads: Mapping[str, Upload]) -> tuple[list[Upload], list[Rejected]]:
        """The files that are in the batch now, and those that are not and why; their bytes are removed.

        Raises RequestError where the log took none of them and the reason is not theirs but the batch's.
        """
        accepted = [uploads[part.upload_id] for part in self.parts if part.upload_id in uploads]
        queued = [each.event.blob for each in self.became if isinstance(each.event, UploadQueued) and each.effective]
        await self._drop(used=frozenset(upload.blob for upload in accepted).union(queued))
        FILES_RECEIVED.labels("accepted").inc(len(accepted))
        FILES_RECEIVED.labels("refused").inc(len(self.parts) - len(accepted))
        by_batch = self.turned_away | {
            each.event.upload_id: decisions.refusal(each.ignored, batch)
            for each in self.became
            if isinstance(each.event, UploadQueued) and each.ignored is not None
        }
        for error in by_batch.values():
            if not accepted and error.code in _OF_THE_WHOLE_REQUEST:
                raise error
        return accepted, self.rejected(by_batch)

    def rejected(self, by_batch: Mapping[str, RequestError]) -> list[Rejected]:
        """The files that were refused as they came, and those the batch did not take, in the request's order."""
        found = []
        for part in self.parts:
            name = part.filename or part.given_name
            code = Code.INVALID_REQUEST if part.filename is None else part.incoming.problem
            if code is not None:
                detail = decisions.refused_file(code, limits=self.limits)
                found.append(Rejected(filename=name, code=code, detail=detail))
            elif (error := by_batch.get(part.upload_id)) is not None:
                found.append(Rejected(filename=name, code=error.code, detail=error.detail))
        return found

    def nothing_taken(self) -> RequestError:
        """The answer where no file is taken and so no batch is made: the first one's code speaks for all."""
        rejected = self.rejected({})
        first = rejected[0]
        return RequestError(
            Code(first.code),
            f"{first.filename!r}: {first.detail}",
            {"rejected": [each.model_dump(mode="json") for each in rejected]},
        )

    async def _drop(self, *, used: frozenset[str]) -> None:
        await self.intake.drop(part.incoming for part in self.parts if part.incoming.blob not in used)
