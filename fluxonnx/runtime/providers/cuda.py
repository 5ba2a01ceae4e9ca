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
    # On an H100, a step at 512x512 takes 27 ms so, and 89 ms with fp16, whose products are scaled against overflow.
    precision="bf16-native",
    flavour="ort",
    settings={
        # An arena that grows by doubling would allocate twice the memory that 8 GB of weights need.
        "arena_extend_strategy": "kSameAsRequested",
        # Trying all algorithms of a convolution makes the first picture of a size 0.5 s slower, and no other faster.
        "cudnn_conv_algo_search": "HEURISTIC",
    },
    device="cuda",
    lacking=("int8",),
    needs=NEEDS,
    limits=(
        "bf16-native needs a GPU that computes in bfloat16 (NVIDIA Ampere or later); older ones take fp16.",
        "It has no products of 8-bit integers: of int8 builds, these run on the CPU.",
        "Of bf16, fp32, int8 and int4 builds, the autoencoder's group norms run on the CPU, which takes seconds.",
    ),
    tested="an H100, with onnxruntime-gpu 1.31.1",
    prepare=_preload,
)
TENSORRT = Traits(
    "onnxruntime-gpu",
    lacking=(),
    needs=f"{NEEDS}, and TensorRT's libraries",
    limits=("It compiles each graph anew for other shapes, which takes minutes.",),
)
