"""Flux2Transformer2DModel: joint text and image blocks, then single-stream ones.

Source: diffusers, models/transformers/transformer_flux2.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fluxonnx.checkpoint.config import Config
from fluxonnx.checkpoint.reading import shown
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import TransformerConfig
from fluxonnx.errors import CheckpointError
from fluxonnx.export import ops
from fluxonnx.export.balance import Coupling, Reader, Writer
from fluxonnx.export.initializers import float_rows
from fluxonnx.export.ops import ModelBuilder
from fluxonnx.ports import Ports

# The keys, rotated, and the values of some tokens in one block.
Kept = tuple[str, str]

# Sigmas at which the magnitude of a modulation is measured.
TIMESTEPS = np.linspace(0.05, 1, 8, dtype=np.float32)

# Far beyond any model.
MAX_HEAD_DIM = 4096
MAX_TIMESTEP_CHANNELS = 1 << 16


def read_config(config: Config) -> TransformerConfig:
    """Read and check transformer/config.json.

    Raises:
        CheckpointError: A value is missing, malformed, or asks for something this model family does not have.
    """
    config.expect("guidance_embeds", False, missing_ok=False)  # true is FLUX.2-dev: another graph contract
    config.expect("patch_size", 1)
    heads, head_dim = config.integer("num_attention_heads"), config.integer("attention_head_dim", None, MAX_HEAD_DIM)
    in_channels = config.integer("in_channels")
    axes = config.integers("axes_dims_rope", (32, 32, 32, 32))
    if len(axes) != 4 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise CheckpointError(
            f'{config.path}: "axes_dims_rope" is {shown(list(axes))}, expected four even sizes that add up to '
            f'"attention_head_dim" {head_dim}'
        )
    # The conditioning graph has no weights whose shapes would bound these sizes.
    timestep_channels = config.integer("timestep_guidance_channels", 256, MAX_TIMESTEP_CHANNELS)
    if timestep_channels % 2:
        raise CheckpointError(
            f'{config.path}: "timestep_guidance_channels" is {timestep_channels}, expected an even size'
        )
    return TransformerConfig(
        in_channels=in_channels,
        out_channels=config.integer("out_channels", in_channels),
        double_layers=config.integer("num_layers"),
        single_layers=config.integer("num_single_layers"),
        heads=heads,
        head_dim=head_dim,
        text_dim=config.integer("joint_attention_dim"),
        timestep_channels=timestep_channels,
        mlp_dim=int(heads * head_dim * config.number("mlp_ratio", 3.0, 0.01, 1000)),
        axes_dims=axes,
        rope_theta=config.number("rope_theta", 2000, 1, 1e12),
        eps=config.number("eps", 1e-6, 0, 1),
    )


def couplings(c: TransformerConfig) -> list[Coupling]:
    """Return which channels lie between two layers and nothing else, so that they may be scaled."""
    found = []
    for i in range(c.double_layers):
        block = f"transformer_blocks.{i}"
        values = tuple(Writer(f"{block}.attn.{name}.weight") for name in ("to_v", "add_v_proj"))
        readers = tuple(Reader(f"{block}.attn.{name}.weight") for name in ("to_out.0", "to_add_out"))
        found.append(Coupling(c.dim, values, readers))
        for name in ("ff", "ff_context"):
            inside = f"{block}.{name}.linear_in.weight"
            value = Writer(inside, start=c.mlp_dim, gate=(inside, 0))
            found.append(Coupling(c.mlp_dim, (value,), (Reader(f"{block}.{name}.linear_out.weight"),)))
    for i in range(c.single_layers):
        inside, out = (f"single_transformer_blocks.{i}.attn.{name}.weight" for name in ("to_qkv_mlp_proj", "to_out"))
        gate = 3 * c.dim
        value = Writer(inside, start=gate + c.mlp_dim, gate=(inside, gate))
        found += [
            Coupling(c.dim, (Writer(inside, start=2 * c.dim),), (Reader(out),)),
            Coupling(c.mlp_dim, (value,), (Reader(out, start=c.dim),)),
        ]
    double, single = (
        [f"{name}.{i}" for i in range(count)]
        for name, count in (("transformer_blocks", c.double_layers), ("single_transformer_blocks", c.single_layers))
    )
    qkv = ["attn.to_q", "attn.to_k", "attn.to_v"], ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    return [
        *found,
        *_modulated(c, "double_stream_modulation_img", double, qkv[0], ["ff.linear_in"]),
        *_modulated(c, "double_stream_modulation_txt", double, qkv[1], ["ff_context.linear_in"]),
        *_modulated(c, "single_stream_modulation", single, ["attn.to_qkv_mlp_proj"]),
    ]


def _modulated(c: TransformerConfig, name: str, blocks: Sequence[str], *sublayers: Sequence[str]) -> Iterator[Coupling]:
    """Couple the shift and the scale of each set of a modulation with the layers that read the modulated norm.

    All blocks share a modulation, so that each channel has one factor for all of them.
    """
    weight = f"{name}.linear.weight"
    for i, layers in enumerate(sublayers):
        shift, scale = (3 * i * c.dim, (3 * i + 1) * c.dim)
        readers = tuple(Reader(f"{block}.{layer}.weight") for block in blocks for layer in layers)
        writers = (Writer(weight, start=shift), Writer(weight, start=scale))
        if readers:
            yield Coupling(c.dim, writers, readers, partial(modulated_size, c, weight, shift, scale))


def modulated_size(
    c: TransformerConfig, weight: str, shift: int, scale: int, tensors: Mapping[str, Tensor]
) -> np.ndarray:
    """Return the magnitude of each channel of a modulated norm, float64 [dim].

    Modulations depend on nothing but the timestep: they are computed for some of them. The norm is taken to be normal.
    NaN where the weights of the embedding are not those that the config describes.
    """
    embedder = "time_guidance_embed.timestep_embedder"
    shapes = {
        f"{embedder}.linear_1.weight": (c.dim, c.timestep_channels),
        f"{embedder}.linear_2.weight": (c.dim, c.dim),
    }
    if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
        return np.full(c.dim, np.nan)
    half = c.timestep_channels // 2
    # get_timestep_embedding, diffusers embeddings.py
    angles = 1000 * TIMESTEPS[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
    temb = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    with np.errstate(all="ignore"):
        for name in shapes:
            temb = temb @ float_rows(tensors[name]).T
            temb = temb / (1 + np.exp(-temb))
        shifts, scales = (temb @ float_rows(tensors[weight], n, n + c.dim).T for n in (shift, scale))
        return np.sqrt(np.square(1 + scales).mean(0) + np.square(shifts).mean(0)).astype(np.float64)


@dataclass(frozen=True)
class Modulation:
    """AdaLN of one sublayer: its input is (one + scale) * norm(x) + shift, its output is multiplied by gate.

    `one` is 1, or scaled as `scale` and `shift` are.
    """

    shift: str
    scale: str
    gate: str
    one: np.ndarray


def build(g: ModelBuilder, c: TransformerConfig, ports: Ports) -> None:
    """Add the transformer to `g`."""
    image, text, timestep, cos, sin = (g.input(port) for port in ports.inputs)
    g.output(ports.outputs[0], transformer(g, c, image, text, timestep, ops.rope_table(g, cos, sin, text, image)))


def build_cached(g: ModelBuilder, c: TransformerConfig, ports: Ports) -> None:
    """Add the transformer that attends to references by their keys and values, of `build_references`, to `g`."""
    image, text, timestep, cos, sin, *kept = (g.input(port) for port in ports.inputs)
    rope = ops.rope_table(g, cos, sin, text, image)
    pairs = list(zip(kept[::2], kept[1::2], strict=True))
    g.output(ports.outputs[0], transformer(g, c, image, text, timestep, rope, pairs))


def build_references(g: ModelBuilder, c: TransformerConfig, ports: Ports) -> None:
    """Add the pass over reference tokens, of which each block's keys and values are kept, to `g`."""
    image, timestep, cos, sin = (g.input(port) for port in ports.inputs)
    kept = [value for pair in references(g, c, image, timestep, ops.rope_table(g, cos, sin)) for value in pair]
    for port, value in zip(ports.outputs, kept, strict=True):
        g.output(port, ops.kept_heads(g, value, c.dim))


