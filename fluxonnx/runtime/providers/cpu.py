"""onnxruntime's own kernels for the CPU."""

from fluxonnx.runtime.providers.description import Traits

CPU = Traits("onnxruntime", None, "ort", tested="Linux x86-64, in CI")
