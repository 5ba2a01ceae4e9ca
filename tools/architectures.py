"""Sizes of FLUX.2-klein-like models, and the configs and tensor shapes they imply.

Written from the architecture, not from the exporter, so that each checks the other. Sources: the config files of
black-forest-labs/FLUX.2-klein-4B; diffusers transformer_flux2.py, autoencoder_kl_flux2.py; transformers
modeling_qwen3.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TextEncoderSize:
    """Sizes of a Qwen3 text encoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 384
    tied: bool = True
    bias: bool = False

    def config(self, dtype: str) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": self.bias,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 40960,
            "max_window_layers": self.layers,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }

    def shapes(self) -> Shapes:
        """Return every tensor's shape."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            projections = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
            for name, heads in projections.items():
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (heads * self.head_dim, self.hidden)
                if self.bias:
                    shapes[f"{layer}.self_attn.{name}_proj.bias"] = (heads * self.head_dim,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (self.hidden, self.heads * self.head_dim)
            if self.bias:
                shapes[f"{layer}.self_attn.o_proj.bias"] = (self.hidden,)
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{name}.weight"] = (self.head_dim,)
            for name in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.{name}.weight"] = (self.intermediate, self.hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{name}.weight"] = (self.hidden,)
        return shapes


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of a Flux2Transformer2DModel."""

    heads: int
    head_dim: int
    double_layers: int
    single_layers: int
    text_dim: int
    in_channels: int
    axes: tuple[int, int, int, int]
    mlp_ratio: float = 3.0
    timestep_channels: int = 256

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "_class_name": "Flux2Transformer2DModel",
            "_diffusers_version": "0.37.0.dev0",
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": list(self.axes),
            "eps": 1e-06,
            "guidance_embeds": False,
            "in_channels": self.in_channels,
            "joint_attention_dim": self.text_dim,
            "mlp_ratio": self.mlp_ratio,
            "num_attention_heads": self.heads,
            "num_layers": self.double_layers,
            "num_single_layers": self.single_layers,
            "out_channels": None,
            "patch_size": 1,
            "rope_theta": 2000,
            "timestep_guidance_channels": self.timestep_channels,
        }

    def shapes(self) -> Shapes:
        """Return every tensor's shape."""
        dim = self.heads * self.head_dim
        mlp = int(dim * self.mlp_ratio)
        shapes: Shapes = {
            "time_guidance_embed.timestep_embedder.linear_1.weight": (dim, self.timestep_channels),
            "time_guidance_embed.timestep_embedder.linear_2.weight": (dim, dim),
            "double_stream_modulation_img.linear.weight": (6 * dim, dim),
            "double_stream_modulation_txt.linear.weight": (6 * dim, dim),
            "single_stream_modulation.linear.weight": (3 * dim, dim),
            "x_embedder.weight": (dim, self.in_channels),
            "context_embedder.weight": (dim, self.text_dim),
            "norm_out.linear.weight": (2 * dim, dim),
            "proj_out.weight": (self.in_channels, dim),
        }
        for i in range(self.double_layers):
            block = f"transformer_blocks.{i}"
            square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
            for name in square:
                shapes[f"{block}.attn.{name}.weight"] = (dim, dim)
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                shapes[f"{block}.attn.{name}.weight"] = (self.head_dim,)
            for name in ("ff", "ff_context"):
                shapes[f"{block}.{name}.linear_in.weight"] = (2 * mlp, dim)
                shapes[f"{block}.{name}.linear_out.weight"] = (dim, mlp)
        for i in range(self.single_layers):
            block = f"single_transformer_blocks.{i}.attn"
            shapes[f"{block}.to_qkv_mlp_proj.weight"] = (3 * dim + 2 * mlp, dim)
            shapes[f"{block}.to_out.weight"] = (dim, dim + mlp)
            for name in ("norm_q", "norm_k"):
                shapes[f"{block}.{name}.weight"] = (self.head_dim,)
        return shapes


