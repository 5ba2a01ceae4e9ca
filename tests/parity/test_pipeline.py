"""Whole runs equal `Flux2KleinPipeline` in float32: the same seed gives the same latents and the same picture."""

from __future__ import annotations

import numpy as np
import pytest

import fluxonnx
from tests.support import IMAGE_TOLERANCE, LATENTS_TOLERANCE, Case, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

CASES = [Case("odd-heads", "fp32"), Case("one-double-three-single", "bf16", shards=3), Case("deep-text", "bf16")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("width", "height", "steps", "max_length"), [(64, 64, 4, 512), (96, 64, 3, 64), (64, 128, 1, 8), (256, 160, 4, 512)]
)
def test_text_to_image(checkpoints, reference, case, width, height, steps, max_length):
    path = checkpoints.exported(case)
    prompt, seed = "a red bicycle, “quoted”, under ☂ rain", 12345
    latents = []
    with fluxonnx.load(path) as flux:
        image = flux.generate(
            prompt,
            width,
            height,
            steps=steps,
            seed=seed,
            max_sequence_length=max_length,
            callback=lambda step, steps, sigma, x: latents.append(x),
        )
        out_layers = flux.text_encoder_out_layers

    pipe = reference(checkpoints.get(case))
    expected_latents = []
    expected = pipe(
        prompt=prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=max_length,
        text_encoder_out_layers=out_layers,
        callback_on_step_end=lambda pipe, i, t, values: expected_latents.append(values["latents"].numpy()) or values,
    ).images[0]

    assert len(latents) == len(expected_latents) == steps
    for found, wanted in zip(latents, expected_latents, strict=True):
        assert relative_error(found, wanted) < LATENTS_TOLERANCE
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= IMAGE_TOLERANCE
