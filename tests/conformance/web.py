"""onnxruntime-web: onnxruntime compiled to WebAssembly, as browsers run it, in Node.js."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conformance.graphs import Inputs
from tests.conformance.node import run_in_node

TITLE, PACKAGE, MODULES, SIZES = "onnxruntime-web wasm", "npm:onnxruntime-web", ("npm:onnxruntime-web",), "open"


def run(file: Path, inputs: Inputs) -> list[np.ndarray]:
    return run_in_node("onnxruntime-web", file, inputs)
