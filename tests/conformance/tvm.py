"""Apache TVM's Relax, compiled for the CPU with fixed sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conformance.graphs import Graph, Inputs, with_sizes

TITLE, PACKAGE, MODULES, SIZES = "Apache TVM", "apache-tvm", ("tvm",), "fixed"


def load(file: Path, inputs: Inputs) -> Graph:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(with_sizes(file, inputs), keep_params_in_input=False)
    machine = relax.VirtualMachine(relax.build(relax.transform.LegalizeOps()(module), "llvm"), tvm.cpu())

    def run(inputs: Inputs) -> list[np.ndarray]:
        result = machine["main"](*(tvm.runtime.tensor(value) for value in inputs.values()))
        return [output.numpy() for output in ([result] if hasattr(result, "numpy") else result)]

    return run