def transformer(
    g: ModelBuilder,
    c: TransformerConfig,
    image: str,
    text: str,
    timestep: str,
    rope: tuple[str, str],
    kept: Sequence[Kept] = (),
) -> str:
    """Return the velocity [batch, image_seq, out_channels]; `kept` are those of references in each block, if any."""
    temb = ops.silu(g, timestep_embedding(g, c, timestep))
    image_mods = modulation(g, c, "double_stream_modulation_img", temb, sets=2)
    text_mods = modulation(g, c, "double_stream_modulation_txt", temb, sets=2)
    (single_mod,) = modulation(g, c, "single_stream_modulation", temb, sets=1)

    text_seq = ops.size_of(g, text, 1)
    image = ops.linear(g, image, "x_embedder", c.in_channels, c.dim)
    text = ops.linear(g, text, "context_embedder", c.text_dim, c.dim)
    for i in range(c.double_layers):
        with g.scope("transformer_blocks", i):
            beside = kept[i] if kept else None
            image, text = double_block(g, c, image, text, image_mods, text_mods, rope, text_seq, beside)

    tokens = ops.concat(g, text, image, axis=1)
    for i in range(c.single_layers):
        last = i == c.single_layers - 1
        with g.scope("single_transformer_blocks", i):
            beside = kept[c.double_layers + i] if kept else None
            tokens, _ = single_block(g, c, tokens, single_mod, rope, text_seq if last else None, beside)

    image = tokens
    with g.scope("norm_out"):
        # scale comes first here, unlike in the modulations (AdaLayerNormContinuous, diffusers normalization.py)
        scale, shift = per_token(g, ops.linear_chunks(g, temb, "linear", c.dim, c.dim, count=2))
        image = ops.modulate(g, ops.layer_norm(g, image, c.dim, c.eps), scale, shift)
    return ops.linear(g, image, "proj_out", c.dim, c.out_channels)


