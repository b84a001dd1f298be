"""Where the lane's hand works on one file: its bytes come, a child process works, its thumbnail goes to the store.

`stop` ends each of these at once, whatever they wait for. Where no child process can be started nothing is started
either, so no file is taken up and given back again and again: the part is lost until a child is warm again, which is
tried now and then.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.batch import Upload
from schemas.errors import WorkCode
from schemas.events import UploadStarted
from services.blobs import BlobMissing, BlobStore, LocalFile, StorageUnavailable
from services.faults import reach
from services.lifecycle import cancelled
from services.processor.storage import Patience, unreadable
from services.processor.work.port import Job, Progress, WorkCancelled, WorkError, WorkerUnavailable
from services.processor.work.process import WorkerProcess

if TYPE_CHECKING:
    from services.processor.health import Health  # which knows the lane, which knows this

T = TypeVar("T")

PART = "work"
LOOK_INTERVAL_S = 5.0
UNREADABLE_PAUSE_S = 0.5


@dataclass(slots=True)
class Work:
    """The file in work. `stopped` says why it was stopped from outside: its `batch`, or `shutdown`; `moving`: its bytes
    on their way here, or its thumbnail on its way to the store."""

    started: UploadStarted
    upload: Upload
    stopped: str | None = None
    moving: "asyncio.Task[Any] | None" = None


class Workbench:
    """See the module's text. `on_change` is called when a child is warm again."""

    def __init__(
        self, worker: WorkerProcess, blobs: BlobStore, health: "Health", *, scratch: Path, work_timeout_s: float
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._worker = worker
        self._blobs = blobs
        self._health = health
        self._scratch = scratch
        self._work_timeout_s = work_timeout_s
        self._patience = Patience(blobs)

    async def keep(self) -> None:
        """Try for a child again where none could be had. Never returns."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            if PART not in self._health.parts:
                continue
            try:
                await self._worker.warm()
            except WorkerUnavailable as error:
                self._health.lost(PART, str(error))
            else:
                self._health.back(PART)
                self.on_change()

    def stop(self, work: Work, *, why: str) -> None:
        """End the work on a file; also that which has not begun."""
        if work.stopped is None:
            work.stopped = why
            if work.moving is not None:
                work.moving.cancel()
            self._cancelling = asyncio.create_task(self._worker.cancel(), name="lane.cancel")

    _cancelling: "asyncio.Task[None]"

    async def result(self, work: Work, *, on_progress: Progress) -> dict[str, Any]:
        """What the work on a file comes to. Raises WorkError (it failed), WorkCancelled (it was stopped), and
        WorkerUnavailable or StorageUnavailable (it is unharmed)."""
        name = f"{work.upload.id}-{work.started.attempt}"
        copied, thumbnail = self._scratch / name, self._scratch / f"{name}.jpg"
        try:
            return await self._worked(work, copied=copied, thumbnail=thumbnail, on_progress=on_progress)
        except WorkerUnavailable as error:
            self._health.lost(PART, str(error))
            raise
        except StorageUnavailable:
            await asyncio.sleep(UNREADABLE_PAUSE_S)
            if await self._patience.ends_with(work.upload.id):
                raise unreadable() from None
            raise
        finally:
            thumbnail.unlink(missing_ok=True)
            copied.unlink(missing_ok=True)

    async def _worked(self, work: Work, *, copied: Path, thumbnail: Path, on_progress: Progress) -> dict[str, Any]:
        upload = work.upload
        job = Job(
            upload_id=upload.id,
            batch_id=upload.batch_id,
            filename=upload.filename,
            content_type=upload.content_type,
            size_bytes=upload.size_bytes,
            sha256=upload.sha256,
            path=await self._bring(work, to=copied),
            thumbnail_path=thumbnail,
        )
        if work.stopped is not None:
            raise WorkCancelled
        result = await self._worker.run(job, on_progress=on_progress, timeout_s=self._work_timeout_s)
        reach("processor.after_work")
        if job.thumbnail_path.exists():
            epoch, attempt = work.started.epoch, work.started.attempt
            await self._moved(work, self._blobs.put_file(thumbnail, upload.id, epoch=epoch, attempt=attempt))
        return result

    async def _bring(self, work: Work, *, to: Path) -> Path:
        """The upload's bytes as a file here, which may be a copy at `to`."""
        upload = work.upload
        try:
            file: LocalFile = await self._moved(work, self._blobs.bring(upload.blob, to=to))
        except BlobMissing:
            raise WorkError(WorkCode.BLOB_MISSING, "The stored file is gone.") from None
        if file.size_bytes != upload.size_bytes:
            raise WorkError(
                WorkCode.BLOB_MISSING,
                f"The stored file has {file.size_bytes} bytes, {upload.size_bytes} were accepted.",
            )
        return file.path

    async def _moved(self, work: Work, moving: Coroutine[Any, Any, T]) -> T:
        """What it comes to; given up once the work is stopped."""
        work.moving = task = asyncio.create_task(moving, name="lane.move")
        if work.stopped is not None:
            task.cancel()
        try:
            await asyncio.wait({task})
        finally:
            if not task.done():
                await cancelled(task)
        if task.cancelled():
            raise WorkCancelled
        return task.result()
