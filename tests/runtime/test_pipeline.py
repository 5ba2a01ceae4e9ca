"""What `Flux` promises: what is loaded when, what is remembered, what stops a run, what is refused."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.errors import Cancelled, UsageError
from fluxonnx.runtime.memory import BYTES_PER_TOKEN_AND_WIDTH
from fluxonnx.runtime.noise import randn, size_independent_randn
from fluxonnx.runtime.request import Request, resolve
from tests.support import Case

pytestmark = pytest.mark.slow

CASE, BASE = Case("odd-heads"), Case("odd-heads", is_distilled=False)


def picture(width: int = 80, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def flux(checkpoints, engine):
    with fluxonnx.load(checkpoints.exported(CASE), engine=engine) as flux:
        yield flux


@pytest.fixture
def base(checkpoints, engine):
    with fluxonnx.load(checkpoints.exported(BASE), engine=engine) as flux:
        yield flux


def test_one_graph_at_a_time(flux, engine):
    """The text encoder is freed before the transformer is loaded, and that before the VAE."""
    flux.generate("a", 64, 64, steps=1)
    assert engine.loaded == ["text_encoder", "conditioning", "transformer", "vae_decoder"]
    assert engine.most_open == 1


def test_known_prompt_does_not_load_the_encoder(flux, engine):
    for prompt in ("a", "b", "a"):
        flux.generate(prompt, 64, 64, steps=1)
    assert engine.loaded.count("text_encoder") == 2
    flux.close()
    flux.generate("a", 64, 64, steps=1)
    assert engine.loaded.count("text_encoder") == 3
    flux.release_text_encoder()
    flux.generate("c", 64, 64, steps=1)
    assert engine.loaded.count("text_encoder") == 4


def test_prompts_ahead_load_the_encoder_once(flux, engine):
    flux.encode_prompts(["a", "b", "c"])
    for prompt in ("a", "b", "c"):
        flux.generate(prompt, 64, 64, steps=1)
    assert engine.loaded.count("text_encoder") == 1


def test_callback_sees_every_step_and_can_stop(flux):
    seen = []
    flux.generate("a", 64, 96, steps=3, callback=lambda *step: seen.append(step))
    assert [(step, steps) for step, steps, _, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0][2] == 1.0
    assert seen[0][3].shape == (1, 6 * 4, 32)
    with pytest.raises(Cancelled, match="after step 1 of 3"):
        flux.generate("a", 64, 64, steps=3, callback=lambda step, *_: False)
    assert flux.generate("a", 64, 64, steps=1).size == (64, 64)


def test_defaults(flux, base):
    image = flux.generate("a", seed=1)
    assert image.size == (256, 256)
    assert (image.info["steps"], image.info["guidance_scale"], image.info["seed"]) == (4, 1.0, 1)
    first, second = (flux.generate("a", 64, 64, steps=1).info["seed"] for _ in range(2))
    assert first != second
    resolved = resolve(Request(prompt="a"), False, 16)
    assert (resolved.steps, resolved.guidance_scale) == (50, 4.0)


def test_info_makes_the_picture_again(base):
    """Every field that decides about the pixels is in `info`."""
    image = base.generate("a", 64, 96, 3, 9, guidance_scale=2.0, negative_prompt="b", sampler="heun", schedule="power")
    fields = {name: image.info[name] for name in Request.__dataclass_fields__ if name in image.info}
    assert base.run(Request(**fields), [image.info["seed"]])[0].tobytes() == image.tobytes()


def test_warnings_name_the_caller(checkpoints, open_flux):
    """The line of the program that asked for the picture, not one inside the package."""
    flux = open_flux(checkpoints.exported(CASE), free_memory=lambda: 1000)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        flux.generate("many words " * 20, 640, 64, steps=1, max_sequence_length=24)
    assert [str(warning.message).split(":")[0].split("(")[0] for warning in found] == [
        "the prompt is longer than 24 tokens; this was cut",
        "memory is short ",
    ]
    assert {warning.filename for warning in found} == {__file__}


# Image-to-image


@pytest.mark.parametrize("size", [(64, 64), (101, 67), (30, 20), (2000, 64)])
def test_strength_0_returns_the_input(flux, engine, size):
    """Pixel for pixel, whatever its size, without loading anything."""
    image = picture(*size)
    assert flux.img2img("a", image, strength=0).tobytes() == image.tobytes()
    assert engine.loaded == []


def test_strength_0_at_another_size(flux):
    assert flux.img2img("a", picture(), strength=0, width=64, height=64).size == (64, 64)


def test_strength_1_keeps_only_the_size(flux):
    image = picture(90, 70)
    found = flux.img2img("a", image, strength=1, seed=3)
    assert found.size == (80, 64)
    assert found.tobytes() == flux.generate("a", 80, 64, seed=3).tobytes()


def test_strength_moves_away_from_the_input(flux):
    """The latents a run starts from are the input's with less and less weight."""
    image, distances = picture(), []
    for strength in (0.25, 0.5, 0.75, 1.0):
        steps = []
        flux.img2img("a", image, strength=strength, seed=3, callback=lambda *step, keep=steps: keep.append(step[:3]))
        distances.append((len(steps), steps[0][2]))
    assert [count for count, _ in distances] == [1, 2, 3, 4]
    assert sorted(sigma for _, sigma in distances) == [sigma for _, sigma in distances]


