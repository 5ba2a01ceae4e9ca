"""ONNX's own definition of each operator, in numpy."""

from __future__ import annotations

from pathlib import Path

import onnx

from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "ONNX ReferenceEvaluator", "onnx", ("onnx",), "open"


def load(file: Path, _: Inputs) -> Graph:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(file))
    return lambda inputs: evaluator.run(None, inputs)
