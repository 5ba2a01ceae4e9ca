"""Everything that a server consists of, and what its APIs share: accepting, describing and ending jobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxonnx.serve.database import Database
from fluxonnx.serve.errors import ApiError, wrong
from fluxonnx.serve.gallery import Gallery, Picture
from fluxonnx.serve.hub import JOB, Hub
from fluxonnx.serve.keys import Keys
from fluxonnx.serve.metrics import Metrics
from fluxonnx.serve.models import Models
from fluxonnx.serve.parameters import read_job
from fluxonnx.serve.queue import ENDED, QUEUED, RUNNING, Job, Queue
from fluxonnx.serve.settings import Settings
from fluxonnx.serve.worker import Worker

log = logging.getLogger("fluxonnx.serve")

MOST_IDEMPOTENCY = 200


class Service:
    """A server without its network.

    Attributes:
        settings: What it was told.
        keys: Who may use it.
        models: What it draws with.
        queue: Its jobs.
        gallery: Its pictures.
        hub: Who listens.
        metrics: What is counted.
        worker: The thread that draws.
        chosen: The models that clients of the API of AUTOMATIC1111 chose, by owner.
        draining: Whether it takes no more jobs, because it ends.
    """

    def __init__(self, settings: Settings, models: Models) -> None:
        """Open the queue; nothing is drawn yet.

        Args:
            settings: What it is told.
            models: Models that are open.

        Raises:
            UsageError: Another server uses the folder, or it can't be written to.
            FluxonnxError: The queue can't be opened.
        """
        self.settings, self.models = settings, models
        self._base = Database(settings.data)
        self.queue = Queue(self._base)
        self.gallery = Gallery(self._base, settings.limits.upload_pixels)
        self.keys = Keys(settings.keys, settings.data / "secret")
        self.hub = Hub()
        self.private: Mapping[Path, str] = {
            settings.data: "data",
            **{held.root: held.id for held in models.all},
            **({settings.lora_dir: "loras"} if settings.lora_dir else {}),
        }
        self.metrics = Metrics(self.queue.waiting, lambda: int(self.worker.busy), lambda: self.hub.listeners)
        self.worker = Worker(self.queue, self.gallery, models, self.hub, self.metrics, self.describe, self.private)
        self.draining = False
        self.chosen: dict[str, str] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go on with the jobs that wait, and draw."""
        self.hub.begin(loop)
        waiting = self.queue.recover()
        if waiting:
            log.info("jobs go on", extra={"facts": {"queued": waiting}})
        used: set[str] = set()
        for job in self.queue.all_waiting():
            for name in ("input", "mask", "references"):
                value = job.parameters.get(name, [])
                used.update([value] if isinstance(value, str) else value)
        self.gallery.forget_uploads(used)
        self.gallery.remove_strays()
        self.worker.start()

    def drain(self) -> None:
        """Take no more jobs, finish the batch that is under way, and end all streams; called in the loop's thread."""
        self.draining = True
        self.worker.drain()
        self.hub.close()

    def close(self) -> None:
        """End the worker and close everything."""
        self.worker.stop(0)
        self.models.close()
        self._base.close()

    def submit(
        self, owner: str, body: Any, *, attached: bool = False, idempotency: str | None = None
    ) -> tuple[Job, bool]:
        """Accept a job; reads pictures, so not in the loop's thread.

        Args:
            owner: Whose it is.
            body: The JSON that describes it.
            attached: Whether the client waits for it: it is cancelled when the client goes away.
            idempotency: A name that the client chose, for which it gets the same job if it asks again.

        Returns:
            The job, and whether it is new.

        Raises:
            ApiError: It can't be done, or too many wait.
        """
        if idempotency is not None and not 0 < len(idempotency) <= MOST_IDEMPOTENCY:
            raise wrong(f"the idempotency key has to have 1 to {MOST_IDEMPOTENCY} characters", "Idempotency-Key")
        if idempotency is not None and (known := self.queue.known(owner, idempotency)):
            return known, False
        limits = self.settings.limits
        accepted = read_job(
            body, self.models, limits, lambda identifier, name: self.gallery.find(identifier, owner, name), self.private
        )
        self._check_room(owner)
        job, is_new = self.queue.add(
            owner, accepted.parameters, accepted.seeds, accepted.batch, attached=attached, idempotency=idempotency
        )
        if is_new:
            facts = {"job": job.id, "pictures": len(job.seeds), "model": job.parameters["model"]}
            log.info("job accepted", extra={"facts": facts})
            self.hub.publish(JOB, owner, job.id, self.describe(job))
            self.worker.wake()
        return job, is_new

    def _check_room(self, owner: str) -> None:
        """Raise ApiError if no more jobs are taken."""
        if self.draining:
            raise ApiError(503, "the server is shutting down: try again soon", code="draining", headers=RETRY)
        limits = self.settings.limits
        if self.queue.waiting(owner) >= limits.queue:
            message = f"{limits.queue} of your jobs wait, which is the most: wait for some of them, or cancel them"
            raise ApiError(429, message, code="queue_full", headers=RETRY)
        if self.queue.waiting() >= limits.waiting:
            raise ApiError(429, "too many jobs wait: try again later", code="queue_full", headers=RETRY)

    def cancel(self, identifier: str, owner: str) -> Job:
        """End a job that waits or runs; its finished pictures stay.

        Raises:
            ApiError: There is none.
        """
        job = self.queue.job(identifier, owner)
        if self.queue.cancel(job.id):
            ended = self.queue.job(identifier)
            if job.state == QUEUED:
                self.worker.note_end(ended)
            self.hub.publish(JOB, owner, job.id, self.describe(ended))
            self.worker.wake()
        return self.queue.job(identifier)

    async def finished(self, job: Job) -> Job:
        """Wait until a job has ended.

        Raises:
            ApiError: The server ends before.
        """
        subscription = self.hub.subscribe(job.owner, job.id)
        try:
            current = self.queue.job(job.id)
            if current.state not in ENDED:
                async for news in subscription:
                    if news.event == JOB and news.data["state"] in ENDED:
                        break
            current = self.queue.job(job.id)
        finally:
            self.hub.leave(subscription)
        if current.state not in ENDED:
            with contextlib.suppress(ApiError):
                self.cancel(job.id, job.owner)
            raise ApiError(503, "the server is shutting down: try again soon", code="draining", headers=RETRY)
        return current

    def describe(self, job: Job) -> dict[str, Any]:
        """Return what clients are told of a job."""
        return self.describe_all([job])[0]

    def describe_all(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Return what clients are told of some jobs."""
        pictures = self.gallery.of_jobs([job.id for job in jobs])
        return [self._description(job, pictures[job.id]) for job in jobs]

    def _description(self, job: Job, pictures: Sequence[Picture]) -> dict[str, Any]:
        progress = self.worker.progress.get(job.id) if job.state == RUNNING else None
        return {
            "id": job.id,
            "state": job.state,
            "position": self.queue.position(job),
            "progress": {
                "phase": progress.phase if progress else "",
                "step": progress.step if progress else 0,
                "steps": progress.steps if progress else 0,
                "pictures": len(pictures),
                "count": len(job.seeds),
            },
            "parameters": job.parameters,
            "pictures": [self.describe_picture(picture, brief=True) for picture in pictures],
            "warnings": job.warnings,
            "error": job.error,
            "created": job.created,
            "started": job.started,
            "finished": job.finished,
        }

    def describe_picture(self, picture: Picture, brief: bool = False) -> dict[str, Any]:
        """Return what clients are told of a picture."""
        told: dict[str, Any] = {
            "id": picture.id,
            "job": picture.job,
            "seed": picture.seed,
            "width": picture.width,
            "height": picture.height,
            "url": f"/pictures/{picture.id}",
            "thumbnail_url": f"/pictures/{picture.id}/thumbnail",
            "created": picture.created,
        }
        return told if brief else {**told, "parameters": picture.parameters}


RETRY = {"Retry-After": "5"}
