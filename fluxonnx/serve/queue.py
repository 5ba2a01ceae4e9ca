"""The queue: which jobs wait, which pictures are to be made next, and how each job ended."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fluxonnx.serve.database import Database, write_whole
from fluxonnx.serve.errors import unknown

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
LAST = 1 << 62


@dataclass(frozen=True)
class Job:
    """A job as the database has it.

    Attributes:
        number: The order of acceptance.
        id: Its name in the API.
        owner: Whose it is; "" without keys.
        state: "queued", "running", "done", "failed" or "cancelled".
        attached: 1 if a client waits for it, so that it ends with the server.
        batch: Equal for jobs that may be drawn together.
        parameters: What was asked for, by the names of the API.
        seeds: One for each picture.
        warnings: What a person should know about the result.
        error: Why it failed.
        created: Seconds since 1970; likewise the others.
        started: None before it.
        finished: None before it.
    """

    number: int
    id: str
    owner: str
    state: str
    attached: int
    batch: str
    parameters: dict[str, Any]
    seeds: list[int]
    warnings: list[str]
    error: str | None
    created: float
    started: float | None
    finished: float | None


class Queue:
    """The jobs of a server. Threads may share it."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._base = database

    def recover(self) -> int:
        """Put jobs that a killed server left running back into the queue; those whose client is gone are cancelled.

        Returns:
            How many jobs wait.
        """
        with self._base.changing():
            self._base.change(
                "UPDATE jobs SET state='cancelled', finished=?, error='the server ended while its client waited' "
                "WHERE attached AND state IN ('queued', 'running')",
                time.time(),
            )
            self._base.change("UPDATE jobs SET state='queued' WHERE state='running'")
        return self.waiting()

    def add(
        self,
        owner: str,
        parameters: dict[str, Any],
        seeds: Sequence[int],
        batch: str,
        *,
        attached: bool = False,
        idempotency: str | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job.

        Args:
            owner: Whose it is.
            parameters: What is asked for.
            seeds: One for each picture.
            batch: Equal for jobs that may be drawn together.
            attached: Whether its client waits for it.
            idempotency: A name that the client chose: a job of this name is returned instead of made again.

        Returns:
            The job, and whether it is a new one.
        """
        values = (owner, attached, batch, json.dumps(parameters), json.dumps(list(seeds)), time.time(), idempotency)
        identifier = secrets.token_hex(8)
        with self._base.changing():
            if idempotency is not None and (known := self.known(owner, idempotency)):
                return known, False
            self._base.change(
                "INSERT INTO jobs (id, state, owner, attached, batch, parameters, seeds, created, idempotency) "
                "VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?)",
                identifier,
                *values,
            )
        return self.job(identifier), True

    def known(self, owner: str, idempotency: str) -> Job | None:
        """Return the job that a client has given a name; None if there is none."""
        rows = self._base.rows("SELECT * FROM jobs WHERE owner=? AND idempotency=?", owner, idempotency)
        return _job(rows[0]) if rows else None

    def job(self, identifier: str, owner: str | None = None) -> Job:
        """Return a job; that of another owner is as unknown as one that never was.

        Raises:
            ApiError: There is none.
        """
        rows = self._base.rows("SELECT * FROM jobs WHERE id=?", identifier)
        if not rows or owner not in (None, rows[0]["owner"]):
            raise unknown("job", identifier)
        return _job(rows[0])

    def jobs(self, owner: str, limit: int, before: str | None = None) -> list[Job]:
        """Return the latest jobs of an owner, the newest first.

        Raises:
            ApiError: `before` is no job.
        """
        last = self.job(before, owner).number if before else LAST
        query = "SELECT * FROM jobs WHERE owner=? AND number<? ORDER BY number DESC LIMIT ?"
        return [_job(row) for row in self._base.rows(query, owner, last, limit)]

    def active(self, owner: str) -> list[Job]:
        """Return the jobs of an owner that run or wait, in their order."""
        query = "SELECT * FROM jobs WHERE state IN ('running', 'queued') AND owner=? ORDER BY state='queued', number"
        return [_job(row) for row in self._base.rows(query, owner)]

    def all_waiting(self) -> list[Job]:
        """Return all jobs that wait, in their order."""
        return [_job(row) for row in self._base.rows("SELECT * FROM jobs WHERE state='queued' ORDER BY number")]

    def waiting(self, owner: str | None = None) -> int:
        """Return how many jobs wait, of one owner or of all."""
        if owner is None:
            rows = self._base.rows("SELECT count(*) FROM jobs WHERE state='queued'")
        else:
            rows = self._base.rows("SELECT count(*) FROM jobs WHERE state='queued' AND owner=?", owner)
        return int(rows[0][0])

    def position(self, job: Job) -> int | None:
        """Return how many jobs come before one that waits; 0 for one that runs; None for one that has ended."""
        if job.state in ENDED:
            return None
        if job.state == RUNNING:
            return 0
        query = "SELECT count(*) FROM jobs WHERE number!=? AND (state='running' OR (state='queued' AND number<?))"
        return int(self._base.rows(query, job.number, job.number)[0][0])

    def next_batch(self, most: int) -> list[tuple[Job, list[int]]]:
        """Take the next pictures to make: those of the first job, and of others that may be drawn together with it.

        Args:
            most: How many pictures.

        Returns:
            Jobs, which are running now, and the positions of their pictures; empty if nothing waits.
        """
        with self._base.changing():
            rows = self._base.rows(
                "SELECT * FROM jobs WHERE state IN ('running', 'queued') ORDER BY state='queued', number LIMIT 1"
            )
            if rows:
                query = (
                    "SELECT * FROM jobs WHERE state IN ('running', 'queued') AND batch=? AND id!=? "
                    "ORDER BY state='queued', number LIMIT ?"
                )
                rows += self._base.rows(query, rows[0]["batch"], rows[0]["id"], most)
            chosen: list[tuple[Job, list[int]]] = []
            for row in rows:
                job, room = _job(row), most - sum(len(positions) for _, positions in chosen)
                if room == 0:
                    break
                made = {found[0] for found in self._base.rows("SELECT position FROM pictures WHERE job=?", job.id)}
                missing = [i for i in range(len(job.seeds)) if i not in made][:room]
                started = time.time() if job.started is None else job.started
                self._base.change("UPDATE jobs SET state='running', started=? WHERE id=?", started, job.id)
                chosen.append((replace(job, state=RUNNING, started=started), missing))
            return chosen

    def add_picture(self, job: Job, position: int, data: bytes, size: tuple[int, int], facts: dict[str, Any]) -> bool:
        """Keep a picture and end its job with the last one; nothing is kept of a job that was cancelled meanwhile.

        Args:
            job: The job.
            position: Which of its pictures.
            data: A PNG file.
            size: Width and height.
            facts: What made it.

        Returns:
            Whether it was kept.

        Raises:
            FluxonnxError: It can't be written.
        """
        identifier = f"{job.id}-{position}"
        path = self._base.folder / "pictures" / f"{identifier}.png"
        write_whole(path, data, "the picture")
        with self._base.changing():
            kept = self.job(job.id).state == RUNNING
            if kept:
                self._base.change(
                    "INSERT INTO pictures (id, job, position, owner, seed, width, height, parameters, created) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    *(identifier, job.id, position, job.owner, str(job.seeds[position]), *size),
                    json.dumps(facts, default=str),
                    time.time(),
                )
                count = self._base.rows("SELECT count(*) FROM pictures WHERE job=?", job.id)[0][0]
                if count == len(job.seeds):
                    self._end(job.id, DONE)
        if not kept:
            with suppress(OSError):
                path.unlink()
        return kept

    def _end(self, identifier: str, state: str, error: str | None = None) -> bool:
        count = self._base.change(
            "UPDATE jobs SET state=?, error=?, finished=? WHERE id=? AND state IN ('queued', 'running')",
            *(state, error, time.time(), identifier),
        )
        return count > 0

    def fail(self, identifier: str, error: str) -> bool:
        """End a job that can't be done; returns whether it had not ended before."""
        with self._base.changing():
            return self._end(identifier, FAILED, error)

    def cancel(self, identifier: str) -> bool:
        """End a job that is not wanted any more; returns whether it had not ended before."""
        with self._base.changing():
            return self._end(identifier, CANCELLED)

    def requeue(self, identifier: str) -> None:
        """Put a running job back into the queue, at its old place."""
        with self._base.changing():
            self._base.change("UPDATE jobs SET state='queued' WHERE id=? AND state='running'", identifier)

    def warn(self, identifier: str, message: str) -> None:
        """Remember something that a person should know about a job's pictures."""
        with self._base.changing():
            known = self.job(identifier).warnings
            if message not in known:
                text = json.dumps([*known, message])
                self._base.change("UPDATE jobs SET warnings=? WHERE id=?", text, identifier)


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in row.keys() if name != "idempotency"}  # noqa: SIM118 - a row has no items
    for name in ("parameters", "seeds", "warnings"):
        values[name] = json.loads(values[name])
    return Job(**values)