@dataclass(frozen=True)
class VaeSize:
    """Sizes of an AutoencoderKLFlux2."""

    channels: tuple[int, ...]
    latent_channels: int = 32
    layers_per_block: int = 2
    groups: int = 32
    decoder_channels: tuple[int, ...] | None = None
    quant_convs: bool = True
    mid_attention: bool = True

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        blocks = len(self.channels)
        config = {
            "_class_name": "AutoencoderKLFlux2",
            "_diffusers_version": "0.37.0.dev0",
            "act_fn": "silu",
            "batch_norm_eps": 0.0001,
            "batch_norm_momentum": 0.1,
            "block_out_channels": list(self.channels),
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "in_channels": 3,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_add_attention": self.mid_attention,
            "norm_num_groups": self.groups,
            "out_channels": 3,
            "patch_size": [2, 2],
            "sample_size": 1024,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
            "use_post_quant_conv": self.quant_convs,
            "use_quant_conv": self.quant_convs,
        }
        if self.decoder_channels:
            config["decoder_block_out_channels"] = list(self.decoder_channels)
        return config

    def shapes(self) -> Shapes:
        """Return every tensor's shape."""
        latent = self.latent_channels
        shapes: Shapes = {}
        if self.quant_convs:
            self._conv(shapes, "quant_conv", 2 * latent, 2 * latent, 1)
            self._conv(shapes, "post_quant_conv", latent, latent, 1)
        for name in ("running_mean", "running_var"):
            shapes[f"bn.{name}"] = (4 * latent,)
        shapes["bn.num_batches_tracked"] = ()

        encoder = self.channels
        self._conv(shapes, "encoder.conv_in", 3, encoder[0])
        previous = encoder[0]
        for i, width in enumerate(encoder):
            for j in range(self.layers_per_block):
                self._resnet(shapes, f"encoder.down_blocks.{i}.resnets.{j}", previous, width)
                previous = width
            if i < len(encoder) - 1:
                self._conv(shapes, f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width)
        self._ends(shapes, "encoder", encoder[-1], encoder[-1], 2 * latent)

        decoder = self.decoder_channels or self.channels
        self._conv(shapes, "decoder.conv_in", latent, decoder[-1])
        previous = decoder[-1]
        for i, width in enumerate(reversed(decoder)):
            for j in range(self.layers_per_block + 1):
                self._resnet(shapes, f"decoder.up_blocks.{i}.resnets.{j}", previous, width)
                previous = width
            if i < len(decoder) - 1:
                self._conv(shapes, f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width)
        self._ends(shapes, "decoder", decoder[-1], decoder[0], 3)
        return shapes

    def _conv(self, shapes: Shapes, name: str, n_in: int, n_out: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in, kernel, kernel)
        shapes[f"{name}.bias"] = (n_out,)

    def _vectors(self, shapes: Shapes, name: str, n: int) -> None:
        shapes[f"{name}.weight"] = (n,)
        shapes[f"{name}.bias"] = (n,)

    def _resnet(self, shapes: Shapes, name: str, n_in: int, n_out: int) -> None:
        self._vectors(shapes, f"{name}.norm1", n_in)
        self._conv(shapes, f"{name}.conv1", n_in, n_out)
        self._vectors(shapes, f"{name}.norm2", n_out)
        self._conv(shapes, f"{name}.conv2", n_out, n_out)
        if n_in != n_out:
            self._conv(shapes, f"{name}.conv_shortcut", n_in, n_out, 1)

    def _ends(self, shapes: Shapes, name: str, middle: int, last: int, n_out: int) -> None:
        for j in range(2):
            self._resnet(shapes, f"{name}.mid_block.resnets.{j}", middle, middle)
        if self.mid_attention:
            attention = f"{name}.mid_block.attentions.0"
            self._vectors(shapes, f"{attention}.group_norm", middle)
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{attention}.{projection}.weight"] = (middle, middle)
                shapes[f"{attention}.{projection}.bias"] = (middle,)
        self._vectors(shapes, f"{name}.conv_norm_out", last)
        self._conv(shapes, f"{name}.conv_out", last, n_out)


