"""Qwen3 as a text encoder: three hidden states from the middle of the stack, side by side.

Source: transformers, models/qwen3/modeling_qwen3.py, and _get_qwen3_prompt_embeds of diffusers'
pipeline_flux2_klein.py.
"""

from __future__ import annotations

import numpy as np

from fluxonnx.checkpoint.config import Config
from fluxonnx.contract import MAX_SEQUENCE_LENGTH, OUT_LAYERS, TextEncoderConfig
from fluxonnx.errors import CheckpointError
from fluxonnx.export import ops
from fluxonnx.export.balance import Coupling, Reader, Writer
from fluxonnx.export.ops import ModelBuilder
from fluxonnx.ports import Ports

# cos and sin, f32 [positions, head_dim / 2]
RopeTable = tuple[np.ndarray, np.ndarray]

# Far beyond any model.
MAX_HEAD_DIM = 4096


def read_config(config: Config, out_layers: tuple[int, ...] | None = None) -> TextEncoderConfig:
    """Read and check text_encoder/config.json.

    Args:
        config: The file.
        out_layers: The hidden states to return, 0 being the embeddings; by default the 9th, 18th and 27th, or those at
            a quarter, a half and three quarters of a smaller stack.

    Raises:
        CheckpointError: A value is missing, malformed, or asks for something this model family does not have.
    """
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    config.expect("rope_scaling", None)
    rope = config.section("rope_parameters")
    rope.expect("rope_type", "default")
    heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f'{config.path}: "num_attention_heads" {heads} is not a multiple of "num_key_value_heads" {kv_heads}'
        )
    layers, hidden = config.integer("num_hidden_layers"), config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden // heads, MAX_HEAD_DIM)
    if head_dim % 2:
        raise CheckpointError(f'{config.path}: "head_dim" is {head_dim}, but rotary embeddings need an even size')
    if out_layers is None:
        out_layers = OUT_LAYERS if layers >= max(OUT_LAYERS) else tuple(layers * i // 4 for i in (1, 2, 3))
    if not all(0 <= layer <= layers for layer in out_layers):
        raise CheckpointError(
            f"{config.path}: hidden states {list(out_layers)} are asked for, but the model has {layers} layers"
        )
    return TextEncoderConfig(
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.integer("intermediate_size"),
        rope_theta=rope.number("rope_theta", config.number("rope_theta", 1_000_000, 1, 1e12), 1, 1e12),
        eps=config.number("rms_norm_eps", 1e-6, 0, 1),
        bias=config.flag("attention_bias", False),
        out_layers=out_layers,
    )


def needs_final_norm(c: TextEncoderConfig) -> bool:
    """Whether the last hidden state is wanted, which transformers returns normalised."""
    return c.layers in c.out_layers


def unused(c: TextEncoderConfig) -> tuple[str, ...]:
    """Return the name prefixes of the tensors that prompt_embeds do not depend on."""
    rest = tuple(f"model.layers.{i}." for i in range(max(c.out_layers), c.layers))
    return (*rest, "lm_head.weight", *(() if needs_final_norm(c) else ("model.norm.weight",)))


def couplings(c: TextEncoderConfig) -> list[Coupling]:
    """Return which channels lie between two layers and nothing else, so that they may be scaled."""
    found, kv_dim = [], c.kv_heads * c.head_dim
    for i in range(max(c.out_layers)):
        layer = f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        before, between = f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"
        value = Writer(f"{attn}.v_proj.weight", gain=before, bias=f"{attn}.v_proj.bias" if c.bias else None)
        up = Writer(f"{mlp}.up_proj.weight", gain=between, gate=(f"{mlp}.gate_proj.weight", 0))
        out = Reader(f"{attn}.o_proj.weight", repeat=c.heads // c.kv_heads, head_dim=c.head_dim)
        found += [
            Coupling(c.hidden, (Writer(before),), tuple(Reader(f"{attn}.{kind}_proj.weight") for kind in "qkv")),
            Coupling(c.hidden, (Writer(between),), tuple(Reader(f"{mlp}.{n}_proj.weight") for n in ("gate", "up"))),
            Coupling(kv_dim, (value,), (out,)),
            Coupling(c.intermediate, (up,), (Reader(f"{mlp}.down_proj.weight"),)),
        ]
    return found


def build(g: ModelBuilder, c: TextEncoderConfig, ports: Ports) -> None:
    """Add the text encoder to `g`."""
    input_ids, attention_mask = (g.input(port) for port in ports.inputs)
    with g.scope("model"):
        states = hidden_states(g, c, input_ids, attention_mask)
    g.output(ports.outputs[0], ops.concat(g, *(states[layer] for layer in c.out_layers), axis=-1))


def hidden_states(g: ModelBuilder, c: TextEncoderConfig, input_ids: str, attention_mask: str) -> list[str]:
    """Return the embeddings and the output of each layer up to the last one needed: f32 [batch, seq, hidden] each."""
    rope = rope_tables(c)
    positions = ops.token_positions(g, attention_mask, MAX_SEQUENCE_LENGTH)
    keys = ops.real_tokens(g, attention_mask, positions)
    bias = ops.causal_padding_bias(g, attention_mask, positions, keys)
    x = ops.embedding(g, input_ids, "embed_tokens", c.vocab, c.hidden)
    states = [x]
    for i in range(max(c.out_layers)):
        with g.scope("layers", i):
            x = decoder_layer(g, c, x, keys, bias, rope)
        states.append(x)
    if needs_final_norm(c):
        states[-1] = ops.rms_norm(g, x, "norm", c.hidden, c.eps)
    return states


def rope_tables(c: TextEncoderConfig) -> RopeTable:
    """Return the angles' cos and sin, rounded as Qwen3RotaryEmbedding does."""
    exponent = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
    frequency = np.float32(1) / np.float32(c.rope_theta) ** exponent
    angles = np.arange(MAX_SEQUENCE_LENGTH, dtype=np.float32)[:, None] * frequency
    return np.cos(angles), np.sin(angles)


def decoder_layer(g: ModelBuilder, c: TextEncoderConfig, x: str, keys: str | None, bias: str, rope: RopeTable) -> str:
    """[batch, seq, hidden] -> same."""
    normal = ops.rms_norm(g, x, "input_layernorm", c.hidden, c.eps)
    x = ops.add(g, x, self_attention(g, c, normal, keys, bias, rope))
    return ops.add(g, x, mlp(g, c, ops.rms_norm(g, x, "post_attention_layernorm", c.hidden, c.eps)))


def self_attention(g: ModelBuilder, c: TextEncoderConfig, x: str, keys: str | None, bias: str, rope: RopeTable) -> str:
    """Grouped-query attention over [batch, seq, hidden], of which only the first `keys` tokens are seen by any."""
    with g.scope("self_attn"):
        q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim
        q = ops.split_heads(g, ops.linear(g, x, "q_proj", c.hidden, q_dim, c.bias), c.head_dim)
        seen = ops.first_tokens(g, x, keys)
        k = ops.split_heads(g, ops.linear(g, seen, "k_proj", c.hidden, kv_dim, c.bias), c.head_dim)
        v = ops.linear(g, seen, "v_proj", c.hidden, kv_dim, c.bias)
        q = ops.rope_halves(g, ops.rms_norm(g, q, "q_norm", c.head_dim, c.eps), *rope)
        k = ops.rope_halves(g, ops.rms_norm(g, k, "k_norm", c.head_dim, c.eps), *rope)
        k, v = (ops.repeat_heads(g, t, c.kv_heads, c.heads // c.kv_heads, c.head_dim) for t in (k, v))
        mixed = ops.attention(g, q, k, v, c.head_dim, bias)
        return ops.linear(g, mixed, "o_proj", q_dim, c.hidden, c.bias)


def mlp(g: ModelBuilder, c: TextEncoderConfig, x: str) -> str:
    """[batch, seq, hidden] -> same."""
    with g.scope("mlp"):
        return ops.feed_forward(g, x, ["gate_proj", "up_proj"], "down_proj", c.hidden, c.intermediate)
