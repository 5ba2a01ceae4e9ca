"""Pixels are converted exactly as by diffusers' image processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fluxonnx.runtime.images import fit_reference, image_to_sample, sample_to_image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def processor():
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    return Flux2ImageProcessor(vae_scale_factor=16)


@pytest.mark.parametrize("size", [(64, 64), (333, 77), (1024, 1024), (1500, 900), (2000, 400)])
def test_references(processor, size):
    image = Image.effect_noise(size, 80).convert("RGB")
    prepared = image
    if size[0] * size[1] > 1024 * 1024:
        prepared = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 16 * 16 for side in prepared.size)
    expected = processor.preprocess(prepared, height=height, width=width, resize_mode="crop").numpy()
    assert np.array_equal(image_to_sample(fit_reference(image)), expected)


def test_samples_to_pixels(processor):
    """Every rounding: values on and around half steps, and beyond the range."""
    halves = ((np.arange(255) + 0.5) / 127.5 - 1).astype(np.float32)
    around = np.stack([halves, np.nextafter(halves, np.float32(-2)), np.nextafter(halves, np.float32(2))])
    ties = (around * np.float32(0.5) + np.float32(0.5)) * 255 % 1 == 0.5
    assert ties.sum() > 10  # these tell half to even from half up
    ramp = np.linspace(-1.2, 1.2, 3 * 64 * 64 - around.size, dtype=np.float32)
    sample = np.concatenate([around.ravel(), ramp]).reshape(1, 3, 64, 64)
    expected = processor.postprocess(torch.from_numpy(sample), output_type="pil")[0]
    assert np.array_equal(np.asarray(sample_to_image(sample[0])), np.asarray(expected))
