"""onnxruntime-web on WebGPU, in headless Chromium with its software adapter.

`conditioning` runs in WebAssembly, as docs/graphs.md asks for: sines of shaders are inexact by the standard of WebGPU.
"""

from __future__ import annotations

from pathlib import Path

from tests.conformance import browser
from tests.conformance.graphs import Graph, Inputs, component_of

TITLE, PACKAGE, MODULES, SIZES = "onnxruntime-web WebGPU", "npm:onnxruntime-web", browser.MODULES, "open"


def load(file: Path, _: Inputs) -> Graph:
    return browser.load("wasm" if component_of(file) == "conditioning" else "webgpu", file)
