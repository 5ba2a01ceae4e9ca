"""The API of jobs, pictures and uploads, which the page uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fluxonnx.serve.errors import ApiError, unknown
from fluxonnx.serve.gallery import Upload, in_format
from fluxonnx.serve.hub import JOB
from fluxonnx.serve.queue import ENDED
from fluxonnx.serve.web import event, event_stream, integer, owner_of, read_form, read_json, service_of

# How many jobs or pictures a page of a list has.
PAGE, MOST_IN_PAGE = 50, 500
# Pictures never change under their name.
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
NEVER = {"Cache-Control": "no-store"}


async def add_job(request: Request) -> Response:
    """Accept a job."""
    service, owner = service_of(request), owner_of(request)
    body = await read_json(request)
    idempotency = request.headers.get("idempotency-key")
    job, is_new = await run_in_threadpool(service.submit, owner, body, idempotency=idempotency)
    answer = await run_in_threadpool(service.describe, job)
    return JSONResponse(answer, 202 if is_new else 200, headers={"Location": f"/jobs/{job.id}", **NEVER})


def list_jobs(request: Request) -> Response:
    """Return the latest jobs."""
    service, limit = service_of(request), integer(request, "limit", PAGE, 1, MOST_IN_PAGE)
    jobs = service.queue.jobs(owner_of(request), limit, request.query_params.get("before"))
    return JSONResponse({"jobs": service.describe_all(jobs)}, headers=NEVER)


def show_job(request: Request) -> Response:
    """Return a job."""
    service = service_of(request)
    return JSONResponse(
        service.describe(service.queue.job(request.path_params["id"], owner_of(request))), headers=NEVER
    )


def cancel_job(request: Request) -> Response:
    """Cancel a job; one that has ended stays as it is."""
    service = service_of(request)
    job = service.cancel(request.path_params["id"], owner_of(request))
    return JSONResponse(service.describe(job), headers=NEVER)


def show_preview(request: Request) -> Response:
    """Return the latest preview of a job that runs."""
    service = service_of(request)
    job = service.queue.job(request.path_params["id"], owner_of(request))
    progress = service.worker.progress.get(job.id)
    preview = progress.preview if progress else None
    if preview is None:
        raise ApiError(404, f"job {job.id} has no preview now", code="preview_not_found")
    return Response(preview, media_type="image/jpeg", headers=NEVER)


async def job_events(request: Request) -> EventSourceResponse:
    """Stream the news of a job until it has ended."""
    service, owner = service_of(request), owner_of(request)
    job = await run_in_threadpool(service.queue.job, request.path_params["id"], owner)
    subscription = service.hub.subscribe(owner, job.id)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        try:
            first = await asyncio.to_thread(service.describe, service.queue.job(job.id))
            yield event(JOB, first)
            if first["state"] in ENDED:
                return
            async for news in subscription:
                yield event(news.event, news.data, news.number)
                if news.event == JOB and news.data["state"] in ENDED:
                    return
        finally:
            service.hub.leave(subscription)

    return event_stream(request, stream())


async def all_events(request: Request) -> EventSourceResponse:
    """Stream the news of all jobs, beginning with those that run or wait."""
    service, owner = service_of(request), owner_of(request)
    subscription = service.hub.subscribe(owner)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        try:
            active = await asyncio.to_thread(lambda: service.describe_all(service.queue.active(owner)[:MOST_IN_PAGE]))
            for told in active:
                yield event(JOB, told)
            async for news in subscription:
                yield event(news.event, news.data, news.number)
        finally:
            service.hub.leave(subscription)

    return event_stream(request, stream())


def list_pictures(request: Request) -> Response:
    """Return the latest pictures."""
    service, limit = service_of(request), integer(request, "limit", PAGE, 1, MOST_IN_PAGE)
    pictures = service.gallery.pictures(owner_of(request), limit, request.query_params.get("before"))
    return JSONResponse({"pictures": [service.describe_picture(picture) for picture in pictures]}, headers=NEVER)


def show_picture(request: Request) -> Response:
    """Return the file of a picture: the PNG, or a copy in another format."""
    gallery = service_of(request).gallery
    picture = gallery.picture(request.path_params["id"], owner_of(request))
    path = gallery.picture_file(picture)
    format = request.query_params.get("format", "png")
    if format != "png":
        return Response(in_format(path, format), media_type=f"image/{format}", headers=FOREVER)
    if not path.is_file():
        raise unknown("picture", picture.id)
    name = f"{picture.id}.png"
    return FileResponse(path, media_type="image/png", filename=name, headers=FOREVER, content_disposition_type="inline")


def show_thumbnail(request: Request) -> Response:
    """Return a small version of a picture."""
    gallery = service_of(request).gallery
    picture = gallery.picture(request.path_params["id"], owner_of(request))
    if not gallery.picture_file(picture).is_file():
        raise unknown("picture", picture.id)
    return FileResponse(gallery.thumbnail(picture), media_type="image/webp", headers=FOREVER)


def delete_picture(request: Request) -> Response:
    """Delete a picture."""
    service_of(request).gallery.delete(request.path_params["id"], owner_of(request))
    return Response(status_code=204)


async def add_upload(request: Request) -> Response:
    """Keep a picture that a client sends, as the body or as a file of a form."""
    service, owner = service_of(request), owner_of(request)
    if request.headers.get("content-type", "").startswith("multipart/"):
        form = await read_form(request)
        try:
            files = [value for value in form.values() if not isinstance(value, str)]
            if len(files) != 1:
                raise ApiError(400, f"the form has {len(files)} files: send one")
            data = await files[0].read()
        finally:
            await form.close()
    else:
        data = await request.body()
    upload = await run_in_threadpool(service.gallery.add_upload, owner, data)
    return JSONResponse(_upload(upload), 201, headers={"Location": f"/uploads/{upload.id}"})


def show_upload(request: Request) -> Response:
    """Return a picture that a client sent."""
    gallery = service_of(request).gallery
    upload = gallery.upload(request.path_params["id"], owner_of(request))
    if not gallery.upload_file(upload).is_file():
        raise unknown("upload", upload.id)
    data, kind = gallery.shown(upload)
    return Response(data, media_type=kind, headers=FOREVER)


def _upload(upload: Upload) -> dict[str, Any]:
    return {
        "id": upload.id,
        "width": upload.width,
        "height": upload.height,
        "url": f"/uploads/{upload.id}",
        "parameters": upload.parameters,
    }


ROUTES = [
    Route("/jobs", add_job, methods=["POST"]),
    Route("/jobs", list_jobs),
    Route("/jobs/{id}", show_job),
    Route("/jobs/{id}", cancel_job, methods=["DELETE"]),
    Route("/jobs/{id}/events", job_events, methods=["GET"]),
    Route("/jobs/{id}/preview", show_preview),
    Route("/events", all_events, methods=["GET"]),
    Route("/pictures", list_pictures),
    Route("/pictures/{id}", show_picture),
    Route("/pictures/{id}", delete_picture, methods=["DELETE"]),
    Route("/pictures/{id}/thumbnail", show_thumbnail),
    Route("/uploads", add_upload, methods=["POST"]),
    Route("/uploads/{id}", show_upload),
]
