"""Attention: heads, rotary embeddings, masks."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from fluxonnx.export.graph import MICROSOFT, GraphBuilder
from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.primitives import add, concat, mul, reshape, rows_from, size_of, split

LOWEST_HALF = float(np.finfo(np.float16).min)


def split_heads(g: GraphBuilder, x: str, head_dim: int) -> str:
    """[batch, seq, heads * head_dim] -> [batch, seq, heads, head_dim]."""
    # -1 instead of a second 0: some runtimes know only one.
    return reshape(g, x, [0, 0 if g.fused else -1, g.width(x) // head_dim, head_dim])


def merge_heads(g: GraphBuilder, x: str) -> str:
    """[batch, seq, heads, head_dim] -> [batch, seq, heads * head_dim]."""
    heads, head_dim = g.sizes(x, 2)
    return reshape(g, x, [0, 0 if g.fused else -1, heads * head_dim])


def rope_table(g: GraphBuilder, cos: str, sin: str, *parts: str) -> tuple[str, str]:
    """Prepare interleaved cos and sin [seq, head_dim], each value twice in a row, for `rope_interleaved`.

    Args:
        g: The graph.
        cos: The cosines of the tokens of all `parts`, in their order.
        sin: Likewise.
        *parts: The sequences that are attended to side by side, [batch, text_seq, any] and [batch, image_seq, any];
            none for a single one.
    """
    if not g.fused:
        if g.static or not parts:
            return _by_head(g, cos), _by_head(g, sin)
        # The cut changes nothing, but tells runtimes that plan with symbols that seq is text_seq + image_seq. Few can
        # add sizes, so this is the size of something that has as many rows.
        columns = [g.op("Slice", x, *(g.constant([n], np.int64) for n in (0, 1, 2))) for x in parts]
        seq = size_of(g, concat(g, *columns, axis=1), 1)
        tables = (rows_from(g, table, 0, seq, "joint_seq", axis=0) for table in (cos, sin))
        cos, sin = (_by_head(g, table) for table in tables)
        return cos, sin
    start, end, axes, steps = (g.constant([n], np.int64) for n in (0, np.iinfo(np.int64).max, 1, 2))
    return g.op("Slice", cos, start, end, axes, steps), g.op("Slice", sin, start, end, axes, steps)


def _by_head(g: GraphBuilder, table: str) -> str:
    """[seq, head_dim] -> [seq, 1, head_dim], which broadcasts over [batch, seq, heads, head_dim]."""
    return g.op("Unsqueeze", table, g.constant([1], np.int64))


def rope_interleaved(g: GraphBuilder, x: str, table: tuple[str, str]) -> str:
    """Rotate the pairs (0, 1), (2, 3), ... of each head: [batch, seq, heads, head_dim] -> same, heads merged.

    Source: apply_rotary_emb with use_real_unbind_dim=-1, diffusers embeddings.py.
    """
    cos, sin = table
    if g.fused:
        return _rotary_embedding(g, x, cos, sin, interleaved=1)
    turn = np.kron(np.eye(g.width(x) // 2), [[0, 1], [-1, 0]])  # (a, b) -> (-b, a)
    return _rotated(g, x, turn, cos, sin)


def rope_halves(g: GraphBuilder, x: str, cos: np.ndarray, sin: np.ndarray) -> str:
    """Rotate the pairs (i, i + head_dim/2) of each head by its position: shapes as `rope_interleaved`.

    Args:
        g: The graph.
        x: [batch, seq, heads, head_dim].
        cos: Table [positions, head_dim / 2]; a constant, because a runtime that computes in bf16 would ruin it.
        sin: Likewise.

    Source: apply_rotary_pos_emb, transformers modeling_qwen3.py.
    """
    if g.fused:
        return _rotary_embedding(g, x, g.constant(cos), g.constant(sin), interleaved=0)
    # [positions, 1, head_dim], cut to [seq, 1, head_dim]
    tables = [g.constant(np.concatenate([table, table], axis=-1)[:, None, :]) for table in (cos, sin)]
    end = size_of(g, x, 1)
    symbol = str(g.shape(x)[1])
    cos_rows, sin_rows = (rows_from(g, table, 0, end, symbol, axis=0) for table in tables)
    turn = np.kron([[0, 1], [-1, 0]], np.eye(g.width(x) // 2))
    return _rotated(g, x, turn, cos_rows, sin_rows)


def _rotated(g: GraphBuilder, x: str, turn: np.ndarray, cos: str, sin: str) -> str:
    """Return x * cos + (x @ turn) * sin, heads merged; `turn` moves each value to its partner's place, exactly.

    All runtimes have a product; taking pairs apart needs five dimensions, which some don't have.
    """
    return merge_heads(g, add(g, mul(g, x, cos), mul(g, g.op("MatMul", x, g.constant(turn)), sin)))


def _rotary_embedding(g: GraphBuilder, x: str, cos: str, sin: str, interleaved: int) -> str:
    first_position = g.constant([0], np.int64)
    merged = merge_heads(g, x)
    return g.op(
        "RotaryEmbedding",
        merged,
        first_position,
        cos,
        sin,
        domain=MICROSOFT,
        like=merged,
        num_heads=g.sizes(x, 2)[0],
        rotary_embedding_dim=0,
        interleaved=interleaved,
    )


def repeat_heads(g: GraphBuilder, x: str, kv_heads: int, times: int, head_dim: int) -> str:
    """Repeat each key or value head: [batch, seq, kv_heads * head_dim] -> [batch, seq, kv_heads * times * head_dim]."""
    if times == 1:
        return x
    if not g.fused:  # at most three dimensions
        heads = split(g, x, [head_dim] * kv_heads)
        return concat(g, *(head for head in heads for _ in range(times)), axis=-1)
    grouped = reshape(g, x, [0, 0, kv_heads, 1, head_dim])
    repeated = g.op("Expand", grouped, g.constant([1, 1, 1, times, 1], np.int64))
    return reshape(g, repeated, [0, 0, kv_heads * times * head_dim])


def attention(g: ModelBuilder, q: str, k: str, v: str, head_dim: int, bias: str = "") -> str:
    """Attend over [batch, seq, heads * head_dim]; `bias` [batch, 1, seq, keys] is added to the scaled scores."""

    def attend(q: str, k: str, v: str) -> str:
        return _attention(g, q, k, v, head_dim, bias)

    return g.precision.attention(g, q, k, v, attend)


def _attention(g: GraphBuilder, q: str, k: str, v: str, head_dim: int, bias: str) -> str:
    """Attend with q, k and v of one float type, which is also that of the result; `bias` is float32."""
    scale, dtype, heads = 1.0 / math.sqrt(head_dim), g.dtype(q), g.width(q) // head_dim
    if g.fused:
        if bias and dtype != TensorProto.FLOAT:
            bias = g.once(("half", bias), lambda: g.cast(g.op("Max", bias, g.constant(LOWEST_HALF, np.float32)), dtype))
        optional = ["", "", bias] if bias else []
        return g.op("MultiHeadAttention", q, k, v, *optional, domain=MICROSOFT, like=q, num_heads=heads, scale=scale)

    def by_head(x: str, perm: list[int]) -> str:
        return g.op("Transpose", split_heads(g, x, head_dim), perm=perm)

    scaled = mul(g, by_head(q, [0, 2, 1, 3]), g.constant(scale, helper.tensor_dtype_to_np_dtype(dtype)))
    scores = g.cast(g.op("MatMul", scaled, by_head(k, [0, 2, 3, 1])), TensorProto.FLOAT)
    if bias:
        scores = add(g, scores, bias)
    weights = g.cast(g.op("Softmax", scores, axis=-1), dtype)
    mixed = g.op("MatMul", weights, by_head(v, [0, 2, 1, 3]))
    return merge_heads(g, g.op("Transpose", mixed, perm=[0, 2, 1, 3]))


def token_positions(g: GraphBuilder, attention_mask: str, max_positions: int) -> str:
    """Return 0, 1, 2, ... for the tokens of `attention_mask` [batch, seq], at most `max_positions`: int64 [seq]."""
    positions = g.constant(np.arange(max_positions), np.int64)
    return rows_from(g, positions, 0, size_of(g, attention_mask, 1), str(g.shape(attention_mask)[1]), axis=0)


def real_tokens(g: GraphBuilder, attention_mask: str, positions: str) -> str | None:
    """Return the number of tokens up to the last one that is no padding in some row, at least 1: int64 [1].

    None stands for all: few runtimes can plan for sizes that depend on values, so portable graphs only mask padding.
    """
    if not g.fused or g.static:
        return None
    one = g.constant([1], np.int64)
    ends = g.op("Mul", attention_mask, g.op("Add", positions, one))
    return g.op("Reshape", g.op("Max", g.reduce("ReduceMax", ends, [0, 1]), one), one)


def first_tokens(g: GraphBuilder, x: str, count: str | None, axis: int = 1) -> str:
    """Return the first `count` rows of `x` along `axis`: `count` is int64 [1], or None for all of them."""
    return x if count is None else rows_from(g, x, 0, count, "keys", axis)


def causal_padding_bias(g: GraphBuilder, attention_mask: str, positions: str, keys: str | None) -> str:
    """Return the bias of attention scores with which a token sees only real tokens up to itself.

    Args:
        g: The graph.
        attention_mask: int64 [batch, seq], 1 for real tokens, 0 for padding.
        positions: int64 [seq], see `token_positions`.
        keys: int64 [1], the number of tokens that can be seen; None for all.

    Returns:
        float32 [batch, 1, seq, keys]: 0 where attention is allowed, the lowest float32 elsewhere.
    """
    if g.static:
        return _causal_padding_bias(g, attention_mask)
    column = g.op("Unsqueeze", positions, g.constant([1], np.int64))
    seen = first_tokens(g, positions, keys, axis=0)
    if g.fused:
        causal = g.op("LessOrEqual", seen, column)  # [seq, keys]
    else:  # some runtimes have no LessOrEqual
        causal = g.op("Less", seen, g.op("Add", column, g.constant([1], np.int64)))
    real = g.op("Cast", first_tokens(g, attention_mask, keys), to=TensorProto.BOOL)
    real = g.op("Unsqueeze", real, g.constant([1, 2], np.int64))  # [batch, 1, 1, keys]
    allowed = g.op("And", causal, real)
    return g.op("Where", allowed, *(g.constant(bias, np.float32) for bias in (0.0, np.finfo(np.float32).min)))


def _causal_padding_bias(g: GraphBuilder, attention_mask: str) -> str:
    """Return what `causal_padding_bias` does, for all keys of a known number, by products: CoreML has few logics."""
    seq = g.sizes(attention_mask, 1)[0]
    real = g.op("Unsqueeze", g.op("Cast", attention_mask, to=TensorProto.FLOAT), g.constant([1, 2], np.int64))
    allowed = mul(g, real, g.constant(np.tril(np.ones((seq, seq))), np.float32))  # [batch, 1, seq, keys], 1 or 0
    one, most = g.constant(1.0, np.float32), g.constant(np.finfo(np.float32).max, np.float32)
    return mul(g, g.op("Sub", allowed, one), most)
