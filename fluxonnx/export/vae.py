"""AutoencoderKLFlux2: pictures to normalised latents and back.

Source: diffusers, models/autoencoders/autoencoder_kl_flux2.py and vae.py; the patchifying and normalising around it
are those of pipeline_flux2_klein.py.
"""

from __future__ import annotations

import numpy as np

from fluxonnx.checkpoint.config import Config
from fluxonnx.contract import MAX_BLOCKS, VaeConfig
from fluxonnx.errors import CheckpointError
from fluxonnx.export import ops
from fluxonnx.export.ops import ModelBuilder, Picture
from fluxonnx.ports import Ports

# Encoder and Decoder of diffusers' vae.py fix this for every norm.
EPS = 1e-6

UNUSED_BY_ENCODER = ("decoder.", "post_quant_conv.", "bn.num_batches_tracked")
UNUSED_BY_DECODER = ("encoder.", "quant_conv.", "bn.num_batches_tracked")


def read_config(config: Config) -> VaeConfig:
    """Read and check vae/config.json.

    Raises:
        CheckpointError: A value is missing, malformed, or asks for something this model family does not have.
    """
    config.expect("act_fn", "silu")
    config.expect("patch_size", [2, 2])
    encoder_channels = config.integers("block_out_channels")
    decoder_channels = config.integers("decoder_block_out_channels", encoder_channels)
    if max(len(encoder_channels), len(decoder_channels)) > MAX_BLOCKS:
        raise CheckpointError(f"{config.path} describes over {MAX_BLOCKS} blocks, which no picture is large enough for")
    groups = config.integer("norm_num_groups", 32)
    for channels in (*encoder_channels, *decoder_channels):
        if channels % groups:
            raise CheckpointError(f'{config.path}: {channels} channels do not divide into "norm_num_groups" {groups}')
    if len(encoder_channels) != len(decoder_channels):
        raise CheckpointError(f"{config.path}: encoder and decoder have different numbers of blocks")
    return VaeConfig(
        in_channels=config.integer("in_channels", 3),
        out_channels=config.integer("out_channels", 3),
        latent_channels=config.integer("latent_channels", 32),
        encoder_channels=encoder_channels,
        decoder_channels=decoder_channels,
        layers_per_block=config.integer("layers_per_block", 2),
        groups=groups,
        quant_conv=config.flag("use_quant_conv", True),
        post_quant_conv=config.flag("use_post_quant_conv", True),
        mid_attention=config.flag("mid_block_add_attention", True),
        batch_norm_eps=config.number("batch_norm_eps", 1e-4, 0, 1),
    )


def build_encoder(g: ModelBuilder, c: VaeConfig, ports: Ports) -> None:
    """Add the encoder to `g`."""
    x = [g.input(ports.inputs[0])]
    with g.scope("encoder"):
        x = encoder(g, c, x)
    moments = 2 * c.latent_channels
    if c.quant_conv:
        x = ops.conv(g, x, "quant_conv", moments, moments, kernel=1)
    mode = ops.first_channels(g, ops.whole(g, x), c.latent_channels)  # the others are the log of the variance
    mean, std = batch_norm_statistics(g, c)
    patches = ops.patchify(g, mode, c.latent_channels)
    g.output(ports.outputs[0], g.op("Div", g.op("Sub", patches, mean), std))


def build_decoder(g: ModelBuilder, c: VaeConfig, ports: Ports) -> None:
    """Add the decoder to `g`."""
    latents = g.input(ports.inputs[0])
    mean, std = batch_norm_statistics(g, c)
    x = [ops.unpatchify(g, ops.add(g, ops.mul(g, latents, std), mean), c.latent_channels)]
    if c.post_quant_conv:
        x = ops.conv(g, x, "post_quant_conv", c.latent_channels, c.latent_channels, kernel=1)
    with g.scope("decoder"):
        x = decoder(g, c, x)
    g.output(ports.outputs[0], ops.whole(g, x))


def batch_norm_statistics(g: ModelBuilder, c: VaeConfig) -> tuple[str, str]:
    """Return the mean and standard deviation of each patch channel, f32 [channels, 1, 1]."""
    with g.scope("bn"):
        per_channel = g.constant([-1, 1, 1], np.int64)
        mean, variance = g.weight("running_mean", c.patch_channels), g.weight("running_var", c.patch_channels)
        std = g.op("Sqrt", g.op("Add", variance, g.constant(c.batch_norm_eps)))
        return g.op("Reshape", mean, per_channel), g.op("Reshape", std, per_channel)


