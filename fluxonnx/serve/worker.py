"""The thread that draws: takes batches from the queue, tells of each step, and stops at the next one when asked."""

from __future__ import annotations

import base64
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxonnx.errors import Cancelled, FluxonnxError
from fluxonnx.runtime.events import Event, PhaseBegan, StepEnded
from fluxonnx.runtime.memory import MOST_AT_ONCE
from fluxonnx.runtime.metadata import embed
from fluxonnx.runtime.request import Request
from fluxonnx.serve.errors import without_paths
from fluxonnx.serve.gallery import Gallery, encoded
from fluxonnx.serve.hub import JOB, PREVIEW, Hub
from fluxonnx.serve.metrics import Metrics, PhaseClock
from fluxonnx.serve.models import Models, Opened
from fluxonnx.serve.parameters import again, to_request
from fluxonnx.serve.queue import QUEUED, RUNNING, Job, Queue

log = logging.getLogger("fluxonnx.serve")

# Seconds until the queue is looked at again after it could not be read or written, such as with a full disk.
RETRY = 2.0
# How many of the waiting jobs are told of their new position.
MOST_TOLD = 50


@dataclass
class Progress:
    """How far a running job is.

    Attributes:
        phase: What is being done.
        step: The last step that ended.
        steps: How many there are; 0 before the first one.
        preview: The latest small picture, a JPEG.
    """

    phase: str = ""
    step: int = 0
    steps: int = 0
    preview: bytes | None = None


