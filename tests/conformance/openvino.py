"""OpenVINO on the CPU, in float32: its default on some machines is bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "OpenVINO", "openvino", ("openvino",), "open"


def load(file: Path, _: Inputs) -> Graph:
    import openvino

    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Inputs) -> list[np.ndarray]:
        result = model(inputs)
        return [result[output] for output in model.outputs]

    return run
