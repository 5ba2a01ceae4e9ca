"""Every way to steer a run equals diffusers: references, strength, guidance, schedules, batches."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fluxonnx.runtime.request import Request
from tests.parity.support import PROMPT, SEED, assert_same, picture, run_fluxonnx, run_reference
from tests.support import IMAGE_TOLERANCE, LATENTS_TOLERANCE, Case, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

DISTILLED = Case("odd-heads", "fp32")
BASE = Case("odd-heads", "fp32", is_distilled=False)
SHARDED = Case("one-double-three-single", "bf16", shards=3)


@pytest.mark.parametrize("case", [DISTILLED, SHARDED], ids=lambda case: case.id)
@pytest.mark.parametrize(
    "sizes", [[(64, 64)], [(100, 77)], [(96, 64), (70, 130), (64, 64)], [(1300, 1000)]], ids=lambda sizes: str(sizes)
)
def test_references(both, case, sizes):
    """One and several references, of odd sizes, over the area cap; the output has the first one's size."""
    flux, pipe, layers = both(case)
    images = [picture(width, height, seed=i) for i, (width, height) in enumerate(sizes)]
    # A small output keeps the test quick; the reference tokens are still those of a picture over the cap.
    size = {"width": 64, "height": 64} if sizes[0][0] > 1000 else {}
    expected = run_reference(pipe, layers, image=images, num_inference_steps=2, guidance_scale=1.0, **size)
    found = run_fluxonnx(flux, references=tuple(images), steps=2, **size)
    assert_same(found, expected)
    assert np.array_equal(
        np.asarray(flux.edit(PROMPT, images, seed=SEED, steps=2, max_sequence_length=32, **size)), np.asarray(found[1])
    )


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.7, 0.75, 1.0])
def test_strength_with_the_input_as_reference(both, reference, checkpoints, strength):
    """diffusers' inpainting pipeline under an all-white mask is image-to-image that also looks at its input."""
    from diffusers import Flux2KleinInpaintPipeline

    flux, pipe, layers = both(DISTILLED)
    inpaint = Flux2KleinInpaintPipeline(**pipe.components, is_distilled=True)
    inpaint.set_progress_bar_config(disable=True)
    image = picture(96, 64)
    expected = run_reference(
        inpaint,
        layers,
        image=image,
        mask_image=Image.new("L", image.size, 255),
        width=96,
        height=64,
        strength=strength,
        num_inference_steps=4,
        guidance_scale=1.0,
    )
    found = run_fluxonnx(flux, image=image, references=(image,), strength=strength, steps=4)
    assert_same(found, expected)


@pytest.mark.parametrize(("strength", "start"), [(0.3, 2), (0.75, 1), (1.0, 0)])
def test_strength_alone(both, strength, start):
    """Against the reference's own parts: VAE mode latents, scale_noise, and the schedule's tail."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps

    flux, pipe, layers = both(DISTILLED)
    image, steps = picture(80, 64), 4
    found = run_fluxonnx(flux, image=image, strength=strength, steps=steps)

    with torch.no_grad():
        sample = pipe.image_processor.preprocess(image, height=64, width=80)
        clean = pipe._encode_vae_image(sample, None)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))
        sigmas = np.linspace(1.0, 1 / steps, steps)
        retrieve_timesteps(pipe.scheduler, steps, "cpu", sigmas=sigmas, mu=compute_empirical_mu(20, steps))
        schedule = pipe.scheduler.sigmas
        x = pipe._pack_latents(schedule[start] * noise + (1 - schedule[start]) * clean)
        embeds, txt_ids = pipe.encode_prompt(PROMPT, max_sequence_length=32, text_encoder_out_layers=layers)
        ids = pipe._prepare_latent_ids(clean)
        for i in range(start, steps):
            velocity = pipe.transformer(
                hidden_states=x,
                encoder_hidden_states=embeds,
                timestep=schedule[i].expand(1) * 1000 / 1000,
                txt_ids=txt_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
            x = x + (schedule[i + 1] - schedule[i]) * velocity
    assert relative_error(found[0], x.numpy()) < LATENTS_TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 2.5, None])
def test_guidance_of_a_base_model(both, guidance):
    flux, pipe, layers = both(BASE)
    expected = run_reference(
        pipe, layers, width=64, height=64, num_inference_steps=3, guidance_scale=4.0 if guidance is None else guidance
    )
    assert_same(run_fluxonnx(flux, width=64, height=64, steps=3, guidance_scale=guidance), expected)


def test_negative_prompt(both):
    flux, pipe, layers = both(BASE)
    negative, _ = pipe.encode_prompt("rain", max_sequence_length=32, text_encoder_out_layers=layers)
    options = {"width": 64, "height": 64, "guidance_scale": 3.0}
    expected = run_reference(pipe, layers, num_inference_steps=2, negative_prompt_embeds=negative, **options)
    assert_same(run_fluxonnx(flux, steps=2, negative_prompt="rain", **options), expected)


def test_guidance_with_references(both):
    flux, pipe, layers = both(BASE)
    expected = run_reference(pipe, layers, image=[picture(64, 80)], num_inference_steps=2, guidance_scale=4.0)
    assert_same(run_fluxonnx(flux, references=(picture(64, 80),), steps=2), expected)


@pytest.mark.parametrize("references", [(), (picture(64, 80),)], ids=["prompt", "edit"])
def test_guidance_of_a_distilled_model(both, references):
    """As the reference guides with the same weights, if it is told that they are not distilled."""
    from diffusers import Flux2KleinPipeline

    flux, pipe, layers = both(DISTILLED)
    pipe = Flux2KleinPipeline(**pipe.components, is_distilled=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"width": 64, "height": 80, "guidance_scale": 2.5}
    expected = run_reference(pipe, layers, image=list(references) or None, num_inference_steps=2, **options)
    assert_same(run_fluxonnx(flux, references=references, steps=2, **options), expected)


def test_fifty_steps_by_default(both):
    flux, pipe, layers = both(BASE)
    expected = run_reference(pipe, layers, width=64, height=64, guidance_scale=1.0)
    assert_same(run_fluxonnx(flux, width=64, height=64, guidance_scale=1.0), expected)


def test_custom_sigmas(both):
    """Equal to the reference's scheduler with its shift turned off."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    flux, pipe, layers = both(DISTILLED)
    original = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0)
    try:
        sigmas = [1.0, 0.8, 0.3]
        expected = run_reference(
            pipe, layers, width=64, height=64, sigmas=sigmas, num_inference_steps=3, guidance_scale=1.0
        )
    finally:
        pipe.scheduler = original
    assert_same(run_fluxonnx(flux, width=64, height=64, schedule="custom", sigmas=(1.0, 0.8, 0.3)), expected)


def test_batch_equals_the_reference_one_by_one(both):
    """Several seeds in one pass, each the picture it is alone."""
    flux, pipe, layers = both(Case("wide"))
    seeds = [5, 6, 1000]
    images = flux.run(Request(prompt=PROMPT, width=64, height=96, steps=2, max_sequence_length=32), seeds)
    for seed, image in zip(seeds, images, strict=True):
        _, expected = run_reference(
            pipe, layers, seed=seed, width=64, height=96, num_inference_steps=2, guidance_scale=1.0
        )
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
        assert difference.max() <= IMAGE_TOLERANCE
        assert image.info["seed"] == seed
