"""What is told of the server itself: what it can do, how it is, and its page."""

from __future__ import annotations

import mimetypes
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fluxonnx.runtime.field import KINDS, Field
from fluxonnx.runtime.fields import FIELD, MAX_AREA, MAX_REFERENCES, MAX_SIDE, MIN_SIDE
from fluxonnx.serve.errors import ApiError
from fluxonnx.serve.fields import VALUES
from fluxonnx.serve.keys import COOKIE, SESSION
from fluxonnx.serve.models import Held
from fluxonnx.serve.openapi import describe_api
from fluxonnx.serve.parameters import UNIT
from fluxonnx.serve.web import read_json, service_of
from fluxonnx.version import __version__

# What the page is made of; Python's own table depends on the system.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
FRESH = {"Cache-Control": "no-cache"}


def info(request: Request) -> Response:
    """Return what the server can do; without a key, only that it needs one."""
    service = service_of(request)
    brief = {"name": "fluxonnx", "version": __version__, "auth_required": service.keys.required}
    if request.scope["state"]["owner"] is None:
        return JSONResponse(brief, headers={"Cache-Control": "no-store"})
    limits, models = service.settings.limits, service.models.all
    first = models[0].flux
    return JSONResponse(
        {
            **brief,
            "models": [_model(held) for held in models],
            "loras": list(service.models.lora_files()),
            "precisions": list(dict.fromkeys(name for held in models for name in held.precisions)),
            "limits": {
                "max_pixels": min(limits.pixels, MAX_AREA),
                "min_side": MIN_SIDE,
                "max_side": MAX_SIDE,
                "multiple": UNIT,
                "max_count": limits.count,
                "max_references": MAX_REFERENCES,
                "max_body": limits.body,
                "max_upload_pixels": limits.upload_pixels,
                "max_queue": limits.queue,
            },
            "defaults": {
                "width": first.defaults["width"],
                "height": first.defaults["height"],
                "steps": FIELD["steps"].default_for(first.is_distilled),
                "guidance": FIELD["guidance_scale"].default_for(first.is_distilled),
                "strength": FIELD["strength"].default,
            },
            "fields": [_field(name, field) for name, field in VALUES.items()],
            "samplers": list(FIELD["sampler"].choices),
            "schedules": list(FIELD["schedule"].choices),
        },
        headers={"Cache-Control": "no-store"},
    )


def _model(held: Held) -> dict[str, Any]:
    flux = held.flux
    return {
        "id": held.id,
        "name": flux.name,
        "precision": held.precision,
        "precisions": held.precisions,
        "distilled": flux.is_distilled,
        "default_steps": FIELD["steps"].default_for(flux.is_distilled),
        "default_guidance": FIELD["guidance_scale"].default_for(flux.is_distilled),
        "default_width": flux.defaults["width"],
        "default_height": flux.defaults["height"],
    }


def _field(name: str, field: Field) -> dict[str, Any]:
    return {
        "name": name,
        "type": KINDS[field.kind][1],
        "many": field.many,
        "default": field.default,
        "minimum": field.low,
        "maximum": field.high,
        "multiple": UNIT if field.whole_tokens else field.multiple,
        "choices": list(field.choices) or None,
        "help": field.help.format_map(vars(field)) if field.help else "",
    }


def health(request: Request) -> Response:
    """Say that the process answers."""
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})


def ready(request: Request) -> Response:
    """Say whether jobs are taken and drawn."""
    service = service_of(request)
    state = "draining" if service.draining else "ready" if service.worker.alive else "broken"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503, headers={"Cache-Control": "no-store"})


def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def session(request: Request) -> Response:
    """Exchange a key for a cookie: pictures and event streams of a page can't send a header."""
    service = service_of(request)
    body = await read_json(request)
    key = body.get("key") if isinstance(body, dict) else None
    if not isinstance(key, str):
        raise ApiError(422, 'send {"key": "..."}', "key")
    if not service.keys.required:
        return Response(status_code=204)
    owner = service.keys.owner(key)
    if owner is None:
        raise ApiError(401, "the key is not valid: check it", "key", code="invalid_api_key")
    answer = Response(status_code=204)
    secure = request.url.scheme == "https"
    value = service.keys.session(owner)
    answer.set_cookie(COOKIE, value, max_age=SESSION, path="/", secure=secure, httponly=True, samesite="strict")
    return answer


def end_session(request: Request) -> Response:
    """Forget the cookie."""
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


def api(request: Request) -> Response:
    """Return the description of the API."""
    return JSONResponse(describe_api(service_of(request).keys.required), headers=FRESH)


def page(request: Request) -> Response:
    """Return the page."""
    return _page_file("index.html")


def static(request: Request) -> Response:
    """Return a file of the page."""
    return _page_file(request.path_params["path"])


def _page_file(name: str) -> Response:
    found: Traversable = resources.files("fluxonnx.serve") / "page"
    for part in name.split("/"):
        if part in ("", ".", "..") or part.startswith(".") or "\\" in part or ":" in part or "\0" in part:
            raise ApiError(404, "there is no such file")
        found = found / part
    suffix = "." + name.rpartition(".")[2].lower()
    kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0]
    if kind is None or suffix == ".py" or not found.is_file():
        if name == "index.html":
            text = f"fluxonnx {__version__}: this installation has no page; the API is described at /openapi.json\n"
            return PlainTextResponse(text, 404)
        raise ApiError(404, "there is no such file")
    return Response(found.read_bytes(), media_type=kind, headers=FRESH)


ROUTES = [
    Route("/", page),
    Route("/static/{path:path}", static),
    Route("/info", info),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", metrics),
    Route("/session", session, methods=["POST"]),
    Route("/session", end_session, methods=["DELETE"]),
    Route("/openapi.json", api),
]
