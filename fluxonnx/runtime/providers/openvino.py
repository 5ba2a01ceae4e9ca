"""Intel's OpenVINO."""

from __future__ import annotations

import json
from typing import Any

from fluxonnx.runtime.providers.description import Traits


def _threads(count: int) -> dict[str, Any]:
    return {"load_config": json.dumps({"CPU": {"INFERENCE_NUM_THREADS": str(count)}})}


OPENVINO = Traits(
    "onnxruntime-openvino",
    None,
    plugin="onnxruntime-ep-openvino",
    needs="an x86-64 processor; the plugin one of Intel's, or Intel's GPU or NPU",
    limits=("The int8 transformer does not load: its rows are dynamic.",),
    tested="Linux x86-64 with the wheel onnxruntime-openvino; the plugin offered no device there",
    thread_settings=_threads,
)
