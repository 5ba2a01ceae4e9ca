"""MNN on the CPU, in its highest precision. Its converter takes weights from inside the graph only."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs, with_weights

TITLE, PACKAGE, MODULES, SIZES = "MNN", "MNN", ("MNN",), "open"
# The command `mnnconvert` reports each conversion to a server; this is what it calls to convert.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def load(file: Path, _: Inputs) -> Graph:
    import MNN

    ports = onnx.load(file, load_external_data=False).graph
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "graph.onnx", Path(folder) / "graph.mnn"
        source.write_bytes(with_weights(file))
        flags = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "x"]
        done = subprocess.run([sys.executable, "-c", CONVERT, *flags], capture_output=True, text=True)
        if not target.exists():
            raise RuntimeError(f"the converter ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
        runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 1},))
        runtime.set_hint(3, 0)
        module = MNN.nn.load_module_from_file(
            str(target),
            [port.name for port in ports.input],
            [port.name for port in ports.output],
            runtime_manager=runtime,
        )

    def run(inputs: Inputs) -> list[np.ndarray]:
        results = module.forward([variable(value) for value in inputs.values()])
        return [np.array(MNN.expr.convert(result, MNN.expr.NCHW).read()) for result in results]

    def variable(value: np.ndarray) -> object:
        kind, dtype = (np.int32, MNN.expr.int) if value.dtype == np.int64 else (np.float32, MNN.expr.float)
        made = MNN.expr.placeholder(list(value.shape), MNN.expr.NCHW, dtype)
        made.write(value.astype(kind))
        return made

    return run
