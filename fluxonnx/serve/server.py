"""The process of a server: its socket, its signals, slow heads of requests, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.serve.app import make_app
from fluxonnx.serve.models import Models
from fluxonnx.serve.service import Service
from fluxonnx.serve.settings import Settings
from fluxonnx.serve.warned import route_warnings

log = logging.getLogger("fluxonnx.serve")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded for nothing.

    Raises:
        UsageError: It is taken, not ours, or not an address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"can't listen at {host} port {port}: {reason}: choose others with --host and --port"
        ) from None
    return bound


def run(
    settings: Settings,
    say: Callable[[str], None],
    models: Models | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal asks for the end.

    Args:
        settings: What the server is told.
        say: Told when it listens, and what it does before that.
        models: Models that are open; by default those of the settings are opened.
        warn: Told of warnings that concern no job.

    Raises:
        UsageError: The address or the folder can't be used.
        FluxonnxError: A model can't be opened.
    """
    bound = bind(settings.host, settings.port)
    with contextlib.closing(bound):
        if models is None:
            models = Models(settings)
            models.open(lambda root: say(f"Exporting {root} ..."), lambda choice: say(str(choice)))
        service = Service(settings, models)
        route_warnings(service.worker.is_worker, service.worker.warn, warn or say)
        try:
            server = _Server(_config(service), service)
            port = bound.getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            server.on_start = lambda: say(
                f"Serving {', '.join(held.id for held in models.all)} at http://{host}:{port}/"
            )
            server.run([bound])
            if not server.started:
                raise FluxonnxError("the server could not start: its log says why")
        finally:
            service.worker.stop(0)
            service.close()


def _config(service: Service) -> uvicorn.Config:
    limits = service.settings.limits
    protocol = type("Protocol", (_Protocol,), {"seconds": limits.header_seconds})
    return uvicorn.Config(
        make_app(service),
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=True,  # of a proxy on this machine, which may speak TLS
        timeout_keep_alive=max(1, min(15, round(limits.header_seconds))),
        timeout_graceful_shutdown=max(1, round(service.settings.drain) + 5),
        limit_concurrency=limits.connections,
    )


class _Server(uvicorn.Server):
    """Ends in this order: no new jobs, the batch under way, the answers to those who wait for it, the process."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.on_start: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("shutting down")
        self._service.draining = True
        self._service.worker.drain()
        await asyncio.to_thread(self._service.worker.stop, 0 if self.force_exit else self._service.settings.drain)
        self._service.drain()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, except that an orderly end is a success."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """Drops clients that take too long to send the head of a request, which uvicorn would wait for without end."""

    seconds = 20.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self._head is None:  # the next request on the same connection
            self._head = self.loop.call_later(self.seconds, self._late)

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        self._head = None
        if not self.transport.is_closing():
            self.transport.close()
