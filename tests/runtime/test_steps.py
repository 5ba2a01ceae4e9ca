"""A run from the inside: steps, previews, pictures as they come, and the events that can be watched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.errors import Cancelled, FluxonnxError, UsageError
from fluxonnx.runtime.events import Event, GraphRan, OperatorsTimed, PhaseBegan, StepEnded
from fluxonnx.runtime.preview import preview_factor, shrink
from fluxonnx.runtime.request import Request
from tests.support import Case

pytestmark = pytest.mark.slow

CASE, BASE = Case("odd-heads"), Case("odd-heads", is_distilled=False)
DEMO_MODEL = Path(__file__).parents[2] / "models/tiny-klein"
REQUEST = Request(prompt="a", width=64, height=96, steps=3)


@pytest.fixture
def flux(checkpoints, engine):
    # Of so many threads that a narrow model draws one picture at a time.
    with fluxonnx.load(checkpoints.exported(CASE), threads=2, engine=engine) as flux:
        yield flux


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The bundled demo model, opened in a copy: graphs are written beside the weights."""
    root = tmp_path_factory.mktemp("demo") / "tiny-klein"
    shutil.copytree(DEMO_MODEL, root, ignore=shutil.ignore_patterns("training", "*.png"))
    with fluxonnx.load(root) as flux:
        yield flux


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# Steps


def test_steps_are_those_of_generate(flux):
    seen: list[tuple] = []
    image = flux.generate("a", 64, 96, steps=3, seed=5, callback=lambda *step: seen.append(step))
    steps = list(flux.steps(REQUEST, 5))
    assert [(step.index, step.steps, step.sigma) for step in steps] == [step[:3] for step in seen]
    assert all(np.array_equal(step.latents, found[3]) for step, found in zip(steps, seen, strict=True))
    assert steps[0].latents.shape == (1, 6 * 4, 32)
    last = steps[-1].image()
    assert last.tobytes() == image.tobytes()
    assert last.info == image.info


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3, "sampler": "heun"},
        {"steps": 3, "sampler": "dpmpp-2m"},
        {"steps": 3, "image": picture(80, 64), "strength": 0.5},
        {"steps": 3, "references": (picture(64, 64),)},
        {"steps": 3, "guidance_scale": 3.0, "negative_prompt": "b"},
        {"schedule": "custom", "sigmas": (0.9, 0.4)},
    ],
    ids=lambda options: "-".join(options),
)
def test_last_step_is_the_picture_in_all_modes(checkpoints, options):
    request = Request(**{"prompt": "a", "width": 64, "height": 64, **options})
    with fluxonnx.load(checkpoints.exported(BASE)) as flux:
        (expected,) = flux.run(request, [5])
        *_, last = flux.steps(request, 5)
        assert last.image().tobytes() == expected.tobytes()


def test_estimate_is_where_the_velocity_leads(flux):
    """x - sigma * v: recomputed from what the transformer returned in each step; exact in the last."""
    before: list[np.ndarray] = []
    velocities: list[np.ndarray] = []

    def watch(event: Event) -> None:
        if isinstance(event, GraphRan) and event.component == "transformer":
            before.append(event.inputs["hidden_states"])
            velocities.append(event.outputs[0])

    flux.watch = watch
    steps = list(flux.steps(REQUEST, 5))
    for step, x, velocity in zip(steps, before, velocities, strict=True):
        assert step.estimate.dtype == np.float32
        np.testing.assert_allclose(step.estimate, x - step.sigma * velocity, rtol=1e-6, atol=1e-6)
    assert np.array_equal(steps[-1].estimate, steps[-1].latents)


def test_strength_0_has_no_steps(flux, engine):
    image = picture(70, 80)
    request = Request(prompt="a", image=image, strength=0)
    assert list(flux.steps(request, 1)) == []
    ((seed, found),) = flux.pictures(request, [1])
    assert (seed, found.tobytes()) == (1, image.tobytes())
    assert engine.loaded == []


def test_last_step_comes_without_the_transformer(flux, engine):
    """Its memory is for the decoder then."""
    open_at_step = [sorted(engine.open) for step in flux.steps(REQUEST, 5)]
    assert open_at_step == [["conditioning", "transformer"]] * 2 + [[]]
    *_, last = flux.steps(REQUEST, 5)
    last.image()
    assert engine.most_open == 1
    assert engine.open == []


@pytest.mark.parametrize("look", ["nothing", "preview", "image"])
def test_breaking_out_frees_everything(flux, engine, look):
    expected = flux.run(REQUEST, [5])[0].tobytes()
    steps = flux.steps(REQUEST, 5)
    first = next(steps)
    if look != "nothing":
        getattr(first, look)()
    assert "transformer" in engine.open
    steps.close()
    assert engine.open == []
    assert flux.phases.current == ""
    assert flux.run(REQUEST, [5])[0].tobytes() == expected
    for _ in flux.steps(REQUEST, 5):
        break
    assert engine.open == []


