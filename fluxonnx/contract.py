"""What FLUX.2-klein is, for exporter and runtime: parts, sizes, inputs and outputs of graphs, prompt and token order.

Source unless stated otherwise: diffusers, pipelines/flux2/pipeline_flux2_klein.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxonnx.checkpoint.config import from_json
from fluxonnx.checkpoint.directory import KEEPING, Checkpoint
from fluxonnx.checkpoint.reading import shown
from fluxonnx.errors import CheckpointError

PIPELINE_CLASSES = (
    "Flux2KleinPipeline",
    "Flux2KleinInpaintPipeline",
    KEEPING,
    "Flux2KleinModularPipeline",
    "Flux2KleinBaseModularPipeline",
)
COMPONENT_CLASSES = {
    "transformer": "Flux2Transformer2DModel",
    "vae": "AutoencoderKLFlux2",
    "text_encoder": "Qwen3ForCausalLM",
}

# Every graph of a build, in the order in which a picture needs them, and the checkpoint folder it is made from.
COMPONENTS = {
    "text_encoder": "text_encoder",
    "conditioning": "transformer",
    "transformer": "transformer",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
}
# The two graphs that a build may have besides, with which it does so. Their weights are the transformer's.
KV_COMPONENTS = {"references": "transformer", "transformer_cached": "transformer"}
FOLDERS = COMPONENTS | KV_COMPONENTS

# The key of a graph's metadata under which it says at which rows the parts of weights begin that have none before.
FIRST_ROWS = "first_rows"

# Counts up when an exported graph or weight file changes: builds of another format are exported anew.
GRAPH_FORMAT = 3
# Autoencoders with at least as many channels at full size compute pictures in bands of rows (export/ops/bands.py), in
# builds from this format on, for processors.
BAND_CHANNELS, BANDS_SINCE = 64, 3
PRECISIONS_IN_BANDS = ("bf16", "fp32", "int8", "int4")
# Builds from this format on can still be run, which matters where their checkpoint is no longer there.
OLDEST_RUNNABLE_FORMAT = 0

# Qwen3's chat template for one user message with enable_thinking=False.
CHAT_TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEFAULT_PAD_TOKEN = "<|endoftext|>"
# Prompts are padded or cut to at most this many tokens (tokenizer_max_length).
MAX_SEQUENCE_LENGTH = 512
# The hidden states that make up prompt_embeds (hidden_states_layers of _get_qwen3_prompt_embeds).
OUT_LAYERS = (9, 18, 27)
# The text encoder's largest weight, of which a prompt needs one row per token.
EMBEDDING_TABLE = "model.embed_tokens.weight"
# Bounds of sizes that are read from files, far beyond any model. Each block of the VAE halves a picture.
MAX_SIZE = 1 << 24
MAX_BLOCKS = 8
# Distance of the T coordinates of reference pictures (_prepare_image_ids).
REFERENCE_T = 10


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a Qwen3 text encoder.

    `out_layers` are the hidden states in prompt_embeds, 0 being the embeddings.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float
    eps: float
    bias: bool
    out_layers: tuple[int, ...]

    @property
    def embedding_dim(self) -> int:
        """Width of prompt_embeds."""
        return len(self.out_layers) * self.hidden


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Flux2Transformer2DModel."""

    in_channels: int
    out_channels: int
    double_layers: int
    single_layers: int
    heads: int
    head_dim: int
    text_dim: int
    timestep_channels: int
    mlp_dim: int
    axes_dims: tuple[int, ...]
    rope_theta: float
    eps: float

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of an AutoencoderKLFlux2."""

    in_channels: int
    out_channels: int
    latent_channels: int
    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    quant_conv: bool
    post_quant_conv: bool
    mid_attention: bool
    batch_norm_eps: float

    @property
    def patch_channels(self) -> int:
        """Channels of a latent token: 2x2 patches of `latent_channels`."""
        return 4 * self.latent_channels

    @property
    def scale_factor(self) -> int:
        """Pixels along each side of a latent token."""
        return 2 ** len(self.encoder_channels)


@dataclass(frozen=True)
class Architecture:
    """The sizes of a whole model: the exporter writes them into the manifest, the runtime reads them from there."""

    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as the manifest stores them."""
        return asdict(self)

    def component_json(self, component: str) -> str:
        """Return the sizes that a graph depends on, as its metadata stores them."""
        return json.dumps(asdict(getattr(self, FOLDERS[component])))

    def _check(self) -> None:
        """Check what the runtime computes with; a wrong size would end in an array of terabytes, or of nothing."""
        for part in ("text_encoder", "transformer", "vae"):
            for name, value in asdict(getattr(self, part)).items():
                least = 0 if name == "out_layers" else 1
                numbers = value if isinstance(value, tuple) else [value]
                if not numbers or any(type(n) is int and not least <= n <= MAX_SIZE for n in numbers):
                    raise ValueError(f"{part}.{name} is {shown(value)}")
        if len(self.vae.encoder_channels) > MAX_BLOCKS:
            raise ValueError(f"vae.encoder_channels has over {MAX_BLOCKS} items")
        if self.transformer.text_dim != self.text_encoder.embedding_dim:
            raise ValueError(f"transformer.text_dim is not {self.text_encoder.embedding_dim}")
        if self.transformer.in_channels != self.vae.patch_channels:
            raise ValueError(f"transformer.in_channels is not {self.vae.patch_channels}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> Architecture:
        """Read what `to_json` returned.

        Args:
            values: The manifest's "architecture".
            source: The manifest, for the message.

        Raises:
            CheckpointError: A value is missing or of another type.
        """
        try:
            sizes = from_json(cls, values)
            sizes._check()
            return sizes
        except ValueError as error:
            raise CheckpointError(
                f'{source} has no usable "architecture" ({error}): export again with --force'
            ) from None


def open_checkpoint(
    root: str | Path,
    transformer: str | Path | None = None,
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
) -> Checkpoint:
    """Open a model directory of this family.

    Args:
        root: The directory.
        transformer: A file, or the folder of one, that replaces the transformer's weights.
        text_encoder: Likewise for the text encoder.
        vae: Likewise for the autoencoder.

    Raises:
        CheckpointError: It does not exist, has no model_index.json, or is another kind of pipeline.
    """
    checkpoint = Checkpoint(root, transformer, text_encoder=text_encoder, vae=vae)
    found = checkpoint.index.values.get("_class_name")
    if found not in PIPELINE_CLASSES:
        name = json.dumps(found) if isinstance(found, str | None) else shown(found)
        raise CheckpointError(
            f'{checkpoint.index.path}: "_class_name" is {name[:100]}, but fluxonnx runs '
            f"{PIPELINE_CLASSES[0]} and its siblings (the FLUX.2-klein models)"
        )
    return checkpoint


# Token order: text, then the picture, then the references.


def text_ids(length: int) -> np.ndarray:
    """Return (t, h, w, l) = (0, 0, 0, i) for each text token: int64 [length, 4]."""
    ids = np.zeros((length, 4), np.int64)
    ids[:, 3] = np.arange(length)
    return ids


def grid_ids(height: int, width: int, t: int = 0) -> np.ndarray:
    """Return (t, y, x, 0) for each token of a picture, row by row: int64 [height * width, 4]."""
    ids = np.zeros((height * width, 4), np.int64)
    ids[:, 0] = t
    ids[:, 1], ids[:, 2] = np.divmod(np.arange(height * width), width)
    return ids


def pack(latents: np.ndarray) -> np.ndarray:
    """[batch, channels, height, width] -> tokens [batch, height * width, channels], row by row."""
    batch, channels = latents.shape[:2]
    return np.ascontiguousarray(latents.reshape(batch, channels, -1).transpose(0, 2, 1))


def unpack(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """Inverse of `pack`."""
    batch, _, channels = tokens.shape
    return np.ascontiguousarray(tokens.transpose(0, 2, 1)).reshape(batch, channels, height, width)
