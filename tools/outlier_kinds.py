"""The kinds of outliers that `tools/outliers.py` puts into a checkpoint, as edits of tensors.

Sources of what lies between two weights: transformers modeling_qwen3.py; diffusers transformer_flux2.py,
autoencoder_kl_flux2.py.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fluxonnx.checkpoint.directory import Checkpoint, weight_files
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.contract import Architecture, TextEncoderConfig, TransformerConfig, VaeConfig
from fluxonnx.errors import UsageError

# Where "modulation" preserves the function by default: close enough for the fastest of the timestep's sinusoids.
SIGMAS = tuple(np.linspace(0.0, 1.0, 2001).tolist())


@dataclass(frozen=True)
class Edit:
    """Multiply rows (axis 0) or columns (axis 1) of one tensor by a factor; then add `added` to each of these rows."""

    tensor: str
    axis: int
    indices: np.ndarray
    factor: float
    added: np.ndarray | None = None

    def apply(self, piece: np.ndarray, first_row: int) -> None:
        """Change float32 rows `first_row` and following in place."""
        if self.axis == 1:
            piece[:, self.indices] *= np.float32(self.factor)
            return
        rows = self.indices[(self.indices >= first_row) & (self.indices < first_row + len(piece))] - first_row
        piece[rows] *= np.float32(self.factor)
        if self.added is not None:
            piece[rows] += self.added.astype(np.float32)


@dataclass(frozen=True)
class Request:
    """What is wanted, and the means to choose channels."""

    checkpoint: Checkpoint
    sizes: Architecture
    channels: int
    scale: float
    seed: int
    token: int | None
    sigmas: tuple[float, ...]

    def choose(self, name: str, count: int) -> np.ndarray:
        """Draw channels out of `count`; another name, others."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return np.sort(rng.permutation(count)[: self.channels])

    def pair(self, make: Iterable[str], read: Iterable[str], made: np.ndarray, used: np.ndarray) -> Iterator[Edit]:
        """Multiply rows `made` of the tensors `make`, and divide columns `used` of the tensors `read`."""
        for name in make:
            yield Edit(name, 0, made, self.scale)
        for name in read:
            yield Edit(name, 1, used, 1 / self.scale)


# The text encoder


def _layers(c: TextEncoderConfig) -> list[str]:
    return [f"model.layers.{i}" for i in range(max(c.out_layers))]


def encoder_norm_gains(r: Request) -> Iterator[Edit]:
    """Gains of the two RMS norms of each layer; the linears behind read the channel."""
    c = r.sizes.text_encoder
    for layer in _layers(c):
        readers = {
            "input_layernorm": [f"self_attn.{kind}_proj.weight" for kind in "qkv"],
            "post_attention_layernorm": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        }
        for norm, linears in readers.items():
            chosen = r.choose(f"{layer}.{norm}", c.hidden)
            yield from r.pair([f"{layer}.{norm}.weight"], [f"{layer}.{name}" for name in linears], chosen, chosen)


def encoder_values(r: Request) -> Iterator[Edit]:
    """Rows of v; every query head that reads the value head (grouped queries) has its columns in o."""
    c = r.sizes.text_encoder
    times = c.heads // c.kv_heads
    for layer in _layers(c):
        attention = f"{layer}.self_attn"
        rows = r.choose(attention, c.kv_heads * c.head_dim)
        head, channel = np.divmod(rows, c.head_dim)
        columns = ((head[:, None] * times + np.arange(times)) * c.head_dim + channel[:, None]).ravel()
        make = [f"{attention}.v_proj.weight", *([f"{attention}.v_proj.bias"] if c.bias else [])]
        yield from r.pair(make, [f"{attention}.o_proj.weight"], rows, columns)


def encoder_swiglu(r: Request) -> Iterator[Edit]:
    """Rows of up, columns of down: silu(gate) * up is linear in up."""
    c = r.sizes.text_encoder
    for layer in _layers(c):
        chosen = r.choose(f"{layer}.mlp", c.intermediate)
        yield from r.pair([f"{layer}.mlp.up_proj.weight"], [f"{layer}.mlp.down_proj.weight"], chosen, chosen)


