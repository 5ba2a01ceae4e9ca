"""The dnn module of OpenCV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.conformance.graphs import Inputs, with_weights

TITLE, PACKAGE, MODULES, SIZES = "OpenCV dnn", "opencv-python-headless", ("cv2",), "open"


def run(file: Path, inputs: Inputs) -> list[np.ndarray]:
    import cv2

    net = cv2.dnn.readNetFromONNX(np.frombuffer(with_weights(file), np.uint8))
    for name, value in inputs.items():
        net.setInput(value, name)
    return list(net.forward([output.name for output in onnx.load(file, load_external_data=False).graph.output]))
