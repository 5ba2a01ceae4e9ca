"""Runs of the reference and of fluxonnx with the same inputs, and their comparison."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.support import IMAGE_TOLERANCE, LATENTS_TOLERANCE, relative_error

SEED, PROMPT = 77, "a boat"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resampling has something to do."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small, "RGB").resize((width, height), Image.Resampling.BICUBIC)


def run_reference(pipe, layers, seed=SEED, **options):
    """Return the final latents and the picture."""
    import torch

    latents = []

    def keep(pipe, i, t, values):
        latents.append(values["latents"].numpy())
        return values

    image = pipe(
        prompt=PROMPT,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=32,
        text_encoder_out_layers=layers,
        callback_on_step_end=keep,
        **options,
    ).images[0]
    return latents[-1], image


def run_fluxonnx(flux, seed=SEED, **options):
    latents = []
    image = flux.generate(
        PROMPT, seed=seed, max_sequence_length=32, callback=lambda step, steps, sigma, x: latents.append(x), **options
    )
    return latents[-1], image


def assert_same(found, expected):
    assert relative_error(found[0], expected[0]) < LATENTS_TOLERANCE
    assert found[1].size == expected[1].size
    assert np.abs(np.asarray(found[1], np.int16) - np.asarray(expected[1], np.int16)).max() <= IMAGE_TOLERANCE
