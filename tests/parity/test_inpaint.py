"""Inpainting equals diffusers' klein inpaint pipeline: masks, strength, references, guidance, blur, crop."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.parity.support import assert_same, picture, run_fluxonnx, run_reference
from tests.support import Case

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

DISTILLED, BASE = Case("odd-heads", "fp32"), Case("odd-heads", "fp32", is_distilled=False)
WIDTH, HEIGHT = 144, 96


def ellipse(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


MASK = ellipse((30, 21, 110, 90))


@pytest.fixture
def inpaint(both):
    """inpaint(case, steps, ...) -> what fluxonnx and the reference make of the same picture and mask."""

    def inpaint(case, mask, steps=3, strength=1.0, pad=None, **options):
        from diffusers import Flux2KleinInpaintPipeline

        flux, pipe, layers = both(case)
        reference = Flux2KleinInpaintPipeline(**pipe.components, is_distilled=case.is_distilled)
        reference.set_progress_bar_config(disable=True)
        others, guidance = options.get("references"), options.get("guidance_scale", 1.0)
        image, blur = picture(WIDTH, HEIGHT), options.get("mask_blur")
        expected = run_reference(
            reference,
            layers,
            image=image,
            mask_image=reference.mask_processor.blur(mask, blur) if blur else mask,
            image_reference=others[0] if others else None,
            padding_mask_crop=pad,
            width=WIDTH,
            height=HEIGHT,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        options = {"keep_unmasked": pad is not None, "guidance_scale": guidance, **options}
        found = run_fluxonnx(flux, image=image, mask=mask, strength=strength, steps=steps, mask_crop=pad, **options)
        return found, expected

    return inpaint


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_mask(inpaint, strength):
    assert_same(*inpaint(DISTILLED, MASK, steps=4, strength=strength))


def test_gray_mask_of_another_size(inpaint):
    """Its pixels count from the middle gray on; the reference scales it likewise."""
    values = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    assert_same(*inpaint(DISTILLED, Image.fromarray(values).resize((70, 50), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    "options",
    [
        {"references": (picture(64, 80, 3),)},
        {"mask_blur": 6},
        {"strength": 0.6, "references": (picture(90, 64, 4),), "mask_blur": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_with_others(inpaint, options):
    assert_same(*inpaint(DISTILLED, MASK, **options))


def test_guidance(inpaint):
    assert_same(*inpaint(BASE, MASK, guidance_scale=2.5))


def test_crop(inpaint, monkeypatch):
    """The neighbourhood of the mask, here of exactly the ratio of the picture, is scaled to its size, and put back.

    diffusers 0.42 puts the middle of the drawn picture back, unscaled: Flux2ImageProcessor overrides the function that
    its overlay scales with. Here it has that of its base class.
    """
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    monkeypatch.setattr(Flux2ImageProcessor, "_resize_and_crop", VaeImageProcessor._resize_and_crop)
    assert_same(*inpaint(DISTILLED, ellipse((36, 20, 65, 41)), pad=9))
