"""The dnn module of OpenCV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Graph, Inputs, with_weights

TITLE, PACKAGE, MODULES, SIZES = "OpenCV dnn", "opencv-python-headless", ("cv2",), "open"


def load(file: Path, _: Inputs) -> Graph:
    import cv2

    outputs = [output.name for output in onnx.load(file, load_external_data=False).graph.output]
    net = cv2.dnn.readNetFromONNX(np.frombuffer(with_weights(file), np.uint8))

    def run(inputs: Inputs) -> list[np.ndarray]:
        for name, value in inputs.items():
            net.setInput(value, name)
        return [np.array(output) for output in net.forward(outputs)]

    return run
