"""onnxruntime compiled to WebAssembly, in headless Chromium."""

from __future__ import annotations

from pathlib import Path

from tests.conformance import browser
from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "onnxruntime-web wasm", "npm:onnxruntime-web", browser.MODULES, "open"


def load(file: Path, _: Inputs) -> Graph:
    return browser.load("wasm", file)
