"""onnx2torch: the graph as a module of PyTorch."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "onnx2torch", "onnx2torch", ("onnx2torch", "torch", "torchvision"), "open"


def load(file: Path, _: Inputs) -> Graph:
    import torch

    # onnx2torch imports torchvision for an operator that our graphs do not have. torchvision fits one version of torch
    # only: beside another, it cannot be imported where these names are unknown.
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    import onnx2torch

    module = onnx2torch.convert(onnx.load(file))

    def run(inputs: Inputs) -> list[np.ndarray]:
        with torch.no_grad():
            result = module(*(torch.from_numpy(value) for value in inputs.values()))
        return [output.numpy() for output in (result if isinstance(result, (tuple, list)) else [result])]

    return run