def timestep_embedding(g: ModelBuilder, c: TransformerConfig, timestep: str) -> str:
    """[batch, features] -> [batch, dim]."""
    with g.scope("time_guidance_embed"), g.scope("timestep_embedder"):
        hidden = ops.silu(g, ops.linear(g, timestep, "linear_1", c.timestep_channels, c.dim))
        return ops.linear(g, hidden, "linear_2", c.dim, c.dim)


def per_token(g: ModelBuilder, values: list[str]) -> list[str]:
    """[batch, n] -> [batch, 1, n] each, to broadcast over tokens."""
    return [g.op("Unsqueeze", value, g.constant([1], np.int64)) for value in values]


def modulation(g: ModelBuilder, c: TransformerConfig, name: str, temb: str, sets: int) -> list[Modulation]:
    """Return the modulations of one stream, shared by all its blocks; `temb` [batch, dim] has been through silu."""
    with g.scope(name):
        parts = per_token(g, ops.linear_chunks(g, temb, "linear", c.dim, c.dim, count=3 * sets))
        ones = ops.ones_beside(g, "linear", c.dim, c.dim, count=3 * sets)
    # shift, scale and gate of each set; the one is beside the scale
    return [Modulation(parts[i], parts[i + 1], parts[i + 2], ones[i + 1]) for i in range(0, 3 * sets, 3)]


def modulated_norm(g: ModelBuilder, c: TransformerConfig, x: str, mod: Modulation, name: str) -> str:
    """Return (1 + scale) * layer_norm(x) + shift."""
    with g.scope(name):
        return ops.modulate(g, ops.layer_norm(g, x, c.dim, c.eps), mod.scale, mod.shift, mod.one)


