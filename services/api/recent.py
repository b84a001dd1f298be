"""Which batches and uploads the tail knows more of than the read models do.

The tail folds the facts of batches in memory; this remembers, for each batch and each new upload, the newest of those
facts, until the read models include it. A GET asks here which of the two to answer from.
"""

from schemas.batch import Changed
from schemas.events import UploadQueued
from services.tail import Folded, Tail

_FORGET_EVERY_FACTS = 1_000


class Recent:
    """See the module's text. Bounded by what the tail takes before it says it is full."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._batches: dict[str, tuple[int, int]] = {}
        self._batch_of_upload: dict[str, str] = {}
        self._uploads_of_batch: dict[str, list[str]] = {}
        self._noted = 0
        self.close = tail.listen(self._note)

    def ahead(self, batch_id: str) -> bool:
        """Whether facts of this batch were folded here that the read models do not include."""
        place = self._batches.get(batch_id)
        return place is not None and not self._projected(*place)

    def batch_of(self, upload_id: str) -> str | None:
        """The batch of an upload that may be too new for the read models; None where that is not known here."""
        return self._batch_of_upload.get(upload_id)

    def _note(self, folded: Folded) -> None:
        fact, batch_id = folded.fact, folded.fact.batch_id
        if batch_id is None or not isinstance(folded.outcome, Changed) or self._projected(fact.partition, fact.offset):
            return
        self._batches[batch_id] = (fact.partition, fact.offset)
        if isinstance(fact.event, UploadQueued):
            self._batch_of_upload[fact.event.upload_id] = batch_id
            self._uploads_of_batch.setdefault(batch_id, []).append(fact.event.upload_id)
        self._noted += 1
        if self._noted % _FORGET_EVERY_FACTS == 0:
            self._forget()

    def _forget(self) -> None:
        """Let go of what the read models include by now."""
        for batch_id in [each for each, place in self._batches.items() if self._projected(*place)]:
            del self._batches[batch_id]
            for upload_id in self._uploads_of_batch.pop(batch_id, ()):
                del self._batch_of_upload[upload_id]

    def _projected(self, partition: int, offset: int) -> bool:
        included = self._tail.projected().offset(partition)
        return included is not None and included >= offset
