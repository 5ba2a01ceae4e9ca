"""The operators by family; importing this enters them into `call.OPERATORS`."""

from fluxonnx.openblas.ops import attention, conv, elementwise, linear, norm, quantised, shape

__all__ = ["attention", "conv", "elementwise", "linear", "norm", "quantised", "shape"]
