"""diffusers loads the bundled demo model unchanged, and draws the same picture with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from tests.support import IMAGE_TOLERANCE

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

MODEL = Path(__file__).parents[2] / "models/tiny-klein"
PROMPT, SEED = "a red circle on a blue background", 3


def test_diffusers_draws_the_same(tmp_path, reference):
    with fluxonnx.load(shutil.copytree(MODEL, tmp_path / "model")) as flux:
        found = flux.generate(PROMPT, seed=SEED)
        layers, length = flux.text_encoder_out_layers, found.info["max_sequence_length"]
    expected = reference(MODEL)(
        prompt=PROMPT,
        width=found.width,
        height=found.height,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        max_sequence_length=length,
        text_encoder_out_layers=layers,
    ).images[0]
    assert found.size == expected.size == (128, 128)
    assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= IMAGE_TOLERANCE
