"""OpenVINO on the CPU, in float32: its default on some machines is bfloat16."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.conformance.graphs import Graph, Inputs

TITLE, PACKAGE, MODULES, SIZES = "OpenVINO", "openvino", ("openvino",), "open"


@cache
def core() -> Any:
    """OpenVINO's one Core of this process.

    Each Core gives the main thread a stack for signals (Intel's AMX needs one), and the last to go restores the one
    that it found: after several, freed memory. The next Ctrl-C was then a segmentation fault (seen with 2026.4).
    """
    import openvino

    return openvino.Core()


def load(file: Path, _: Inputs) -> Graph:
    model = core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Inputs) -> list[np.ndarray]:
        result = model(inputs)
        return [result[output] for output in model.outputs]

    return run
