"""What the APIs share: bodies, queries, streams, and waiting for a job for as long as its client does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fluxonnx.checkpoint.reading import parse_json
from fluxonnx.runtime.fields import MAX_REFERENCES
from fluxonnx.serve.errors import ApiError, wrong
from fluxonnx.serve.queue import Job
from fluxonnx.serve.service import Service

T = TypeVar("T")

# Streams end with the hub, and not by a flag of the whole process.
AppStatus.disable_automatic_graceful_drain()
HEARTBEAT = 15
MOST_FIELDS = 200
MOST_FIELD_BYTES = 1 << 20


def service_of(request: Request) -> Service:
    """Return the server that a request came to."""
    found: Service = request.app.state.service
    return found


def owner_of(request: Request) -> str:
    """Return whose request it is."""
    owner = request.scope["state"]["owner"]
    if owner is None:
        raise ApiError(401, "this server needs a key: send it as Authorization: Bearer KEY", code="invalid_api_key")
    return str(owner)


async def read_json(request: Request) -> Any:
    """Return the JSON of a body.

    Raises:
        ApiError: It is none.
    """
    body = await request.body()
    if not body.strip():
        raise ApiError(400, "the body is empty: send a JSON object")
    try:
        value = parse_json(body)
    except ValueError as error:
        reason = str(error) if not isinstance(error, json.JSONDecodeError) else f"{error.msg} at {error.pos}"
        raise ApiError(400, f"the body is no JSON: {reason}") from None
    if not _is_finite(value):
        raise ApiError(400, "the body is no JSON: it holds a number that is not finite")
    return value


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


async def read_form(request: Request) -> FormData:
    """Return the fields and files of a multipart body.

    Raises:
        ApiError: It is none.
    """
    if "form" not in request.headers.get("content-type", ""):
        raise ApiError(400, "send the fields as multipart/form-data")
    try:
        return await request.form(max_files=MAX_REFERENCES + 2, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD_BYTES)
    except HTTPException as error:
        raise ApiError(400, f"the form can't be read: {error.detail}") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the form can't be read: it is not UTF-8 text") from None


def integer(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Return a number in a query.

    Raises:
        ApiError: It is none, or out of its range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise wrong(f"{name} is {text[:40]!r}, but must be an integer from {low} to {high}", name)
    return int(text)


def event_stream(request: Request, events: AsyncIterator[ServerSentEvent]) -> EventSourceResponse:
    """Return an answer of server-sent events; a client that does not read for long is dropped."""
    seconds = service_of(request).settings.limits.body_seconds
    return EventSourceResponse(events, ping=HEARTBEAT, send_timeout=seconds, sep="\n")


def event(name: str, data: Any, number: int | None = None) -> ServerSentEvent:
    """Return an event with JSON in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return ServerSentEvent(text, event=name, id=None if number is None else str(number))


async def while_connected(request: Request, work: Awaitable[T], give_up: Callable[[], object]) -> T:
    """Wait for something for as long as the client does.

    Args:
        request: The client's; its body was read.
        work: What is waited for.
        give_up: Called in another thread if the client went away.

    Raises:
        ApiError: The client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        await asyncio.to_thread(give_up)
        raise ApiError(499, "the client went away")
    except asyncio.CancelledError:  # the server ends at once
        give_up()
        raise
    finally:
        for other in (task, gone):
            if not other.done():
                other.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await other


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def made(request: Request, owner: str, body: dict[str, Any]) -> Job:
    """Make the pictures of a job while its client waits.

    Raises:
        ApiError: It can't be done, failed, or was cancelled.
    """
    service = service_of(request)
    job, _ = await asyncio.to_thread(service.submit, owner, body, attached=True)
    ended = await while_connected(request, service.finished(job), lambda: service.cancel(job.id, owner))
    check_done(ended)
    return ended


def check_done(job: Job) -> None:
    """Raise ApiError if a job that has ended has not all of its pictures."""
    if job.state == "failed":
        raise ApiError(500, job.error or "the pictures could not be made", code="generation_failed")
    if job.state != "done":
        raise ApiError(409, job.error or "the job was cancelled", code="cancelled")
