"""ONNX's own definition of each operator, in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Inputs

TITLE, PACKAGE, MODULES, SIZES = "ONNX ReferenceEvaluator", "onnx", ("onnx",), "open"


def run(file: Path, inputs: Inputs) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load(file)).run(None, inputs)
