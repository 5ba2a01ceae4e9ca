"""Step caching: which calls are made, what takes the place of the others, and that it is close for a trained model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from fluxonnx.runtime.request import Request
from fluxonnx.runtime.sampler import sample
from fluxonnx.runtime.schedule import flow_sigmas
from fluxonnx.runtime.step_cache import cached

BASE_MODEL = Path(__file__).parents[2] / "models/tiny-klein-base"
START = np.ones((1, 4, 2), np.float32)


@pytest.mark.parametrize(
    ("every", "solver", "expected"),
    [
        (1, "euler", [*range(12)]),
        (2, "euler", [0, 1, 2, 4, 6, 8, 10]),
        (3, "euler", [0, 1, 2, 5, 8, 11]),
        (10, "euler", [0, 1, 2]),
        (2, "dpmpp-2m", [0, 1, 2, 4, 6, 8, 10]),
    ],
)
def test_the_calls_that_are_made(every, solver, expected):
    sigmas, called = flow_sigmas(64, 12), []

    def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
        called.append(sigmas.tolist().index(sigma))
        return latents

    list(sample(cached(velocity, every), START, sigmas, solver))
    assert called == expected


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m"])
def test_a_velocity_on_a_line_is_continued_exactly(every, solver):
    sigmas = flow_sigmas(64, 20)

    def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
        return np.full_like(latents, 3 - 2 * sigma)

    *_, full = sample(velocity, START, sigmas, solver)
    *_, found = sample(cached(velocity, every), START, sigmas, solver)
    np.testing.assert_allclose(found.latents, full.latents, rtol=1e-5)


@pytest.mark.slow
def test_a_trained_model_hardly_changes(tmp_path):
    """At 16 steps, to be quick; measured: 41.9 dB."""
    root = tmp_path / "base"
    shutil.copytree(BASE_MODEL, root, ignore=shutil.ignore_patterns("training", "*.png"))
    values = {"prompt": "a red circle on a blue background", "guidance_scale": 2.0}

    def psnr(found, expected) -> float:
        error = np.square(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).mean()
        return float(10 * np.log10(255**2 / error))

    with fluxonnx.load(root) as flux:
        full, half = (flux.run(Request(**values, steps=16, step_cache=n), [3])[0] for n in (1, 2))
    assert half.info["step_cache"] == 2
    assert "step_cache" not in full.info
    assert 38 < psnr(half, full) < 60
