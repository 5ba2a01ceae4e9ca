"""MNN on the CPU, in its highest precision. Its converter takes weights from inside the graph only."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs, with_weights

TITLE, PACKAGE, MODULES, SIZES = "MNN", "MNN", ("MNN",), "open"
# HintMode of MNN's Interpreter.hpp, which has no name in Python
WINOGRAD_MEMORY_LEVEL = 3
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
        said = done.stdout + done.stderr
        # The converter ends well, whatever it did not understand.
        faults = sorted(set(re.findall(r"(?:Don't support|These Op Not Support).*", said)))
        if faults or not target.exists():
            raise RuntimeError(f"mnnconvert: {'; '.join(faults) or said[-200:]}")
        runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 1},))
        runtime.set_hint(WINOGRAD_MEMORY_LEVEL, 0)  # otherwise convolutions are off by 6e-5
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
