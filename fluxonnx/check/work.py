"""How many multiply-adds a graph needs for inputs of a given size, from the shapes of its values alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx

from fluxonnx.check.shapes import Shape, shapes

# Pixels along each side of a latent token of the released models; a VAE graph's metadata say its own.
SCALE_FACTOR = 16
# Operators with products of matrices, convolutions and attention that are not counted.
NOT_COUNTED = ("Einsum", "GRU", "LSTM", "RNN", "Attention", "GroupQueryAttention", "DeformConv", "DFT", "QAttention")


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one run.

    Attributes:
        dims: The numbers that symbolic dimensions stand for.
        by_operator: Multiply-adds by type of operator, the most first.
        unknown: How many operators of a type are not counted, as their shapes or their work are not known.
        free: Symbolic dimensions of inputs that have no number.
    """

    dims: dict[str, int]
    by_operator: dict[str, int]
    unknown: dict[str, int]
    free: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All multiply-adds that are counted."""
        return sum(self.by_operator.values())


def symbols(width: int, height: int, text_seq: int, scale_factor: int = SCALE_FACTOR) -> dict[str, int]:
    """Return what the symbolic dimensions of FLUX.2-klein's graphs stand for, for one picture without references.

    Args:
        width: Pixels.
        height: Pixels.
        text_seq: Tokens of the prompt.
        scale_factor: Pixels along each side of a latent token.
    """
    columns, rows = width // scale_factor, height // scale_factor
    return {
        "batch": 1,
        "width": width,
        "height": height,
        "latent_width": columns,
        "latent_height": rows,
        "text_seq": text_seq,
        "keys": text_seq,  # at most: keys of padding are left out
        "image_seq": rows * columns,
        "joint_seq": text_seq + rows * columns,
    }


def count(model: onnx.ModelProto, dims: Mapping[str, int]) -> Work:
    """Count the multiply-adds of a graph's matrix products, convolutions and attention.

    Nodes inside loops, branches and functions are not looked at.

    Args:
        model: The graph; it is not changed.
        dims: Numbers for symbolic dimensions.
    """
    known, used, free = shapes(model, dims)
    done: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    functions = {(item.domain, item.name) for item in model.functions}
    for node in model.graph.node:
        rule = RULES.get(node.op_type)
        if rule is None or (node.domain, node.op_type) in functions:
            if node.op_type in NOT_COUNTED or (node.domain, node.op_type) in functions:
                unknown[node.op_type] += 1
            continue
        try:
            done[node.op_type] += rule(node, known)
        except (KeyError, IndexError):
            unknown[node.op_type] += 1
    return Work(used, dict(done.most_common()), dict(unknown.most_common()), tuple(free))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((item.i for item in node.attribute if item.name == name), default)


def _matmul(a: int, b: int) -> Callable[[onnx.NodeProto, Mapping[str, Shape]], int]:
    """The product of inputs number `a` and `b`: rows and columns of the output, and batches, times the inner size."""

    def work(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int:
        left, right = known[node.input[a]], known[node.input[b]]
        transposed = _attribute(node, "transB", 0)
        columns = right[-2 if transposed else -1] if len(right) > 1 else 1
        inner = left[-2] if _attribute(node, "transA", 0) else left[-1]
        rows = math.prod(left) // inner if inner else 0
        # a matrix on the left that many on the right share
        batches = math.prod(right[:-2]) if len(left) <= 2 < len(right) else 1
        return rows * inner * columns * batches

    return work


def _bits(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int:
    """MatMulNBits: its attributes say the sizes of its packed weights."""
    return math.prod(known[node.input[0]]) * _attribute(node, "N", 0)


def _conv(weights: int) -> Callable[[onnx.NodeProto, Mapping[str, Shape]], int]:
    def work(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int:
        return math.prod(known[node.output[0]]) * math.prod(known[node.input[weights]][1:])

    return work


def _transposed_conv(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int:
    return math.prod(known[node.input[0]]) * math.prod(known[node.input[1]][1:])


def _attention(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int:
    """com.microsoft MultiHeadAttention of query, key and value [batch, seq, heads * head_dim], or by heads."""
    query, key, value = (known[node.input[i]] for i in range(3))
    tokens = key[2] if len(key) == 4 else key[1]
    width = value[1] * value[3] if len(value) == 4 else value[2]
    return query[0] * query[1] * tokens * (query[2] + width)


RULES: dict[str, Callable[[onnx.NodeProto, Mapping[str, Shape]], int]] = {
    "Gemm": _matmul(0, 1),
    "MatMul": _matmul(0, 1),
    "FusedMatMul": _matmul(0, 1),
    "MatMulInteger": _matmul(0, 1),
    "MatMulIntegerToFloat": _matmul(0, 1),
    "DynamicQuantizeMatMul": _matmul(0, 1),
    "QLinearMatMul": _matmul(0, 3),
    "MatMulNBits": _bits,
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "NhwcFusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _transposed_conv,
    "MultiHeadAttention": _attention,
}
