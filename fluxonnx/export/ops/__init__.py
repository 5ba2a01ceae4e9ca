"""The vocabulary of the model files, lowered to ONNX operators here and nowhere else.

Values are float32 unless a shape comment says otherwise. The `ort` flavour uses onnxruntime's fused operators where
they win; the `portable` flavour only ai.onnx ones. The layout of columns and the precision stay behind these functions.
"""

from fluxonnx.export.ops.attention import (
    attention,
    causal_padding_bias,
    first_tokens,
    merge_heads,
    real_tokens,
    repeat_heads,
    rope_halves,
    rope_interleaved,
    rope_table,
    split_heads,
    token_positions,
)
from fluxonnx.export.ops.bands import Picture, added, divided, gathered, whole
from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.ops.image import (
    conv,
    first_channels,
    group_norm,
    norm_conv,
    patchify,
    unpatchify,
    upsample_conv,
)
from fluxonnx.export.ops.linear import (
    beside_kept,
    embedding,
    feed_forward,
    head_projections,
    kept_heads,
    keys_and_values,
    linear,
    linear_chunks,
    qkv_and_gate,
    swiglu,
)
from fluxonnx.export.ops.norm import layer_norm, modulate, ones_beside, rms_norm, silu
from fluxonnx.export.panels import Slices
from fluxonnx.export.primitives import add, concat, mul, reshape, rows_from, size_of, split

__all__ = [
    "ModelBuilder",
    "Picture",
    "Slices",
    "add",
    "added",
    "attention",
    "beside_kept",
    "causal_padding_bias",
    "concat",
    "conv",
    "divided",
    "embedding",
    "feed_forward",
    "first_channels",
    "first_tokens",
    "gathered",
    "group_norm",
    "head_projections",
    "kept_heads",
    "keys_and_values",
    "layer_norm",
    "linear",
    "linear_chunks",
    "merge_heads",
    "modulate",
    "mul",
    "norm_conv",
    "ones_beside",
    "patchify",
    "qkv_and_gate",
    "real_tokens",
    "repeat_heads",
    "reshape",
    "rms_norm",
    "rope_halves",
    "rope_interleaved",
    "rope_table",
    "rows_from",
    "silu",
    "size_of",
    "split",
    "split_heads",
    "swiglu",
    "token_positions",
    "unpatchify",
    "upsample_conv",
    "whole",
]
