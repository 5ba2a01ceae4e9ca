"""onnxruntime-node: onnxruntime's own kernels, called from JavaScript."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "onnxruntime-node", "npm:onnxruntime-node", ("npm:onnxruntime-node",), "open"


def load(file: Path, _: Inputs) -> Graph:
    return lambda inputs: run_in_node(file, inputs)


def run_in_node(file: Path, inputs: Inputs) -> list[np.ndarray]:
    """Load and run a graph in a process of Node.js."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {}
        for port, value in inputs.items():
            (folder / port).write_bytes(value.tobytes())
            job[port] = {"type": value.dtype.name, "dims": value.shape}
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        script = Path(__file__).with_name("node.cjs")
        done = subprocess.run(["node", script, file.absolute(), folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(next(line for line in done.stderr.splitlines() if "Error" in line))
        found = json.loads((folder / "outputs.json").read_text("utf-8"))
        return [np.fromfile(folder / port, np.float32).reshape(dims) for port, dims in found]
