"""Pixels go in and out of the model exactly as diffusers' image processor moves them."""

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
    sample = np.linspace(-1.2, 1.2, 3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)
    expected = processor.postprocess(torch.from_numpy(sample), output_type="pil")[0]
    assert np.array_equal(np.asarray(sample_to_image(sample[0])), np.asarray(expected))
