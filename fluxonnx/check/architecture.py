"""Which of the known models a config describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fluxonnx.check.findings import OK, SKIPPED, WARNING, Finding
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.contract import Architecture

SUBJECT = "configs"

# vocab, hidden, layers, heads, kv_heads, head_dim, intermediate (config.json of Qwen/Qwen3-4B and Qwen/Qwen3-8B)
TEXT_ENCODERS = {
    (151936, 2560, 36, 32, 8, 128, 9728): "Qwen3-4B",
    (151936, 4096, 36, 32, 8, 128, 12288): "Qwen3-8B",
}
# in_channels, double_layers, single_layers, heads, head_dim, text_dim, mlp_dim (config.json of
# black-forest-labs/FLUX.2-klein-4B and FLUX.2-klein-9B)
TRANSFORMERS = {
    (128, 5, 20, 24, 128, 7680, 9216): "4B",
    (128, 8, 24, 32, 128, 12288, 12288): "9B",
}
ENCODER_OF = {"4B": "Qwen3-4B", "9B": "Qwen3-8B"}
# latent_channels, encoder_channels, decoder_channels
VAES: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {
    (32, (128, 256, 512, 512), (128, 256, 512, 512)): "FLUX.2's",
    (32, (128, 256, 512, 512), (96, 192, 384, 384)): "FLUX.2's with the small decoder",
}


@dataclass(frozen=True)
class Known:
    """What a model's sizes are known from; None for a part with other sizes.

    Attributes:
        transformer: "4B" or "9B".
        text_encoder: "Qwen3-4B" or "Qwen3-8B".
        vae: Whose it is.
        is_distilled: What model_index.json says.
        kv: Whether model_index.json names the pipeline with a cache for references.
    """

    transformer: str | None
    text_encoder: str | None
    vae: str | None
    is_distilled: bool
    kv: bool = False

    @property
    def name(self) -> str | None:
        """The name of the model; None if it is not known."""
        if None in (self.transformer, self.vae) or ENCODER_OF.get(self.transformer or "") != self.text_encoder:
            return None
        return f"FLUX.2-klein-{'' if self.is_distilled or self.kv else 'base-'}{self.transformer}{'-KV' * self.kv}"


def recognise(checkpoint: Checkpoint, sizes: Architecture) -> Known:
    """Compare sizes with those of the known models."""
    text, flux, vae = sizes.text_encoder, sizes.transformer, sizes.vae
    distilled = checkpoint.index.values.get("is_distilled") is True
    return Known(
        TRANSFORMERS.get(
            (
                *(flux.in_channels, flux.double_layers, flux.single_layers),
                *(flux.heads, flux.head_dim, flux.text_dim, flux.mlp_dim),
            )
        ),
        TEXT_ENCODERS.get(
            (text.vocab, text.hidden, text.layers, text.heads, text.kv_heads, text.head_dim, text.intermediate)
        ),
        VAES.get((vae.latent_channels, vae.encoder_channels, vae.decoder_channels)),
        distilled,
        checkpoint.keeps_references,
    )


def check(known: Known, sizes: Architecture) -> Iterator[Finding]:
    """Say which model it is."""
    flux, text = sizes.transformer, sizes.text_encoder
    described = (
        f"transformer of {flux.double_layers} + {flux.single_layers} blocks, {flux.dim} wide, text encoder of "
        f"{text.layers} layers, {text.hidden} wide"
    )
    if known.name:
        yield Finding(OK, SUBJECT, f"{known.name}: {described}, {known.vae} autoencoder")
    elif known.transformer:
        unlike = "text encoder" if known.text_encoder != ENCODER_OF[known.transformer] else "autoencoder"
        yield Finding(
            WARNING,
            SUBJECT,
            f"the transformer has the sizes of FLUX.2-klein-{known.transformer}, but the {unlike} has others: if the "
            "folders come from different downloads, download the model again",
        )
    else:
        yield Finding(SKIPPED, SUBJECT, f"sizes of no model that is known here ({described}): nothing to compare with")