def test_sizes_follow_the_input(flux):
    assert flux.img2img("a", picture(100, 70), seed=1).size == (96, 64)
    assert flux.edit("a", [picture(100, 70), picture(64, 64)], seed=1).size == (96, 64)
    assert flux.edit("a", [picture(100, 70)], seed=1, width=64, height=80).size == (64, 80)
    assert flux.img2img("a", picture(100, 70), seed=1, references=(picture(64, 64),)).size == (96, 64)


def test_references_change_the_picture_and_their_order_counts(flux):
    a, b = picture(64, 64, 1), picture(64, 64, 2)
    drawn = [flux.edit("x", images, seed=1).tobytes() for images in ([a], [b], [a, b], [b, a])]
    assert len({*drawn, flux.generate("x", 64, 64, seed=1).tobytes()}) == 5


# Seeds and batches


@pytest.mark.parametrize("name", ["odd-heads", "wide"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_batch_is_bitwise_what_it_is_alone(checkpoints, engine, name, size):
    """So that a picture out of a batch can be made again from its seed; "wide" really runs several in one pass."""
    request = Request(prompt="a", width=size[0], height=size[1])
    with fluxonnx.load(checkpoints.exported(Case(name)), threads=2, engine=engine) as flux:
        alone = [flux.run(request, [seed])[0].tobytes() for seed in (1, 2, 3)]
        engine.batches.clear()
        assert alone == [image.tobytes() for image in flux.run(request, [1, 2, 3])]
    assert set(engine.batches) == {3 if name == "wide" else 1}


@pytest.mark.parametrize(("options", "expected"), [({}, [3, 2]), ({"low_memory": True}, [1] * 5)])
def test_batches_fit_into_memory(checkpoints, open_flux, engine, options, expected):
    """Half of the free memory, but one picture at a time with `low_memory`."""
    path, request = checkpoints.exported(Case("wide")), Request(prompt="a", width=64, height=64, steps=1)
    three = batch_bytes(tokens=512 + 16, width=264, pictures=3)
    flux = open_flux(path, threads=2, engine=engine, free_memory=lambda: 2 * three, **options)
    pictures = [image.tobytes() for image in flux.run(request, [1, 2, 3, 4, 5])]
    assert engine.batches == expected
    assert pictures[3] == flux.run(request, [4])[0].tobytes()


def batch_bytes(tokens: int, width: int, pictures: int) -> int:
    return pictures * tokens * width * BYTES_PER_TOKEN_AND_WIDTH


def test_size_independent_noise_is_a_subsample():
    """flux_init_noise of flux2.c: value (y, x) is that of the largest grid at (y * 112 // rows, x * 112 // columns)."""
    large = randn(5, (1, 3, 112, 112))
    found = size_independent_randn(5, (1, 3, 16, 20), 112)
    for y, x in ((0, 0), (3, 7), (15, 19)):
        assert np.array_equal(found[0, :, y, x], large[0, :, y * 112 // 16, x * 112 // 20])
    assert np.array_equal(size_independent_randn(5, (1, 3, 112, 112), 112), large)
    half, full = (size_independent_randn(5, (1, 3, n, n), 112) for n in (14, 28))
    assert np.array_equal(half, full[:, :, ::2, ::2])


# Cache on disk


def encode(path: Path, cache: Path, prompt: str) -> None:
    with fluxonnx.load(path, cache_dir=cache) as flux:
        flux.encode_prompts([prompt])


def test_cached_prompt_never_loads_the_encoder(checkpoints, tmp_path, engine):
    path = checkpoints.exported(CASE)
    pictures = []
    for _ in range(2):
        with fluxonnx.load(path, cache_dir=tmp_path / "cache", engine=engine) as flux:
            pictures.append(flux.generate("a cat", 64, 64, seed=1).tobytes())
    assert pictures[0] == pictures[1]
    assert engine.loaded.count("text_encoder") == 1
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:50])
    with fluxonnx.load(path, cache_dir=tmp_path / "cache", engine=engine) as flux:
        assert flux.generate("a cat", 64, 64, seed=1).tobytes() == pictures[0]
    assert engine.loaded.count("text_encoder") == 2


def test_cache_tells_models_builds_and_lengths_apart(checkpoints, tmp_path):
    encode(checkpoints.exported(CASE), tmp_path, "a")
    encode(checkpoints.exported(Case("one-double-three-single")), tmp_path, "a")
    assert len(list(tmp_path.glob("*.npy"))) == 2
    with fluxonnx.load(checkpoints.exported(CASE, "fp32"), precision="fp32", cache_dir=tmp_path) as flux:
        flux.encode_prompts(["a"])
        flux.encode_prompts(["a"], 64)
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_two_processes_may_share_a_cache(checkpoints, tmp_path):
    path = checkpoints.exported(CASE)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=encode, args=(path, tmp_path, "the same")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".npy", ".tokens"]


def test_impossible_cache_directory(checkpoints, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cache directory .* can't be used"):
        fluxonnx.load(checkpoints.exported(CASE), cache_dir=tmp_path / "file")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"width": 72}, r"width 72 can't be drawn.*nearest is 64"),
        ({"height": 4112}, "nearest is 4096"),
        ({"width": 1000, "height": 700}, r"1000x700 can't be drawn.* nearest .*-W 1008 -H 704"),
        ({"width": 4096, "height": 1040}, "4 megapixels"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed -1"),
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5"),
        ({"image": picture(), "strength": 1.2}, r"strength is 1\.2"),
        ({"image": picture(50, 64)}, "width 48 can't be drawn"),
        ({"references": (picture(),) * 17}, "17 reference images are too many"),
        ({"references": (picture(40, 64),)}, "at least 64"),
        ({"sampler": "ddim"}, "sampler 'ddim' is unknown: choose one of euler"),
        ({"schedule": "cosine"}, "schedule 'cosine' is unknown: choose one of flow"),
        ({"schedule": "custom"}, "go together"),
        ({"sigmas": (1.0, 0.5)}, "go together"),
        ({"schedule": "custom", "sigmas": (0.5, 0.6)}, "lower than the one before"),
        ({"schedule": "custom", "sigmas": (1.0, 0.6), "steps": 3}, "make 2"),
        ({"power_alpha": 0}, "power_alpha"),
        ({"noise": "pink"}, "noise 'pink' is unknown"),
        ({"max_sequence_length": 100}, "multiple of 8"),
    ],
)
def test_impossible_requests(flux, engine, options, message):
    """Refused before anything is loaded; the generators raise when they are made, not at their first step."""
    arguments: dict[str, Any] = {"prompt": "a", "seed": 1, **options}
    with pytest.raises(UsageError, match=message):
        flux.generate(**arguments)
    seed = arguments.pop("seed")
    with pytest.raises(UsageError, match=message):
        flux.pictures(Request(**arguments), [seed])
    with pytest.raises(UsageError, match=message):
        flux.steps(Request(**arguments), seed)
    if seed == 1:
        with pytest.raises(UsageError, match=message):
            flux.check(Request(**arguments))
    assert engine.loaded == []


def test_edit_without_pictures(flux):
    with pytest.raises(UsageError, match="no image"):
        flux.edit("a", [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.0}, "guidance scale 3 on a model that was distilled"),
        ({"negative_prompt": "b"}, "negative prompt is ignored"),
    ],
)
def test_distilled_model_warns_of_guidance(flux, engine, options, message):
    """It guides where it is asked to."""
    with pytest.warns(UserWarning, match=message):
        image = flux.generate("a", 64, 64, seed=1, **options)
    guided = "guidance_scale" in options
    assert len(engine.batches) == (8 if guided else 4)
    assert (image.tobytes() == flux.generate("a", 64, 64, seed=1).tobytes()) != guided


def test_guidance_1_skips_the_unconditional_pass(base, engine):
    base.generate("a", 64, 64, steps=2, guidance_scale=1)
    assert len(engine.batches) == 2
    base.generate("a", 64, 64, steps=2)
    assert len(engine.batches) == 6