def encoder(g: ModelBuilder, c: VaeConfig, x: Picture) -> Picture:
    """[batch, 3, h, w] -> [batch, 2 * latent_channels, h/8, w/8]."""
    channels = c.encoder_channels[0]
    scale = c.scale_factor  # rows of pixels per row of latents
    x = ops.conv(g, ops.divided(g, x, scale, max(c.encoder_channels[:2])), "conv_in", c.in_channels, channels)
    for i, width in enumerate(c.encoder_channels):
        with g.scope("down_blocks", i):
            for j in range(c.layers_per_block):
                with g.scope("resnets", j):
                    x = resnet(g, c, x, channels, width)
                channels = width
            if i < len(c.encoder_channels) - 1:
                with g.scope("downsamplers.0"):
                    x = ops.conv(g, x, "conv", width, width, stride=2)
                scale //= 2
                x = ops.gathered(g, x, scale)
    x = mid_block(g, c, x, channels)
    return head(g, c, x, channels, 2 * c.latent_channels)


def decoder(g: ModelBuilder, c: VaeConfig, x: Picture) -> Picture:
    """[batch, latent_channels, h, w] -> [batch, 3, 8 * h, 8 * w]."""
    channels = c.decoder_channels[-1]
    x = ops.conv(g, x, "conv_in", c.latent_channels, channels)
    scale = 2  # rows of pixels per row of latents
    x = mid_block(g, c, x, channels, scale)
    for i, width in enumerate(reversed(c.decoder_channels)):
        with g.scope("up_blocks", i):
            for j in range(c.layers_per_block + 1):
                with g.scope("resnets", j):
                    x = resnet(g, c, x, channels, width, scale)
                channels = width
            if i < len(c.decoder_channels) - 1:
                x = ops.divided(g, x, scale, max(c.decoder_channels[:2]))
                with g.scope("upsamplers.0"):
                    x = ops.upsample_conv(g, x, "conv", width)
                scale *= 2
    return head(g, c, x, channels, c.out_channels)


def head(g: ModelBuilder, c: VaeConfig, x: Picture, channels: int, n_out: int) -> Picture:
    """Norm, SiLU, convolution: the end of encoder and decoder."""
    return ops.norm_conv(g, x, "conv_norm_out", "conv_out", channels, n_out, c.groups, EPS)


def resnet(g: ModelBuilder, c: VaeConfig, x: Picture, n_in: int, n_out: int, scale: int | None = None) -> Picture:
    """Two convolutions beside a shortcut: [batch, n_in, h, w] -> [batch, n_out, h, w]; for `scale` see `norm_conv`."""

    def shortcut() -> Picture:
        return ops.conv(g, x, "conv_shortcut", n_in, n_out, kernel=1)

    hidden = ops.norm_conv(g, x, "norm1", "conv1", n_in, n_out, c.groups, EPS, scale)
    plus = x if n_in == n_out else shortcut
    return ops.norm_conv(g, hidden, "norm2", "conv2", n_out, n_out, c.groups, EPS, scale, plus)


def mid_block(g: ModelBuilder, c: VaeConfig, x: Picture, channels: int, scale: int | None = None) -> Picture:
    """[batch, channels, h, w] -> same."""
    with g.scope("mid_block"):
        with g.scope("resnets.0"):
            x = resnet(g, c, x, channels, channels, scale)
        if c.mid_attention:
            with g.scope("attentions.0"):
                x = ops.added(g, x, [spatial_attention(g, c, ops.whole(g, x), channels)])
        with g.scope("resnets.1"):
            return resnet(g, c, x, channels, channels, scale)


def spatial_attention(g: ModelBuilder, c: VaeConfig, x: str, channels: int) -> str:
    """Every pixel of [batch, channels, h, w] attends to all others, in one head."""
    normal = ops.group_norm(g, x, "group_norm", channels, c.groups, EPS)
    pixels = g.op("Transpose", ops.reshape(g, normal, [0, 0, -1]), perm=[0, 2, 1])  # [batch, h * w, channels]
    q, k, v = (ops.linear(g, pixels, name, channels, channels, bias=True) for name in ("to_q", "to_k", "to_v"))
    mixed = ops.linear(g, ops.attention(g, q, k, v, channels), "to_out.0", channels, channels, bias=True)
    return g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1]), g.op("Shape", x), shape=g.shape(x))
