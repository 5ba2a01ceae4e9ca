"""FLUX.2-klein as plain ONNX: export the graphs, make pictures with them, no torch.

import fluxonnx

with fluxonnx.load("model") as flux:
    flux.generate("a cat on a windowsill", width=512, height=512, seed=42).save("cat.png")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# onnxruntime 1.32 and later collect telemetry and write its queue into the user's cache. Only this variable keeps the
# files away, and only if it is set before the import, which nothing inside the package can do without passing here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from fluxonnx.errors import Cancelled, CheckpointError, ExportError, FluxonnxError, ImageError, UsageError
from fluxonnx.version import __version__

if TYPE_CHECKING:
    from fluxonnx.api import load
    from fluxonnx.runtime.pipeline import Flux
    from fluxonnx.runtime.request import Request

__all__ = [
    "Cancelled",
    "CheckpointError",
    "ExportError",
    "Flux",
    "FluxonnxError",
    "ImageError",
    "Request",
    "UsageError",
    "__version__",
    "load",
]

# Imported on first use: onnx and onnxruntime take longer to load than most commands take to run.
_LAZY = {
    "Flux": "fluxonnx.runtime.pipeline",
    "Request": "fluxonnx.runtime.request",
    "load": "fluxonnx.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
