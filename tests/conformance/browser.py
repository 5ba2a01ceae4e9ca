"""Headless Chromium, and onnxruntime-web in it. Graphs and weight files come from a server on this machine.

Chromium runs in a thread of its own: playwright keeps an event loop there, which would be in the way of others.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs
from tests.conformance.installed import folder_of, program

T = TypeVar("T")

MODULES = ("npm:onnxruntime-web", "playwright", "greenlet", "program:chromium")
# The last two give a machine without a GPU the software adapter that Chromium carries, SwiftShader.
FLAGS = ["--no-sandbox", "--disable-quic", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
PAGE = b"<!doctype html><title>onnxruntime-web</title><script type=module src=/browser.mjs></script>"
# Milliseconds; the software adapter compiles hundreds of shaders.
PATIENCE = 300_000

_thread = ThreadPoolExecutor(1)


def in_thread(function: Callable[[], T]) -> T:
    """Call a function in the thread that talks to Chromium."""
    return _thread.submit(function).result()


@cache
def chromium() -> Any:
    """Chromium with a software WebGPU adapter, started once. To be used `in_thread` only."""
    from playwright.sync_api import sync_playwright

    return sync_playwright().start().chromium.launch(executable_path=program("chromium"), args=FLAGS)


class Handler(SimpleHTTPRequestHandler):
    """Files of several folders by the first part of their path, with the headers that let WebAssembly use threads."""

    folders: dict[str, Path]

    def translate_path(self, path: str) -> str:
        first, _, rest = path.split("?")[0].removeprefix("/").partition("/")
        return str(self.folders[first] / rest) if first in self.folders else str(Path(__file__).parent / first)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)
        return None

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@cache
def page() -> Any:
    """An open page that can load graphs, see browser.mjs. To be used `in_thread` only."""
    library = folder_of("onnxruntime-web")
    assert library is not None
    Handler.folders = {"onnxruntime-web": library}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    opened = chromium().new_page()
    opened.set_default_timeout(PATIENCE)
    opened.goto(f"http://127.0.0.1:{server.server_port}/")
    opened.wait_for_function("window.load !== undefined")
    return opened


def load(provider: str, file: Path) -> Graph:
    """Open a graph with an execution provider of onnxruntime-web, its weights mounted as external data."""
    model = onnx.load(file, load_external_data=False)
    locations = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    outputs = [output.name for output in model.graph.output]

    def opened() -> int:
        current = page()
        folder = f"graphs-{len(Handler.folders)}"
        Handler.folders[folder] = file.parent
        return current.evaluate("job => load(job)", [provider, folder, file.name, sorted(locations)])

    number = in_thread(opened)

    def run(inputs: Inputs) -> list[np.ndarray]:
        feeds = {
            name: [value.dtype.name, list(value.shape), base64.b64encode(np.ascontiguousarray(value)).decode()]
            for name, value in inputs.items()
        }
        found = in_thread(lambda: page().evaluate("job => run(job)", [number, feeds, outputs]))
        return [np.frombuffer(base64.b64decode(data), np.float32).reshape(dims) for dims, data in found]

    return run
