"""Blocks of integers that a file has, multiplied as they are: each weight is integer times scale, rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint.encoded import Encoded
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export import primitives
from fluxonnx.export.graph import MICROSOFT, GraphBuilder
from fluxonnx.export.initializers import Part
from fluxonnx.export.precisions.rounding import pack_int4


def product(g: GraphBuilder, x: str, tensor: Encoded) -> str:
    """Multiply `x` [..., in] by `tensor` [out, in], by MatMulNBits; elsewhere by the floats of signed bytes."""
    assert tensor.blocks is not None
    (n_out, n_in), bits, size = tensor.shape, tensor.blocks.bits, tensor.blocks.size
    count = n_in // size
    fused = g.fused
    integers = Part("", "U8", (n_out, count, size * bits // 8)) if fused else Part("", "I8", (n_out, count, size))

    def encode(source: Tensor) -> tuple[np.ndarray, np.ndarray]:
        assert isinstance(source, Encoded)
        values, scales = source.unpacked()
        if not fused:
            return values, scales
        # MatMulNBits takes unsigned integers around the middle
        return pack_int4(values, 8) if bits == 4 else values.view(np.uint8) ^ np.uint8(128), scales

    g.encoded(tensor, [integers, Part(".scale", "F32", (n_out, count, *([] if fused else [1])))], encode)
    weight, scale = tensor.name, tensor.name + ".scale"
    if fused:
        # accuracy_level 4: activations are rounded to int8, block by block (by rows in Arm's own kernels)
        sizes: dict[str, Any] = {"K": n_in, "N": n_out, "bits": bits, "block_size": size, "accuracy_level": 4}
        shape = [*g.shape(x)[:-1], n_out]
        return g.op("MatMulNBits", x, weight, scale, domain=MICROSOFT, like=x, shape=shape, **sizes)
    floats = g.weight_op("Mul", g.weight_op("Cast", weight, to=TensorProto.FLOAT), scale)
    matrix = g.weight_op("Reshape", floats, g.constant([n_out, n_in], np.int64))
    return primitives.product(g, x, matrix)


def described(precision: str, bits: int | None, tensors: Mapping[str, Tensor]) -> str | None:
    """Return a line about what becomes of blocks in a build; None where there are none, or all stay as they are.

    Args:
        precision: The build's name.
        bits: Blocks of at most so many bits are kept; None for a build of floats.
        tensors: The tensors of a part of the model.
    """
    found = [t for t in tensors.values() if isinstance(t, Encoded) and t.form != "fp8" and len(t.shape) > 1]
    lost = [t for t in found if t.blocks is None or bits is None or t.blocks.bits > bits]
    if not lost:
        return None
    what = "rounded again to" if bits is not None else "converted to"
    return f"{lost[0].file}: {len(lost)} matrices ({_counted(lost)}) are {what} {precision}"


def _counted(tensors: Iterable[Encoded]) -> str:
    forms: dict[str, int] = {}
    for tensor in tensors:
        forms[tensor.form] = forms.get(tensor.form, 0) + 1
    return ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
