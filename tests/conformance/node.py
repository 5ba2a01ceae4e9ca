"""onnxruntime-node: onnxruntime's own kernels, called from JavaScript."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tests.conformance.graphs import Inputs, with_weights

TITLE, PACKAGE, MODULES, SIZES = "onnxruntime-node", "npm:onnxruntime-node", ("npm:onnxruntime-node",), "open"


def run(file: Path, inputs: Inputs) -> list[np.ndarray]:
    return run_in_node("onnxruntime-node", file, inputs)


def run_in_node(package: str, file: Path, inputs: Inputs) -> list[np.ndarray]:
    """Run a graph with a package of npm, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graph = file.absolute()
        if package == "onnxruntime-web":  # opens no files
            graph = folder / "graph.onnx"
            graph.write_bytes(with_weights(file))
        job = {}
        for port, value in inputs.items():
            (folder / port).write_bytes(value.tobytes())
            job[port] = {"type": value.dtype.name, "dims": value.shape}
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        script = Path(__file__).with_name("node.cjs")
        done = subprocess.run(["node", script, package, graph, folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(next(line for line in done.stderr.splitlines() if "Error" in line))
        found = json.loads((folder / "outputs.json").read_text("utf-8"))
        return [np.fromfile(folder / port, np.float32).reshape(dims) for port, dims in found]
