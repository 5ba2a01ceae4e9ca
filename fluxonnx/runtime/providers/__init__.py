"""Execution providers: the CPU, a GPU, or another runtime that onnxruntime hands graphs to.

Their short names are onnxruntime's without the suffix: "cpu", "cuda", "coreml", "dml", "openvino", ... The provider
"openblas" is none of onnxruntime's: graphs go to the package's own engine, `fluxonnx.openblas`.
"""

from fluxonnx.runtime.providers.assignment import assigned, tell_of_fallback
from fluxonnx.runtime.providers.description import CPU, OPENBLAS, Traits
from fluxonnx.runtime.providers.plugins import Plugin, plugin_of, plugins
from fluxonnx.runtime.providers.probe import Trial, check_right, trial, works
from fluxonnx.runtime.providers.registry import KNOWN, installation, traits
from fluxonnx.runtime.providers.starting import (
    available,
    check_provider,
    check_provider_options,
    check_started,
    session_providers,
)

__all__ = [
    "CPU",
    "KNOWN",
    "OPENBLAS",
    "Plugin",
    "Traits",
    "Trial",
    "assigned",
    "available",
    "check_provider",
    "check_provider_options",
    "check_right",
    "check_started",
    "installation",
    "plugin_of",
    "plugins",
    "session_providers",
    "tell_of_fallback",
    "traits",
    "trial",
    "works",
]