class Worker:
    """One thread that owns the models."""

    def __init__(
        self,
        queue: Queue,
        gallery: Gallery,
        models: Models,
        hub: Hub,
        metrics: Metrics,
        describe: Callable[[Job], dict[str, Any]],
        private: Mapping[Path, str],
    ) -> None:
        """Draw nothing yet.

        Args:
            queue: Where jobs come from.
            gallery: Where their input pictures are.
            models: What they are drawn with.
            hub: Who is told.
            metrics: What is counted.
            describe: Returns what clients are told of a job.
            private: Folders whose names are not told.
        """
        self._queue, self._gallery, self._models, self._hub, self._metrics = queue, gallery, models, hub, metrics
        self._describe, self._private = describe, private
        self._wake = threading.Condition()
        self._stopping, self._hurry = False, False
        self._changed = False
        self._drawn: list[tuple[Job, int]] = []  # the pictures of the batch that are not finished
        self.progress: dict[str, Progress] = {}
        self._clock = PhaseClock(metrics.phase)
        models.watch = self._watch
        self._thread = threading.Thread(target=self._run, name="fluxonnx-worker", daemon=True)
        self.broken: str | None = None

    @property
    def alive(self) -> bool:
        """Whether jobs are taken from the queue."""
        return self._thread.is_alive() and not self._stopping and self.broken is None

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue: a job was added or cancelled."""
        with self._wake:
            self._changed = True
            self._wake.notify()

    def drain(self) -> None:
        """Finish the batch that is under way, and begin no other."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def stop(self, seconds: float) -> None:
        """End the thread: what is not finished after so many seconds goes back into the queue."""
        self.drain()
        self._thread.join(max(0.0, seconds))
        self._hurry = True
        self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._drawn)

    def is_worker(self) -> bool:
        """Whether the calling thread is this one's."""
        return threading.current_thread() is self._thread

    def warn(self, message: str) -> None:
        """Remember a warning of the library for the jobs that are drawn."""
        for job in {job.id: job for job, _ in self._drawn}.values():
            self._queue.warn(job.id, without_paths(message, self._private))

    def _run(self) -> None:
        while not self._stopping:
            try:
                batch = self._queue.next_batch(MOST_AT_ONCE)
                if batch:
                    self._draw_batch(batch)
                self.broken = None
                if not batch:
                    self._wait(None)
            except Exception as error:  # of the database or of ours: the server goes on, and says that it is not well
                self.broken = type(error).__name__
                known = isinstance(error, sqlite3.Error)
                log.error("the queue can't be worked on", exc_info=not known, extra={"facts": {"error": str(error)}})
                self._wait(RETRY)

    def _wait(self, seconds: float | None) -> None:
        with self._wake:
            if not self._changed and not self._stopping:
                self._wake.wait(seconds)
            self._changed = False

    def _draw_batch(self, batch: list[tuple[Job, list[int]]]) -> None:
        jobs = [job for job, _ in batch]
        self._drawn = [(job, position) for job, positions in batch for position in positions]
        self._metrics.batch.observe(len(self._drawn))
        for job, positions in batch:
            self.progress[job.id] = Progress()
            if positions[:1] == [0]:  # the first time
                self._metrics.wait.observe(max(0.0, time.time() - job.created))
            self.tell(job.id)
        self._tell_waiting(jobs[0].owner)
        try:
            self._draw(jobs[0].parameters, jobs[0].owner)
        except sqlite3.Error:  # a full disk, say: the job stays, and is tried again
            raise
        except Exception as error:
            self._failed({job.id for job, _ in self._drawn}, error)
        finally:
            self._clock.began("")
            for job in jobs:
                self.progress.pop(job.id, None)
                if self._stopping:
                    self._queue.requeue(job.id)
                self.tell(job.id)
            self._drawn = []

    def _draw(self, parameters: Mapping[str, Any], owner: str) -> None:
        opened = self._models.ready(parameters)
        request, facts = to_request(parameters, lambda identifier, name: self._gallery.find(identifier, owner, name))
        self._models.encode(opened, request)
        self._drop_cancelled()
        start = time.perf_counter()
        while self._drawn and not self._hurry:
            try:
                self._draw_pictures(opened, request, facts, start)
            except Cancelled:
                self._drop_cancelled()

    def _draw_pictures(self, opened: Opened, request: Request, facts: Mapping[str, Any], start: float) -> None:
        seeds = [job.seeds[position] for job, position in self._drawn]
        for _, image in opened.flux.pictures(request, seeds, self._goes_on):
            job, position = self._drawn[0]
            about: dict[Any, Any] = {**image.info, **facts}
            plain = image.copy()
            plain.info = {}
            data = encoded(plain, "PNG", **embed("PNG", about))
            told = again(job.parameters, image.info)
            kept = self._queue.add_picture(job, position, data, image.size, told)
            self.broken = None  # before a client hears that the job is done
            self._drawn.pop(0)
            if kept:
                self._metrics.pictures.inc()
                self._metrics.picture.observe(time.perf_counter() - start)
            progress = self.progress.get(job.id)
            if progress is not None:
                progress.step, progress.preview = 0, None
            self.tell(job.id)

    def _goes_on(self, step: int, steps: int, sigma: float, latents: Any) -> bool:
        """Whether the pass is still wanted; called after each step."""
        if self._hurry:
            return False
        return any(self._is_wanted(job) for job, _ in self._drawn[: len(latents)])

    def _is_wanted(self, job: Job) -> bool:
        return self._queue.job(job.id).state == RUNNING

    def _drop_cancelled(self) -> None:
        self._drawn = [(job, position) for job, position in self._drawn if self._is_wanted(job)]

    def _failed(self, identifiers: set[str], error: Exception) -> None:
        if isinstance(error, FluxonnxError):
            message = without_paths(str(error), self._private)
        elif isinstance(error, MemoryError):
            message = "out of memory: choose a smaller size"
        else:
            message = f"internal error ({type(error).__name__}): the server's log says more"
        log.warning("job failed", extra={"facts": {"jobs": sorted(identifiers), "error": str(error)[:500]}})
        if not isinstance(error, FluxonnxError | MemoryError):
            log.error("internal error", exc_info=error)
        for identifier in identifiers:
            self._queue.fail(identifier, message)

    def _watch(self, event: Event) -> None:
        """Observe what happens inside a run; has the signature of `Flux.watch`."""
        if not self.is_worker():  # a model that is opened by the main thread
            return
        if isinstance(event, PhaseBegan):
            self._clock.began(event.name)
            for progress in list(self.progress.values()):
                progress.phase = event.name
        elif isinstance(event, StepEnded):
            self._step_ended(event)

    def _step_ended(self, event: StepEnded) -> None:
        for i, (job, position) in enumerate(self._drawn[: event.count]):
            progress = self.progress[job.id]
            progress.step, progress.steps = event.index, event.steps
            # the finished picture follows at once after the last step
            if event.index < event.steps and (i == 0 or self._drawn[i - 1][0] is not job):
                data = encoded(event.preview(i), "JPEG", quality=85)
                progress.preview = data
                if self._hub.hears(job.owner, job.id):
                    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
                    news = {"job": job.id, "picture": position, "step": event.index, "steps": event.steps, "image": url}
                    self._hub.publish(PREVIEW, job.owner, job.id, news)
            self.tell(job.id)

    def tell(self, identifier: str) -> None:
        """Tell those who listen how a job is."""
        job = self._queue.job(identifier)
        if job.finished is not None and identifier not in self.progress:
            self.note_end(job)
        if self._hub.hears(job.owner, job.id):
            self._hub.publish(JOB, job.owner, job.id, self._describe(job))

    def note_end(self, job: Job) -> None:
        """Count a job that has ended."""
        self._metrics.jobs.labels(job.state).inc()
        seconds = round((job.finished or 0) - (job.started or job.created), 3)
        facts = {"job": job.id, "state": job.state, "pictures": len(job.seeds), "seconds": seconds}
        log.info("job ended", extra={"facts": facts})

    def _tell_waiting(self, owner: str) -> None:
        """Tell those who wait of their new positions."""
        for job in self._queue.active(owner)[:MOST_TOLD]:
            if job.state == QUEUED and self._hub.hears(owner, job.id):
                self._hub.publish(JOB, owner, job.id, self._describe(job))