def test_decoder_stays_loaded_while_previews_are_drawn(flux, engine):
    """Loading it takes longer than a preview; after the loop every look loads it for itself."""
    steps = []
    for step in flux.steps(REQUEST, 5):
        step.preview()
        step.image()
        steps.append(step)
    assert engine.loaded.count("vae_decoder") == 1
    assert engine.open == []
    steps[0].preview()
    steps[0].image()
    assert engine.loaded.count("vae_decoder") == 3
    assert engine.open == []


def test_two_loops_at_once(flux):
    """They share nothing but the graphs."""
    expected = [flux.run(REQUEST, [seed])[0].tobytes() for seed in (1, 2)]
    last = list(zip(flux.steps(REQUEST, 1), flux.steps(REQUEST, 2), strict=True))[-1]
    assert [step.image().tobytes() for step in last] == expected


# Previews


def test_latent_pixels_are_averaged():
    """Latents are laid out as in diffusers: channel 4 * c + 2 * y + x is latent pixel (y, x) of channel c."""
    pixels = np.random.default_rng(0).standard_normal((1, 2, 8, 12), np.float32)

    def tokens(pixels: np.ndarray) -> np.ndarray:
        return np.stack([pixels[0, c, y::2, x::2] for c in range(2) for y in range(2) for x in range(2)])[None]

    assert np.array_equal(shrink(tokens(pixels), 1), tokens(pixels))
    means = pixels.reshape(1, 2, 4, 2, 6, 2).mean((3, 5))
    np.testing.assert_allclose(shrink(tokens(pixels), 2), tokens(means[..., :4, :6]), rtol=1e-6)


def test_incomplete_blocks_repeat_the_border():
    latents = np.random.default_rng(0).standard_normal((1, 4, 3, 5), np.float32)
    assert shrink(latents, 2).shape == (1, 4, 2, 3)
    np.testing.assert_array_equal(shrink(np.full((1, 4, 3, 5), 7, np.float32), 2), 7)
    assert shrink(latents, 7).shape == (1, 4, 1, 1)


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 64), 2), ((512, 512), 2), ((528, 64), 3), ((1024, 768), 4), ((1792, 1792), 7)]
)
def test_previews_are_at_most_256_pixels(size, factor):
    assert preview_factor(*size) == factor


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(64, 96, (32, 48)), (80, 112, (40, 56)), (528, 64, (176, 22))]
)
def test_size_of_a_preview(flux, width, height, expected):
    step = next(flux.steps(Request(prompt="a", width=width, height=height, steps=1), 5))
    preview = step.preview()
    assert (preview.mode, preview.size) == ("RGB", expected)


def test_preview_costs_the_decoder_a_quarter(flux):
    """Of the latent tokens of the whole picture."""
    sizes: list[tuple[int, ...]] = []

    def watch(event: Event) -> None:
        if isinstance(event, GraphRan) and event.component == "vae_decoder":
            sizes.append(event.inputs["latents"].shape[2:])

    flux.watch = watch
    step = next(flux.steps(Request(prompt="a", width=128, height=64, steps=1), 5))
    step.preview()
    step.image()
    assert sizes == [(2, 4), (4, 8)]


def psnr(found: Image.Image, expected: Image.Image) -> float:
    error = np.square(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).mean()
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize(
    ("prompt", "seed"), [("a red circle on a blue background", 3), ("a green star above a yellow square", 4)]
)
def test_previews_look_like_the_picture(demo, prompt, seed):
    """A trained model's previews against the downscaled pictures of their steps, and against the finished one.

    Measured: 28.5 dB for the first prompt and 24.8 for the second, whose mean colours reach 17.5 and 17.2; over 24
    prompts 22.5 to 36.6, and 29.2 at the median.
    """
    for step in demo.steps(Request(prompt=prompt), seed):
        preview = step.preview()
        small = step.image().resize(preview.size, Image.Resampling.BOX)
        mean = Image.new("RGB", small.size, tuple(np.asarray(small).mean((0, 1)).round().astype(int).tolist()))
        assert psnr(preview, small) > 24
        assert psnr(preview, small) > psnr(mean, small) + 6
    assert psnr(preview, demo.generate(prompt, seed=seed).resize(preview.size, Image.Resampling.BOX)) > 24


# Pictures


def test_pictures_come_as_they_are_decoded(checkpoints, engine):
    """Of a batch of two, the second is not decoded before it is asked for."""
    decoded = []

    def watch(event: Event) -> None:
        decoded.extend([1] if isinstance(event, GraphRan) and event.component == "vae_decoder" else [])

    request = Request(prompt="a", width=64, height=64, steps=1)
    with fluxonnx.load(checkpoints.exported(Case("wide")), threads=2, engine=engine, watch=watch) as flux:
        expected = [image.tobytes() for image in flux.run(request, [7, 8])]
        decoded.clear()
        pictures = flux.pictures(request, [7, 8])
        found = []
        for seed, image in pictures:
            found.append((seed, image.tobytes()))
            assert image.info["seed"] == seed
            assert len(decoded) == len(found)
            assert engine.open == ["vae_decoder"]
        assert found == [(7, expected[0]), (8, expected[1])]
        assert engine.loaded.count("vae_decoder") == 2
        assert engine.open == []
        pictures = flux.pictures(request, [7, 8])
        next(pictures)
        pictures.close()
        assert engine.open == []


