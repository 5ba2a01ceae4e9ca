"""All runtimes, which of them are installed, and their versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx

from tests.conformance import (
    installed,
    iree,
    mnn,
    node,
    onnx2torch,
    opencv,
    openvino,
    reference,
    tract,
    tvm,
    wasm,
    webgpu,
)
from tests.conformance.graphs import Graph, Inputs

# In the order of the tables.
RUNTIMES: dict[str, ModuleType] = {
    "reference": reference,
    "openvino": openvino,
    "node": node,
    "wasm": wasm,
    "webgpu": webgpu,
    "tract": tract,
    "onnx2torch": onnx2torch,
    "opencv": opencv,
    "mnn": mnn,
    "tvm": tvm,
    "iree": iree,
}
# What CI installs; the others are too large, or compile for minutes.
IN_CI = ("reference", "webgpu", "wasm", "node", "openvino", "opencv", "tract", "onnx2torch", "mnn")


def load(name: str, file: Path, inputs: Inputs) -> Graph:
    """Load a graph with a runtime; one that takes fixed sizes only takes those of `inputs`, in any order."""
    order = [port.name for port in onnx.load(file, load_external_data=False).graph.input]
    graph = RUNTIMES[name].load(file, {port: inputs[port] for port in order})
    return lambda inputs: graph({port: inputs[port] for port in order})


def run(name: str, file: Path, inputs: Inputs) -> list[np.ndarray]:
    """Load a graph with a runtime and run it once."""
    return load(name, file, inputs)(inputs)


def missing(name: str) -> list[str]:
    """What must be installed for a runtime, and is not."""
    return [module.rpartition(":")[2] for module in RUNTIMES[name].MODULES if not installed.has(module)]


def version(name: str) -> str:
    """The version of a runtime that is installed."""
    package = RUNTIMES[name].PACKAGE
    if package.startswith("npm:"):
        return installed.version_of(package.removeprefix("npm:")) or ""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return ""
