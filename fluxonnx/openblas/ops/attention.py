"""Attention a block of queries of one head at a time: the scores of all of them never exist together."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxonnx.openblas.call import FUSED, MICROSOFT, Call, Unsupported, operator
from fluxonnx.openblas.ops.linear import floats, round_into
from fluxonnx.openblas.workers import part

# Scores of a block, about: 2 MB.
SCORES = 1 << 19
FEWEST_ROWS, MOST_ROWS = 32, 512


def attend(
    call: Call, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None, scale: float, out: np.ndarray
) -> None:
    """Write softmax(scale * q @ k.T + bias) @ v.

    Args:
        call: The call.
        q: [batch, heads, rows, dim], float32 or float16.
        k: [batch, heads, keys, dim].
        v: [batch, heads, keys, width].
        bias: What broadcasts to [batch, heads, rows, keys].
        scale: A factor of the scores.
        out: [batch, heads, rows, width].
    """
    batch, heads, rows, dim = q.shape
    keys, width = v.shape[2:]
    block = max(FEWEST_ROWS, min(MOST_ROWS, SCORES // max(1, keys)))
    starts = range(0, rows, -(-rows // -(-rows // block)))
    tasks = [(b, h, slice(top, min(top + starts.step, rows))) for b in range(batch) for h in range(heads)
             for top in starts]  # fmt: skip
    scratch = call.workers.scratch

    def compute(task: tuple[int, int, slice]) -> None:
        head, span = task[:2], task[2]
        count = span.stop - span.start
        queries = scratch("queries", (count, dim))
        np.multiply(q[head][span], np.float32(scale), out=queries, casting="same_kind")
        scores = scratch("scores", (count, keys))
        call.blas.multiply(queries, floats(k[head]).T, scores)
        if bias is not None:
            scores += part(bias, (*(slice(i, i + 1) for i in head), span, slice(None))).reshape(-1, bias.shape[-1])
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        totals = scores.sum(axis=-1, keepdims=True)
        mixed = scratch("mixed", (count, width))
        call.blas.multiply(scores, floats(v[head]), mixed)
        mixed /= totals
        round_into(mixed, out[head][span])

    call.workers.each(compute, tasks)


@operator("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(call: Call) -> np.ndarray:
    """Attend over [batch, seq, heads * dim], with a bias of the scores.

    Source: onnxruntime, docs/ContribOperators.md.
    """
    if len(call.inputs) < 3 or any(value is None for value in call.inputs[:3]):
        raise Unsupported("MultiHeadAttention needs separate queries, keys and values")
    extra = [i for i, value in enumerate(call.inputs) if value is not None and i > 2 and i != 5]
    if extra or call.attribute("unidirectional", 0) or any(value.ndim != 3 for value in call.inputs[:3]):
        raise Unsupported("MultiHeadAttention only takes queries, keys, values, and a bias of the scores")
    q, k, v = call.inputs[:3]
    heads = call.attribute("num_heads")
    bias = call.input(5)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    out = call.empty((*q.shape[:2], v.shape[2]), q.dtype)

    def by_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    scale = call.attribute("scale", 0.0) or 1 / np.sqrt(q.shape[2] // heads)
    attend(call, by_head(q), by_head(k), by_head(v), bias, scale, by_head(out))
    return out


@operator("Attention", domain=FUSED)
def fused_attention(call: Call) -> np.ndarray:
    """MatMul, Softmax, MatMul: queries [batch, heads, rows, dim], transposed keys, values, and a bias.

    The result is laid out as [batch, rows, heads, width], which is what follows.
    """
    q, keys, v = call.inputs[:3]
    if q.ndim != 4 or keys.ndim != 4 or v.ndim != 4:
        raise Unsupported("attention is only computed by head, in 4 dimensions")
    out = call.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), v.dtype).transpose(0, 2, 1, 3)
    attend(call, q, keys.transpose(0, 1, 3, 2), v, call.input(3), 1.0, out)
    return out


@operator("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(call: Call) -> np.ndarray:
    """Rotate pairs of values of each head by its position: [batch, seq, heads * dim], or by head in 4 dimensions.

    Source: onnxruntime, docs/ContribOperators.md.
    """
    x, positions, cos, sin = call.inputs[:4]
    if call.attribute("rotary_embedding_dim", 0) or call.attribute("scale", 1.0) != 1.0 or x.ndim not in (3, 4):
        raise Unsupported("RotaryEmbedding only rotates whole heads")
    dim = 2 * cos.shape[1]
    # [batch, seq, heads, dim]
    heads = x.reshape(*x.shape[:2], -1, dim) if x.ndim == 3 else x.transpose(0, 2, 1, 3)
    seq = heads.shape[1]
    if positions.size == 1 and positions.ndim == 1:
        rows: Any = slice(int(positions[0]), int(positions[0]) + seq)
        cos, sin = cos[rows][None, :, None], sin[rows][None, :, None]
    else:
        cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]
    if cos.shape[1] != seq:
        raise ValueError(f"there are {cos.shape[1]} rows of cosines for {seq} positions")
    out = call.empty(heads.shape, x.dtype)
    interleaved = bool(call.attribute("interleaved", 0))
    turn = cos + 1j * sin if interleaved and x.dtype == np.float32 else None
    half = dim // 2

    def piece(index: tuple[slice, ...]) -> None:
        source, to = heads[index], out[index]
        if turn is not None:  # a pair is a complex number
            source = np.ascontiguousarray(source)
            np.multiply(source.view(np.complex64), part(turn, index), out=to.view(np.complex64))
            return
        c, s = part(cos, index), part(sin, index)
        first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
        a, b = source[..., first], source[..., second]
        to[..., first] = a * c - b * s
        to[..., second] = b * c + a * s

    call.workers.each(piece, call.workers.pieces(heads.shape, keep=1))
    if x.ndim == 3:
        return out.reshape(x.shape)
    return out.transpose(0, 2, 1, 3)
