"""All providers that something is known of, by their short names: onnxruntime's without the suffix."""

from __future__ import annotations

from fluxonnx.runtime.providers.coreml import COREML
from fluxonnx.runtime.providers.cpu import CPU
from fluxonnx.runtime.providers.cuda import CUDA, TENSORRT
from fluxonnx.runtime.providers.description import Traits
from fluxonnx.runtime.providers.dml import DML
from fluxonnx.runtime.providers.mlx import MLX
from fluxonnx.runtime.providers.openblas import OPENBLAS
from fluxonnx.runtime.providers.openvino import OPENVINO
from fluxonnx.runtime.providers.webgpu import WEBGPU

KNOWN = {
    "cpu": CPU,
    "openblas": OPENBLAS,
    "cuda": CUDA,
    "tensorrt": TENSORRT,
    "openvino": OPENVINO,
    "coreml": COREML,
    "mlx": MLX,
    "webgpu": WEBGPU,
    "dml": DML,
}


def traits(provider: str) -> Traits:
    """Return what suits a provider; for an unknown one, what suits any."""
    return KNOWN.get(provider, Traits("onnxruntime"))


def installation(provider: str, plugin: bool = True) -> str:
    """Return the command that adds a provider to this Python; "" if there is none, or none is known.

    Args:
        provider: The provider.
        plugin: Whether it may be a plugin.
    """
    known = traits(provider)
    if provider not in KNOWN or (not plugin and known.package == known.plugin):
        return ""
    if known.plugin and plugin:
        return f"pip install {known.plugin}"
    if known.package == "onnxruntime":
        return "pip install onnxruntime"
    if known.package.startswith("fluxonnx"):
        return f"pip install '{known.package}'"
    return f"pip uninstall onnxruntime && pip install {known.package}"