def test_seeds_in_groups(flux, engine):
    """Narrow models draw one picture at a time: the first is there before the second is begun."""
    pictures = flux.pictures(REQUEST, [1, 2])
    next(pictures)
    assert engine.loaded.count("transformer") == 1
    next(pictures)
    assert engine.loaded.count("transformer") == 2
    pictures.close()


def test_cancelling_frees_everything(flux, engine):
    with pytest.raises(Cancelled, match="after step 2 of 3"):
        list(flux.pictures(REQUEST, [5], callback=lambda step, *_: step < 2))
    assert engine.open == []


def test_a_damaged_picture_frees_everything(flux, engine):
    """With numbers that damaged weights would give."""

    def watch(event: Event) -> None:
        if isinstance(event, GraphRan) and event.component == "vae_decoder":
            event.outputs[0][:] = np.nan

    flux.watch = watch
    with pytest.raises(FluxonnxError, match="NaNs"):
        flux.run(REQUEST, [5])
    assert engine.open == []


# Events


def test_events_come_in_order(checkpoints):
    events: list[Event] = []
    request = Request(prompt="a", width=64, height=64, steps=2, references=(picture(64, 64),))
    with fluxonnx.load(checkpoints.exported(CASE), watch=events.append) as flux:
        flux.run(request, [1])
        assert list(flux.phases.seconds) == ["encode prompt", "encode image", "load transformer", "denoise", "decode"]

    def short(event: Event) -> str:
        if isinstance(event, StepEnded):
            return f"{event.index} of {event.steps}"
        return event.name if isinstance(event, PhaseBegan) else event.component

    assert [short(event) for event in events] == [
        *("encode prompt", "text_encoder", ""),
        *("encode image", "vae_encoder", ""),
        *("load transformer", "denoise"),
        *("conditioning", "transformer", "1 of 2"),
        *("conditioning", "transformer", "2 of 2"),
        *("load transformer", ""),
        *("decode", "vae_decoder", ""),
    ]
    assert not any(isinstance(event, OperatorsTimed) for event in events)
    ran = [event for event in events if isinstance(event, GraphRan)]
    assert sorted(ran[0].inputs) == ["attention_mask", "input_ids"]
    assert ran[0].outputs[0].shape == (1, 512, ran[3].inputs["encoder_hidden_states"].shape[2])
    assert ran[-1].outputs[0].shape == (1, 3, 64, 64)


def test_watch_may_change_between_runs(flux):
    first: list[Event] = []
    second: list[Event] = []
    flux.watch = first.append
    flux.run(REQUEST, [1])
    flux.watch = second.append
    flux.run(REQUEST, [1])
    flux.watch = None
    flux.run(REQUEST, [1])
    assert first[0] == second[0] == PhaseBegan("encode prompt")
    # the prompt is known in the second run
    assert len(first) == len(second) + 1


def test_looks_are_phases_of_their_own(flux):
    step = next(steps := flux.steps(REQUEST, 1))
    phases: list[str] = []
    flux.watch = lambda event: phases.extend([event.name] if isinstance(event, PhaseBegan) else [])
    step.preview()
    step.image()
    steps.close()
    assert phases == ["preview", "denoise", "decode", "denoise", "load transformer", ""]
    assert {"preview", "decode"} < set(flux.phases.seconds)


# Fast previews


def test_fast_previews_look_like_the_picture(demo):
    """Measured: 23.1 dB from the downscaled picture, whose mean colour reaches 17.5."""
    *_, step = demo.steps(Request(prompt="a red circle on a blue background"), 3)
    small = step.image().resize((64, 64), Image.Resampling.BOX)
    mean = Image.new("RGB", small.size, tuple(np.asarray(small).mean((0, 1)).round().astype(int).tolist()))
    assert psnr(step.preview("fast"), small) > max(22, psnr(mean, small) + 4)


def test_fast_previews_load_the_encoder_once(flux, engine):
    for step in [*flux.steps(REQUEST, 5), *flux.steps(REQUEST, 6)]:
        assert step.preview("fast").size == step.preview().size
    assert engine.loaded.count("vae_encoder") == 1
    assert engine.open == []


def test_a_method_that_does_not_exist(flux):
    step = next(flux.steps(REQUEST, 5))
    with pytest.raises(UsageError, match="preview method 'slow' is unknown: choose one of vae, fast"):
        step.preview("slow")