@dataclass(frozen=True)
class Architecture:
    """A whole model."""

    text_encoder: TextEncoderSize
    transformer: TransformerSize
    vae: VaeSize
    text_encoder_shards: int = 1


def tiny(
    text: TextEncoderSize, vae: VaeSize, heads: int, head_dim: int, double_layers: int, single_layers: int
) -> Architecture:
    """Return an architecture whose parts fit together; all four rotary axes have the same size."""
    axis = head_dim // 4
    transformer = TransformerSize(
        heads,
        head_dim,
        double_layers,
        single_layers,
        text_dim=3 * text.hidden,
        in_channels=4 * vae.latent_channels,
        axes=(axis, axis, axis, axis),
    )
    return Architecture(text, transformer, vae)


_TEXT = TextEncoderSize(hidden=48, layers=4, heads=4, kv_heads=2, head_dim=16, intermediate=80)
_VAE = VaeSize((16, 24, 32, 32), latent_channels=8, layers_per_block=1, groups=4)

ARCHITECTURES = {
    # black-forest-labs/FLUX.2-klein-4B
    "4b": Architecture(
        TextEncoderSize(2560, 36, 32, 8, 128, 9728, vocab=151936),
        TransformerSize(24, 128, 5, 20, text_dim=7680, in_channels=128, axes=(32, 32, 32, 32)),
        VaeSize((128, 256, 512, 512)),
        text_encoder_shards=2,
    ),
    # black-forest-labs/FLUX.2-klein-9B
    "9b": Architecture(
        TextEncoderSize(4096, 36, 32, 8, 128, 12288, vocab=151936, tied=False),
        TransformerSize(32, 128, 8, 24, text_dim=12288, in_channels=128, axes=(32, 32, 32, 32)),
        VaeSize((128, 256, 512, 512)),
        text_encoder_shards=4,
    ),
    # as wide as 4b, but with few layers: for measurements of what happens in one
    "4b-short": Architecture(
        TextEncoderSize(2560, 4, 32, 8, 128, 9728, vocab=384),
        TransformerSize(24, 128, 1, 4, text_dim=7680, in_channels=128, axes=(32, 32, 32, 32)),
        VaeSize((128, 256, 512, 512)),
    ),
    # the autoencoder of the released models beside tiny transformers: for measurements of large pictures
    "4b-vae": tiny(_TEXT, VaeSize((128, 256, 512, 512)), 2, 32, 1, 1),
    # the smallest
    "tiny-random": tiny(
        replace(_TEXT, hidden=32, intermediate=64), replace(_VAE, channels=(16, 16, 16, 16)), 2, 32, 1, 1
    ),
    "odd-heads": tiny(replace(_TEXT, tied=False), replace(_VAE, layers_per_block=2), 3, 32, 2, 2),
    "one-double-three-single": tiny(replace(_TEXT, heads=4, kv_heads=4), _VAE, 2, 32, 1, 3),
    "head-dim-64": tiny(
        replace(_TEXT, hidden=40, bias=True),
        replace(_VAE, decoder_channels=(12, 16, 24, 40), quant_convs=False, mid_attention=False),
        2,
        64,
        1,
        2,
    ),
    # wide enough that onnxruntime's matrix product rounds the same for one picture and for several
    "wide": tiny(_TEXT, _VAE, 3, 88, 1, 1),
    # wide enough that pictures go through the autoencoder in bands of rows
    "wide-vae": tiny(_TEXT, VaeSize((64, 64, 72), latent_channels=8, layers_per_block=1, groups=4), 2, 32, 1, 1),
    # enough layers for hidden states 9, 18 and 27, and a last one that nothing depends on
    "deep-text": tiny(replace(_TEXT, hidden=32, layers=28, intermediate=48), _VAE, 5, 16, 1, 1),
}
