"""IREE, compiled for the CPU with fixed sizes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs, with_sizes

TITLE, PACKAGE, MODULES, SIZES = "IREE", "iree-base-compiler", ("iree.compiler", "iree.runtime"), "fixed"


def load(file: Path, inputs: Inputs) -> Graph:
    import iree.runtime
    from iree.compiler import tools

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "graph.onnx", Path(folder) / "graph.mlir"
        onnx.save(with_sizes(file, inputs), source)
        importer = [sys.executable, "-m", "iree.compiler.tools.import_onnx", str(source), "-o", str(target)]
        done = subprocess.run(importer, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        program = tools.compile_file(
            str(target),
            input_type="onnx",
            target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
    context = iree.runtime.SystemContext(config=iree.runtime.Config("local-sync"))
    context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, program))
    module = context.modules["module"]
    (name,) = (
        name for name in module.vm_module.function_names if not name.endswith("$async") and not name.startswith("__")
    )

    def run(inputs: Inputs) -> list[np.ndarray]:
        result = module[name](*inputs.values())
        return [np.asarray(output) for output in (result if isinstance(result, (tuple, list)) else [result])]

    return run