def double_block(
    g: ModelBuilder,
    c: TransformerConfig,
    image: str,
    text: str,
    image_mods: list[Modulation],
    text_mods: list[Modulation],
    rope: tuple[str, str],
    text_seq: str,
    kept: Kept | None = None,
) -> tuple[str, str]:
    """Attend jointly, then a feed-forward for each stream: image and text [batch, seq, dim]."""
    image_in = modulated_norm(g, c, image, image_mods[0], "norm1")
    text_in = modulated_norm(g, c, text, text_mods[0], "norm1_context")
    image_out, text_out = joint_attention(g, c, image_in, text_in, rope, text_seq, kept)
    image = gated_add(g, image, image_mods[0], image_out)
    text = gated_add(g, text, text_mods[0], text_out)

    image_out = feed_forward(g, c, modulated_norm(g, c, image, image_mods[1], "norm2"), "ff")
    text_out = feed_forward(g, c, modulated_norm(g, c, text, text_mods[1], "norm2_context"), "ff_context")
    return gated_add(g, image, image_mods[1], image_out), gated_add(g, text, text_mods[1], text_out)


def gated_add(g: ModelBuilder, x: str, mod: Modulation, update: str) -> str:
    """Return x + gate * update."""
    return ops.add(g, x, ops.mul(g, mod.gate, update))


def joint_attention(
    g: ModelBuilder,
    c: TransformerConfig,
    image: str,
    text: str,
    rope: tuple[str, str],
    text_seq: str,
    kept: Kept | None,
) -> tuple[str, str]:
    """Let all text and image tokens attend to each other, and to `kept`; each stream has its own projections."""
    with g.scope("attn"):
        layers = [(text, f"add_{kind}_proj") for kind in "qkv"] + [(image, f"to_{kind}") for kind in "qkv"]
        projections = ops.head_projections(g, layers, c.dim, c.dim, c.head_dim)
        text_q, text_k, text_v, image_q, image_k, image_v = projections
        q = ops.concat(g, heads(g, c, text_q, "norm_added_q"), heads(g, c, image_q, "norm_q"), axis=1)
        k = ops.concat(g, heads(g, c, text_k, "norm_added_k"), heads(g, c, image_k, "norm_k"), axis=1)
        v = ops.concat(g, text_v, image_v, axis=1)
        q, k = (ops.rope_interleaved(g, value, rope) for value in (q, k))
        mixed = ops.attention(g, q, *beside_kept(g, (k, v), kept), c.head_dim)
        text_out = ops.rows_from(g, mixed, 0, text_seq, "text_seq")
        image_out = rows_of_image(g, mixed, text_seq)
        return (
            ops.linear(g, image_out, "to_out.0", c.dim, c.dim),
            ops.linear(g, text_out, "to_add_out", c.dim, c.dim),
        )


def beside_kept(g: ModelBuilder, own: Kept, kept: Kept | None) -> Kept:
    """Return keys and values, and behind them those of references: the order of keys makes no difference."""
    if kept is None:
        return own
    keys, values = (ops.beside_kept(g, mine, others) for mine, others in zip(own, kept, strict=True))
    return keys, values


def rows_of_image(g: ModelBuilder, x: str, text_seq: str, axis: int = 1) -> str:
    """Return the rows behind the rows of the text."""
    return ops.rows_from(g, x, text_seq, np.iinfo(np.int64).max, "image_seq", axis)


def heads(g: ModelBuilder, c: TransformerConfig, x: str, norm: str) -> str:
    """[batch, seq, heads * head_dim] -> [batch, seq, heads, head_dim], normalised per head."""
    return ops.rms_norm(g, ops.split_heads(g, x, c.head_dim), norm, c.head_dim, c.eps)


def feed_forward(g: ModelBuilder, c: TransformerConfig, x: str, name: str) -> str:
    """[batch, seq, dim] -> same."""
    with g.scope(name):
        return ops.feed_forward(g, x, ["linear_in"], "linear_out", c.dim, c.mlp_dim)


