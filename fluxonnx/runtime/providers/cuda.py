"""NVIDIA's GPUs, by onnxruntime's own kernels or by TensorRT."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout

from fluxonnx.runtime.library import SILENT, library, log_severity
from fluxonnx.runtime.providers.description import Traits

NEEDS = "an NVIDIA GPU and its driver"


def _preload() -> None:
    """Have onnxruntime find the CUDA libraries that pip installed; it prints on standard output which ones it lacks."""
    onnxruntime = library()
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(io.StringIO() if log_severity() == SILENT else sys.stderr):
            onnxruntime.preload_dlls()


CUDA = Traits(
    "onnxruntime-gpu",
    flavour="ort",
    # An arena that grows by doubling would allocate twice the memory that 8 GB of weights need.
    settings={"arena_extend_strategy": "kSameAsRequested"},
    device="cuda",
    needs=NEEDS,
    prepare=_preload,
)
TENSORRT = Traits(
    "onnxruntime-gpu",
    needs=f"{NEEDS}, and TensorRT's libraries",
    limits=("It compiles each graph anew for other shapes, which takes minutes.",),
)
