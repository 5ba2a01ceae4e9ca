"""onnx2torch: the graph as a module of PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "onnx2torch", "onnx2torch", ("onnx2torch", "torch"), "open"


def load(file: Path, _: Inputs) -> Graph:
    import torch

    with torchvision():
        import onnx2torch

    module = onnx2torch.convert(onnx.load(file))

    def run(inputs: Inputs) -> list[np.ndarray]:
        with torch.no_grad():
            result = module(*(torch.from_numpy(value) for value in inputs.values()))
        return [output.numpy() for output in (result if isinstance(result, (tuple, list)) else [result])]

    return run


@contextmanager
def torchvision() -> Iterator[None]:
    """Have something of this name to import, for an operator that our graphs do not have.

    A torchvision fits one version of torch only. Beside another one, transformers could not be imported any more.
    """
    names = [] if find_spec("torchvision") else ["torchvision", "torchvision.ops"]
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__getattr__ = lambda attribute: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
