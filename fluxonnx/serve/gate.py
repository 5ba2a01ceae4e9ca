"""What every request passes: Host, Origin and key, size and pace of its body, headers of the answer, the log."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxonnx.serve.errors import ApiError, response
from fluxonnx.serve.keys import COOKIE
from fluxonnx.serve.service import Service

log = logging.getLogger("fluxonnx.serve")

# What anybody may see: the page asks for the key.
OPEN = {"/", "/health", "/ready", "/session", "/openapi.json", "/info", "/favicon.ico"}
OPEN_FOLDER = "/static/"
# h11 reads requests of any version.
VERSIONS = ("1.0", "1.1")
PICTURE = re.compile(r"/pictures/([\w-]+)")
# A body that is too large is read up to so many times the limit.
MOST_READ = 4
# Parts of a path that are names, for the metrics.
NAME = re.compile(r"/(?:u?[0-9a-f]{16}(?:-\d+)?)(?=/|$)")
KNOWN_ROUTES = re.compile(
    r"/(?:jobs|pictures|uploads|info|health|ready|metrics|session|events|openapi\.json|v1/|sdapi/)|/$|/static/"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Guard an application."""
        self._app, self._service = app, service
        self._limits = service.settings.limits
        named = {host.lower() for host in service.settings.hosts}
        self._hosts = {"localhost", service.settings.host.lower(), *named}
        self._origins = {origin.rstrip("/").lower() for origin in service.settings.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        cors = self._cors(origin)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found = MutableHeaders(scope=message)
                for name, value in {**HEADERS, **cors}.items():
                    found.setdefault(name, value)
            await send(message)

        try:
            refused = self._refusal(scope, headers, origin)
            if refused is not None:
                await self._read_rest(receive, headers)
                await refused(scope, receive, answer)
            else:
                await self._app(scope, self._paced(receive, headers), answer)
        except ApiError as error:  # of the body, before the answer began
            if not status:
                await response(scope["path"], error)(scope, receive, answer)
        except ClientDisconnect:
            status = status or 499
        except Exception:  # the application has answered and logged it
            if not status:
                raise
        finally:
            self._note(scope, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope, headers: Headers, origin: str | None) -> Response | None:
        """Return the answer to a request that goes no further; else note whose it is."""
        path, method = scope["path"], scope["method"]
        try:
            if scope["http_version"] not in VERSIONS:
                raise ApiError(505, f"HTTP/{scope['http_version']} is not spoken here: use HTTP/1.1")
            self._check_host(headers.get("host", ""))
            if origin is not None and not self._is_own(origin, headers) and not self._cors(origin):
                raise ApiError(403, "web pages of other origins may not use this server: see --cors-origin")
            # Following a link is harmless, since no other page can frame or read what it leads to.
            followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
            if headers.get("sec-fetch-site") == "cross-site" and not followed and not self._cors(origin):
                raise ApiError(403, "web pages of other origins may not use this server: see --cors-origin")
            if method == "OPTIONS" and "access-control-request-method" in headers:
                return Response(status_code=204)
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self._limits.body:
                raise _too_large(self._limits.body)
            scope.setdefault("state", {})["owner"] = self._owner(scope, headers, path)
        except ApiError as error:
            return response(path, error)
        return None

    def _owner(self, scope: Scope, headers: Headers, path: str) -> str | None:
        keys = self._service.keys
        if not keys.required:
            return ""
        owner = None
        if authorization := headers.get("authorization"):
            owner = keys.from_header(authorization)
        elif cookie := HTTPConnection(scope).cookies.get(COOKIE):
            owner = keys.from_session(cookie)
        if owner is not None or path in OPEN or path.startswith(OPEN_FOLDER):
            return owner
        link = HTTPConnection(scope).query_params.get("link", "")
        picture = PICTURE.fullmatch(path)
        if picture and link and scope["method"] in ("GET", "HEAD") and keys.opens(link, picture[1]):
            return self._service.gallery.picture(picture[1], None).owner
        message = "this server needs a key: send it as Authorization: Bearer KEY"
        if "authorization" in headers:
            message = "the key is not valid: check it, it is one of those the server was started with"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_host(self, host: str) -> None:
        """Refuse names that are not ours: a name of a stranger that points here is an attack by DNS rebinding."""
        name = host_name(host)
        if name in self._hosts or name.endswith(".localhost") or _is_address(name):
            return
        raise ApiError(400, "the server is not called so: start it with --allowed-host NAME if it is")

    def _is_own(self, origin: str, headers: Headers) -> bool:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()

    def _cors(self, origin: str | None) -> Mapping[str, str]:
        if origin is None or origin.lower() not in self._origins:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, Last-Event-ID",
            "Access-Control-Max-Age": "600",
            "Cross-Origin-Resource-Policy": "cross-origin",
            "Vary": "Origin",
        }

    async def _read_rest(self, receive: Receive, headers: Headers) -> None:
        """Read the body of a request that is refused: many clients see no answer before they have sent everything."""
        length = headers.get("content-length", "0")
        left = self._limits.body * MOST_READ
        if length.isdecimal() and int(length) > left:
            return
        with contextlib.suppress(TimeoutError):
            while left > 0:
                message = await asyncio.wait_for(receive(), self._limits.body_seconds)
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

    def _paced(self, receive: Receive, headers: Headers) -> Receive:
        """Count the bytes of a body, and end a request whose body stops coming."""
        received, ended = 0, False
        most, seconds = self._limits.body, self._limits.body_seconds

        async def paced() -> Message:
            nonlocal received, ended
            if ended:  # waiting for the client to go away, which may take long
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), seconds)
            except TimeoutError:
                raise ApiError(408, "the request stopped coming", headers={"Connection": "close"}) from None
            received += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if received > most:
                raise _too_large(most)
            return message

        return paced

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path, method = scope["path"], scope["method"]
        route = NAME.sub("/{id}", path)
        route = "/static/" if path.startswith(OPEN_FOLDER) else route
        if not KNOWN_ROUTES.match(route) or status == 404:
            route = "other"
        metrics = self._service.metrics
        known = method if method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"
        metrics.requests.labels(known, route, str(status)).inc()
        metrics.request.labels(route).observe(seconds)
        facts: dict[str, Any] = {"method": known, "path": path[:200], "status": status}
        facts |= {"ms": round(seconds * 1000, 1), "client": (scope.get("client") or ("",))[0]}
        level = logging.DEBUG if path in ("/health", "/ready", "/metrics") else logging.INFO
        log.log(level, "request", extra={"facts": facts})


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request is larger than {most} bytes", headers={"Connection": "close"})


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
