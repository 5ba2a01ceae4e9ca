"""A whole picture with another runtime: it takes onnxruntime's place in fluxonnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import fluxonnx
from fluxonnx.checkpoint.manifest import Build
from fluxonnx.runtime.engine import Runner, SessionOptions
from tests.conformance.graphs import CASES, Graph, Inputs
from tests.conformance.runtimes import load

PROMPT = "a red circle on a blue background"


class Runtime:
    """An engine of fluxonnx: loads each graph once for each set of shapes, and keeps it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._graphs: dict[tuple[Path, str], Graph] = {}

    def run(self, file: Path, inputs: Inputs) -> list[np.ndarray]:
        """Run a graph, loaded for the shapes of these inputs."""
        key = file, str({port: value.shape for port, value in sorted(inputs.items())})
        if key not in self._graphs:
            self._graphs[key] = load(self.name, file, inputs)
        return self._graphs[key](inputs)

    def __call__(self, file: Path, component: str, build: Build, options: SessionOptions) -> Runner:
        return _Runner(self, file)


class _Runner:
    def __init__(self, runtime: Runtime, file: Path) -> None:
        self._runtime, self._file = runtime, file

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        return self._runtime.run(self._file, inputs)

    def close(self) -> None:
        """The runtime keeps the graph for the next picture."""


def draw(folder: Path, precision: str, runtime: Runtime | None) -> np.ndarray:
    """Draw a picture of the first case's size with a runtime, or with onnxruntime: uint8 [height, width, 3]."""
    height, width, _ = CASES[0]
    with fluxonnx.load(folder, provider="cpu", precision=precision, flavour="portable", engine=runtime) as flux:
        return np.asarray(flux.generate(PROMPT, width, height, 4, 42))


def difference(folder: Path, precision: str, runtime: Runtime) -> int:
    """The largest difference of a channel of a pixel from onnxruntime's picture of the same build, of 255."""
    found, expected = draw(folder, precision, runtime), draw(folder, precision, None)
    return int(np.abs(found.astype(int) - expected).max())