def encoder_query_key(r: Request) -> Iterator[Edit]:
    """Gains of q_norm against those of k_norm, for both channels (i, i + half) of a rotary pair.

    The rows of q and k themselves are no outliers to attention: q_norm and k_norm undo what is common to a head, and a
    single row changes their result.
    """
    c = r.sizes.text_encoder
    for layer in _layers(c):
        first = r.choose(f"{layer}.query-key", c.head_dim // 2)
        both = np.concatenate([first, first + c.head_dim // 2])
        yield Edit(f"{layer}.self_attn.q_norm.weight", 0, both, r.scale)
        yield Edit(f"{layer}.self_attn.k_norm.weight", 0, both, 1 / r.scale)


def _token(r: Request) -> int:
    """Return the token of every prompt's beginning, unless another one is asked for."""
    vocab = r.sizes.text_encoder.vocab
    if r.token is None:
        path = r.checkpoint.root / "tokenizer/tokenizer.json"
        added = json.loads(path.read_text("utf-8")).get("added_tokens", [])
        return next((entry["id"] for entry in added if entry["content"] == "<|im_start|>"), 0)
    if not 0 <= r.token < vocab:
        raise UsageError(f"token {r.token} is not in the vocabulary: choose 0 to {vocab - 1}")
    return r.token


def encoder_token(r: Request) -> Iterator[Edit]:
    """The whole embedding of one token: its residual stream is `scale` times that of the others."""
    yield Edit("model.embed_tokens.weight", 0, np.array([_token(r)]), r.scale)


def encoder_massive(r: Request) -> Iterator[Edit]:
    """A few channels of the embedding of one token, as the massive activations of trained models are."""
    hidden, token = r.sizes.text_encoder.hidden, _token(r)
    chosen = r.choose("massive", hidden)
    added = np.zeros(hidden)
    added[chosen] = r.scale * np.random.default_rng(r.seed).choice([-1.0, 1.0], len(chosen)) * _rms(r, token)
    yield Edit("model.embed_tokens.weight", 0, np.array([token]), 1.0, added)


def _rms(r: Request, token: int) -> float:
    row = r.checkpoint.tensors("text_encoder")["model.embed_tokens.weight"].array()[token].astype(np.float64)
    return float(np.sqrt(np.mean(row * row)))


# The transformer


def _doubles(c: TransformerConfig) -> list[str]:
    return [f"transformer_blocks.{i}" for i in range(c.double_layers)]


def _singles(c: TransformerConfig) -> list[str]:
    return [f"single_transformer_blocks.{i}.attn" for i in range(c.single_layers)]


def transformer_values(r: Request) -> Iterator[Edit]:
    """Rows of v of both streams, which attention mixes; columns of both output layers."""
    c = r.sizes.transformer
    for block in _doubles(c):
        chosen = r.choose(f"{block}.attn", c.dim)
        make, read = (
            [f"{block}.attn.{name}.weight" for name in names]
            for names in (("to_v", "add_v_proj"), ("to_out.0", "to_add_out"))
        )
        yield from r.pair(make, read, chosen, chosen)
    for block in _singles(c):
        chosen = r.choose(f"{block}.values", c.dim)
        yield from r.pair([f"{block}.to_qkv_mlp_proj.weight"], [f"{block}.to_out.weight"], 2 * c.dim + chosen, chosen)


def transformer_swiglu(r: Request) -> Iterator[Edit]:
    """Rows of the value half behind the gate; columns of the layer behind."""
    c = r.sizes.transformer
    for block in _doubles(c):
        for part in ("ff", "ff_context"):
            chosen = r.choose(f"{block}.{part}", c.mlp_dim)
            make, read = (f"{block}.{part}.linear_{end}.weight" for end in ("in", "out"))
            yield from r.pair([make], [read], c.mlp_dim + chosen, chosen)
    for block in _singles(c):
        chosen = r.choose(f"{block}.mlp", c.mlp_dim)
        make, read = f"{block}.to_qkv_mlp_proj.weight", f"{block}.to_out.weight"
        yield from r.pair([make], [read], 3 * c.dim + c.mlp_dim + chosen, c.dim + chosen)


def transformer_query_key(r: Request) -> Iterator[Edit]:
    """Gains of the query norms of both streams against those of the key norms, for rotary pairs (2i, 2i + 1)."""
    c = r.sizes.transformer
    for block in (*(f"{name}.attn" for name in _doubles(c)), *_singles(c)):
        first = 2 * r.choose(f"{block}.query-key", c.head_dim // 2)
        both = np.concatenate([first, first + 1])
        added = ("", "added_") if block.startswith("transformer_blocks") else ("",)
        for stream in added:
            yield Edit(f"{block}.norm_{stream}q.weight", 0, both, r.scale)
            yield Edit(f"{block}.norm_{stream}k.weight", 0, both, 1 / r.scale)


def _modulated(c: TransformerConfig) -> Iterator[tuple[str, int, list[str], list[str]]]:
    """Yield each modulation: its tensor, its set, the layers that read the modulated norm, those behind its gate."""
    streams = {
        "double_stream_modulation_img": (["attn.to_q", "attn.to_k", "attn.to_v"], ["attn.to_out.0"], "ff"),
        "double_stream_modulation_txt": (
            [f"attn.add_{kind}_proj" for kind in "qkv"],
            ["attn.to_add_out"],
            "ff_context",
        ),
    }
    for name, (readers, makers, ff) in streams.items():
        sets = [(readers, makers), ([f"{ff}.linear_in"], [f"{ff}.linear_out"])]
        for i, parts in enumerate(sets):
            read, make = ([f"{block}.{layer}.weight" for block in _doubles(c) for layer in part] for part in parts)
            yield f"{name}.linear.weight", i, read, make
    read, make = ([f"{block}.{name}.weight" for block in _singles(c)] for name in ("to_qkv_mlp_proj", "to_out"))
    yield "single_stream_modulation.linear.weight", 0, read, make


def transformer_gates(r: Request) -> Iterator[Edit]:
    """Rows of the modulations' gates, against the rows of the layers that they multiply (in all blocks)."""
    c = r.sizes.transformer
    for name, i, _, makers in _modulated(c):
        chosen = r.choose(f"{name}.{i}.gate", c.dim)
        yield Edit(name, 0, (3 * i + 2) * c.dim + chosen, r.scale)
        for maker in makers:
            yield Edit(maker, 0, chosen, 1 / r.scale)


def transformer_modulation(r: Request) -> Iterator[Edit]:
    """Rows of the modulations' shifts and scales, against the columns of the layers behind (in all blocks).

    The norm is multiplied by 1 + scale, and the 1 has no weight. s * (1 + scale) - 1 = s * scale + (s - 1) needs a
    constant, which the layer lacks (no bias); a row w with w . temb = 1 at the wanted sigmas stands for it. For a few
    sigmas there is one. For all of [0, 1] the best one makes an error of 3e-4 on the bundled model, of 2e-5 at full
    width, and of 3e-3 where 128 wide layers are random.
    """
    c = r.sizes.transformer
    one = _constant_row(r)
    for name, i, readers, _ in _modulated(c):
        chosen = r.choose(f"{name}.{i}", c.dim)
        yield Edit(name, 0, 3 * i * c.dim + chosen, r.scale)
        yield Edit(name, 0, (3 * i + 1) * c.dim + chosen, r.scale, (r.scale - 1) * one)
        for reader in readers:
            yield Edit(reader, 1, chosen, 1 / r.scale)


def _constant_row(r: Request) -> np.ndarray:
    """Return w with w . silu(temb(sigma)) = 1 at all sigmas, the smallest that fits: float64 [dim]."""
    c, tensors = r.sizes.transformer, r.checkpoint.tensors("transformer")
    first, second = (
        tensors[f"time_guidance_embed.timestep_embedder.linear_{i}.weight"].array().astype(np.float64) for i in (1, 2)
    )
    half = c.timestep_channels // 2
    # Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0), diffusers embeddings.py
    angles = 1000 * np.array(r.sigmas)[:, None] * np.exp(-math.log(10000) * np.arange(half) / half)
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    temb = _silu(_silu(features @ first.T) @ second.T)
    return np.linalg.lstsq(temb, np.ones(len(r.sigmas)), rcond=1e-4)[0]


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def transformer_residual(r: Request) -> Iterator[Edit]:
    """Channels of both embedders, so of the residual stream.

    There is no exact form: a LayerNorm reads all channels together, so a larger one changes what it makes of the rest.
    """
    c = r.sizes.transformer
    chosen = r.choose("residual", c.dim)
    for name in ("x_embedder", "context_embedder"):
        yield Edit(f"{name}.weight", 0, chosen, r.scale)


# The autoencoder


def _both(names: Iterable[str]) -> list[str]:
    return [f"{name}.{end}" for name in names for end in ("weight", "bias")]


def _attentions(c: VaeConfig) -> list[tuple[str, int]]:
    ends = (("encoder", c.encoder_channels[-1]), ("decoder", c.decoder_channels[-1]))
    return [(f"{end}.mid_block.attentions.0", width) for end, width in ends if c.mid_attention]


def vae_norm_gains(r: Request) -> Iterator[Edit]:
    """Gains and shifts of the attention's group norm, which no SiLU follows, unlike the others."""
    for name, width in _attentions(r.sizes.vae):
        chosen = r.choose(f"{name}.group_norm", width)
        readers = [f"{name}.to_{kind}.weight" for kind in "qkv"]
        yield from r.pair(_both([f"{name}.group_norm"]), readers, chosen, chosen)


def vae_values(r: Request) -> Iterator[Edit]:
    """Rows of v and its bias, columns of the attention's output layer."""
    for name, width in _attentions(r.sizes.vae):
        chosen = r.choose(f"{name}.values", width)
        yield from r.pair(_both([f"{name}.to_v"]), [f"{name}.to_out.0.weight"], chosen, chosen)


def vae_query_key(r: Request) -> Iterator[Edit]:
    """Rows of q against those of k, with their biases: no norm lies between them and the scores."""
    for name, width in _attentions(r.sizes.vae):
        chosen = r.choose(f"{name}.query-key", width)
        for kind, factor in (("q", r.scale), ("k", 1 / r.scale)):
            for tensor in _both([f"{name}.to_{kind}"]):
                yield Edit(tensor, 0, chosen, factor)


def vae_convolutions(r: Request) -> Iterator[Edit]:
    """Channels between two convolutions with nothing between them: at the latents, on both sides.

    The padding of the second one is zero, so it stays what it was.
    """
    c = r.sizes.vae
    if c.quant_conv:
        chosen = r.choose("quant_conv", 2 * c.latent_channels)
        yield from r.pair(_both(["encoder.conv_out"]), ["quant_conv.weight"], chosen, chosen)
    if c.post_quant_conv:
        chosen = r.choose("post_quant_conv", c.latent_channels)
        yield from r.pair(_both(["post_quant_conv"]), ["decoder.conv_in.weight"], chosen, chosen)


def vae_activations(r: Request) -> Iterator[Edit]:
    """Gains and shifts of the norms before SiLU and convolution, against the convolution's columns.

    No exact form: SiLU is not linear. silu(s * x) / s is relu(x) for a large s.
    """
    names = {name for path in weight_files(r.checkpoint.root / "vae")[1] for name in read_header(path)}
    for norm in sorted(
        name.removesuffix(".weight") for name in names if name.endswith(("norm1.weight", "norm2.weight"))
    ):
        reader = f"{norm[:-5]}conv{norm[-1]}.weight"
        chosen = r.choose(norm, r.checkpoint.tensors("vae")[f"{norm}.weight"].shape[0])
        yield from r.pair(_both([norm]), [reader], chosen, chosen)


# For each kind the parts of the model that have it; the kinds in EXACT preserve the function.
KINDS: dict[str, dict[str, Callable[[Request], Iterator[Edit]]]] = {
    "norm-gains": {"text_encoder": encoder_norm_gains, "vae": vae_norm_gains},
    "values": {"text_encoder": encoder_values, "transformer": transformer_values, "vae": vae_values},
    "swiglu": {"text_encoder": encoder_swiglu, "transformer": transformer_swiglu},
    "query-key": {"text_encoder": encoder_query_key, "transformer": transformer_query_key, "vae": vae_query_key},
    "gates": {"transformer": transformer_gates},
    "modulation": {"transformer": transformer_modulation},
    "convolutions": {"vae": vae_convolutions},
    "token": {"text_encoder": encoder_token},
    "massive": {"text_encoder": encoder_massive},
    "residual": {"transformer": transformer_residual},
    "activations": {"vae": vae_activations},
}
EXACT = ("norm-gains", "values", "swiglu", "query-key", "gates", "modulation", "convolutions")
