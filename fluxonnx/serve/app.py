"""The application: all routes behind the gate, and errors in the shape that each client reads."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fluxonnx.errors import FluxonnxError
from fluxonnx.serve import a1111_api, jobs_api, openai_api, system_api
from fluxonnx.serve.errors import ApiError, from_ours, response
from fluxonnx.serve.gate import Gate
from fluxonnx.serve.service import RETRY, Service
from fluxonnx.serve.web import service_of

log = logging.getLogger("fluxonnx.serve")

MESSAGES = {404: "there is no such address", 405: "the address does not know this method"}


def make_app(service: Service) -> ASGIApp:
    """Return the application of a server; it begins to draw when the application starts."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop())
        yield
        service.drain()

    routes = [*jobs_api.ROUTES, *openai_api.ROUTES, *a1111_api.ROUTES, *system_api.ROUTES]
    handlers = {
        ApiError: _ours,
        FluxonnxError: _ours,
        HTTPException: _of_starlette,
        sqlite3.Error: _of_database,
        OSError: _of_database,
        Exception: _unforeseen,
    }
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.service = service
    return Gate(app, service)


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, FluxonnxError)
    found = from_ours(error, service_of(request).private)
    if found.status >= 500 and not isinstance(error, ApiError):
        log.error("a request failed", extra={"facts": {"path": request.url.path, "error": str(error)}})
    return response(request.url.path, found)


async def _of_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = MESSAGES.get(error.status_code, error.detail)
    return response(request.url.path, ApiError(error.status_code, message, headers=error.headers))


async def _of_database(request: Request, error: Exception) -> Response:
    log.error("the data can't be read or written", extra={"facts": {"path": request.url.path, "error": str(error)}})
    message = "the server can't read or write its data, its disk may be full: try again later"
    return response(request.url.path, ApiError(503, message, code="storage", headers=RETRY))


async def _unforeseen(request: Request, error: Exception) -> Response:
    log.error("internal error", exc_info=error, extra={"facts": {"path": request.url.path}})
    return response(request.url.path, ApiError(500, "internal error: the server's log says more"))