def single_block(
    g: ModelBuilder,
    c: TransformerConfig,
    x: str,
    mod: Modulation,
    rope: tuple[str, str],
    text_seq: str | None,
    kept: Kept | None = None,
) -> tuple[str, Kept]:
    """Attention and feed-forward side by side, sharing one projection in and one out.

    Args:
        g: The graph.
        c: Its sizes.
        x: [batch, seq, dim].
        mod: The modulation.
        rope: The tables of all tokens.
        text_seq: The number of text tokens, int64 [1], if only the tokens behind them are wanted; else None.
        kept: What the tokens attend to besides; None for nothing.

    Returns:
        [batch, seq, dim] of the wanted tokens, which attend to all tokens, and the keys and values of all.
    """
    normal = modulated_norm(g, c, x, mod, "norm")
    wanted, rope_of_wanted = normal, rope
    if text_seq is not None:
        x, wanted = (rows_of_image(g, value, text_seq) for value in (x, normal))
        cos, sin = (rows_of_image(g, table, text_seq, axis=0) for table in rope)
        rope_of_wanted = cos, sin
    with g.scope("attn"):
        q, k, v, gate, value = ops.qkv_and_gate(
            g, wanted, normal, "to_qkv_mlp_proj", c.dim, c.dim, c.mlp_dim, c.head_dim
        )
        q = ops.rope_interleaved(g, heads(g, c, q, "norm_q"), rope_of_wanted)
        k = ops.rope_interleaved(g, heads(g, c, k, "norm_k"), rope)
        mixed = ops.attention(g, q, *beside_kept(g, (k, v), kept), c.head_dim)
        update = ops.linear(g, [mixed, ops.swiglu(g, gate, value)], "to_out", [c.dim, c.mlp_dim], c.dim)
    return gated_add(g, x, mod, update), (k, v)


def references(g: ModelBuilder, c: TransformerConfig, image: str, timestep: str, rope: tuple[str, str]) -> list[Kept]:
    """Return the keys and values of reference tokens [batch, reference_seq, in_channels] in each block.

    They attend to nothing but themselves, and `timestep` is that of 0: so they depend on no prompt and on no step.

    Source: Flux2KVAttnProcessor and Flux2Transformer2DModel.forward with kv_cache_mode="extract".
    """
    temb = ops.silu(g, timestep_embedding(g, c, timestep))
    mods = modulation(g, c, "double_stream_modulation_img", temb, sets=2)
    (single_mod,) = modulation(g, c, "single_stream_modulation", temb, sets=1)
    tokens = ops.linear(g, image, "x_embedder", c.in_channels, c.dim)
    found: list[Kept] = []
    for i in range(c.double_layers):
        with g.scope("transformer_blocks", i):
            tokens, kept = lone_double_block(g, c, tokens, mods, rope)
            found.append(kept)
    for i in range(c.single_layers - 1):
        with g.scope("single_transformer_blocks", i):
            tokens, kept = single_block(g, c, tokens, single_mod, rope, None)
            found.append(kept)
    with g.scope("single_transformer_blocks", c.single_layers - 1):
        normal = modulated_norm(g, c, tokens, single_mod, "norm")
        with g.scope("attn"):
            k, v = ops.keys_and_values(g, normal, "to_qkv_mlp_proj", c.dim, c.dim, c.mlp_dim, c.head_dim)
            found.append((ops.rope_interleaved(g, heads(g, c, k, "norm_k"), rope), v))
    return found


def lone_double_block(
    g: ModelBuilder, c: TransformerConfig, image: str, mods: list[Modulation], rope: tuple[str, str]
) -> tuple[str, Kept]:
    """Return the image stream of a `double_block` that attends to itself only, and its keys and values."""
    normal = modulated_norm(g, c, image, mods[0], "norm1")
    with g.scope("attn"):
        layers = [(normal, f"to_{kind}") for kind in "qkv"]
        q, k, v = ops.head_projections(g, layers, c.dim, c.dim, c.head_dim)
        q, k = (ops.rope_interleaved(g, heads(g, c, x, f"norm_{kind}"), rope) for x, kind in ((q, "q"), (k, "k")))
        update = ops.linear(g, ops.attention(g, q, k, v, c.head_dim), "to_out.0", c.dim, c.dim)
    image = gated_add(g, image, mods[0], update)
    update = feed_forward(g, c, modulated_norm(g, c, image, mods[1], "norm2"), "ff")
    return gated_add(g, image, mods[1], update), (k, v)
