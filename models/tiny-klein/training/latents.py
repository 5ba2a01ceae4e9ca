"""Conversion between pictures and normalised tokens, as in the pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from common import SIDE, to_tensor
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F

# Pictures per call of the autoencoder: activations of this many fit in the processor's cache.
CHUNK = 4


def load_vae(work: Path) -> AutoencoderKLFlux2:
    """Load the trained autoencoder, with the refined decoder if step 6 has made one."""
    refined = work / "vae-refined"
    folder = refined if refined.exists() else work / "vae"
    return AutoencoderKLFlux2.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def patchify(latents: Tensor) -> Tensor:
    """Pack 2x2 patches: [batch, channels, height, width] -> [batch, 4 * channels, height / 2, width / 2]."""
    return F.pixel_unshuffle(latents, 2)


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: Iterable[np.ndarray]) -> Tensor:
    """Encode pictures, uint8 [128, 128, 3] each, as tokens: float32 [batch, 64, channels]."""
    parts = [vae.encode(part).latent_dist.mode() for part in to_tensor(pictures).split(CHUNK)]
    mean, deviation = statistics(vae)
    return (patchify(torch.cat(parts)).flatten(2).mT - mean) / deviation


def decode(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """Decode tokens [batch, 64, channels] to pictures: float32 [batch, 3, 128, 128], about -1 to 1."""
    mean, deviation = statistics(vae)
    planes = F.pixel_shuffle((tokens * deviation + mean).mT.unflatten(2, (SIDE, SIDE)), 2)
    return torch.cat([vae.decode(part).sample for part in planes.split(CHUNK)])


def statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel of the tokens."""
    return vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
