"""Schedules and solvers against formulas of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fluxonnx.errors import UsageError
from fluxonnx.runtime.sampler import SOLVERS, sample
from fluxonnx.runtime.schedule import (
    custom_sigmas,
    empirical_mu,
    flow_sigmas,
    make_sigmas,
    power_sigmas,
    start_step,
    timestep,
)


def test_flow_schedule_is_an_exponential_time_shift():
    """t -> e^mu / (e^mu + 1/t - 1), written as a shift of the log-odds of t by mu."""
    for image_seq, steps in ((16, 4), (1024, 4), (4096, 50), (5000, 8)):
        sigmas = flow_sigmas(image_seq, steps)
        assert (sigmas.dtype, len(sigmas), sigmas[0], sigmas[-1]) == (np.float32, steps + 1, 1, 0)
        for i in range(1, steps):
            t = 1 - i / steps
            log_odds = math.log(t / (1 - t)) + empirical_mu(image_seq, steps)
            assert sigmas[i] == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=1e-6)


def test_empirical_mu_goes_through_its_fits():
    """Linear in steps between the fits at 10 and at 200 steps; above 4300 tokens the latter alone."""
    for image_seq in (256, 1024, 4096):
        assert empirical_mu(image_seq, 10) == pytest.approx(8.73809524e-05 * image_seq + 1.89833333)
        assert empirical_mu(image_seq, 200) == pytest.approx(0.00016927 * image_seq + 0.45666666)
    assert empirical_mu(5000, 4) == empirical_mu(5000, 50) == pytest.approx(0.00016927 * 5000 + 0.45666666)


def test_linear_and_power_schedules():
    assert make_sigmas("linear", 256, 4, 2.0, None).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert make_sigmas("power", 256, 4, 2.0, None).tolist() == [1, 1 - 1 / 16, 1 - 4 / 16, 1 - 9 / 16, 0]
    assert np.array_equal(power_sigmas(7, 1.0), make_sigmas("linear", 256, 7, 3.0, None))


def test_custom_schedule_is_used_unchanged():
    assert custom_sigmas([1, 0.5]).tolist() == [1, 0.5, 0]
    assert custom_sigmas([0.5, 0.25, 0]).tolist() == [0.5, 0.25, 0]


@pytest.mark.parametrize("sigmas", [[], [0], [0.5, 0.5], [0.2, 0.4], [1.5, 1], [1, -0.1], [float("nan")]])
def test_impossible_custom_schedules(sigmas):
    with pytest.raises(UsageError, match="can't be a schedule"):
        custom_sigmas(sigmas)


def test_start_step_table():
    """The table of the README: how many of the steps run for a strength."""
    strengths = (0.1, 0.25, 0.5, 0.7, 0.75, 0.9, 1.0)
    assert [4 - start_step(4, strength) for strength in strengths] == [1, 1, 2, 3, 3, 4, 4]
    assert [50 - start_step(50, strength) for strength in strengths] == [5, 13, 25, 35, 38, 45, 50]


def test_timestep_is_rounded_on_its_way_through_thousand():
    """As diffusers rounds it; most sigmas come back unchanged, these do not."""
    assert timestep(np.float32(1)) == 1
    sigmas = np.linspace(0.1, 1, 1000, dtype=np.float32)
    expected = sigmas * np.float32(1000) / np.float32(1000)
    assert (expected != sigmas).any()
    assert [timestep(sigma) for sigma in sigmas] == list(expected)


# A flow whose solution is known: pictures are normal with mean m and deviation s, so that the latents at noise level
# sigma are normal with variance v = ((1 - sigma) s)^2 + sigma^2, and keep their distance from the mean in deviations.
MEAN, DEVIATION = 0.7, 0.3


def variance(sigma: float) -> float:
    return ((1 - sigma) * DEVIATION) ** 2 + sigma**2


def gaussian_velocity(x: np.ndarray, sigma: np.float32) -> np.ndarray:
    """E[noise - picture | x]."""
    s = float(sigma)
    centred = x - (1 - s) * MEAN
    return (s * centred - (1 - s) * DEVIATION**2 * centred) / variance(s) - MEAN


def solve(solver: str, sigmas: np.ndarray, x: np.ndarray) -> np.ndarray:
    *_, last = sample(gaussian_velocity, x, sigmas, solver)
    return last.latents


def error(solver: str, steps: int, first: float = 0.9, last: float = 0.1) -> float:
    """Error of a walk from one noise level to another, where the exact answer is known."""
    x = np.linspace(-2, 2, 9)[None, :, None]  # float64, so that only the error of the method shows
    sigmas = np.linspace(first, last, steps + 1)
    exact = (1 - last) * MEAN + (x - (1 - first) * MEAN) * math.sqrt(variance(last) / variance(first))
    return float(np.abs(solve(solver, sigmas, x) - exact).max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_order_of_convergence(solver, order):
    """Twice the steps make the error 2^order times smaller."""
    found = math.log2(error(solver, 40) / error(solver, 80))
    assert found == pytest.approx(order, abs=0.25)


def test_second_order_solvers_beat_euler():
    assert error("heun", 10) < error("euler", 20) / 2
    assert error("dpmpp-2m", 20) < error("euler", 20) / 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_constant_velocity_is_exact(solver):
    """A straight flow needs one step; noise and picture come back exactly, from sigma 1 to 0."""
    noise, picture = np.full((1, 2, 1), 3.0), np.full((1, 2, 1), -1.0)
    for steps in (1, 2, 5):
        *_, last = sample(lambda x, sigma: noise - picture, noise, np.linspace(1, 0, steps + 1), solver)
        assert np.allclose(last.latents, picture, atol=1e-12)


def test_dpmpp_2m_equals_its_published_form():
    """Against algorithm 2 of Lu et al. written in exponentials of lambda, on four uneven steps."""
    x = np.array([[[0.5], [-1.0]]])
    sigmas = np.array([0.95, 0.7, 0.4, 0.15])
    *_, last = sample(gaussian_velocity, x, sigmas, "dpmpp-2m")

    def lam(s):
        return np.log((1 - s) / s)

    def predict(x, s):
        return x - s * gaussian_velocity(x, s)

    y = predict(x, sigmas[0])
    previous = y
    h = lam(sigmas[1]) - lam(sigmas[0])
    x = sigmas[1] / sigmas[0] * x - (1 - sigmas[1]) * (np.exp(-h) - 1) * y
    for i in (2, 3):
        y = predict(x, sigmas[i - 1])
        h_last, h = h, lam(sigmas[i]) - lam(sigmas[i - 1])
        r = h_last / h
        d = (1 + 1 / (2 * r)) * y - 1 / (2 * r) * previous
        x = sigmas[i] / sigmas[i - 1] * x - (1 - sigmas[i]) * (np.exp(-h) - 1) * d
        previous = y
    assert np.allclose(last.latents, x, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_estimate_is_the_picture_that_the_velocity_leads_to(solver):
    """In all solvers the same formula, of the state before the step; bit for bit the result of a step to sigma 0."""
    x = np.random.default_rng(0).standard_normal((1, 5, 3), np.float32)
    sigmas = np.array([1, 0.8, 0.3, 0], np.float32)
    for i, step in enumerate(sample(lambda x, sigma: np.sin(3 * x) + sigma, x, sigmas, solver)):
        assert step.estimate().dtype == np.float32
        assert np.array_equal(step.estimate(), x - sigmas[i] * (np.sin(3 * x) + sigmas[i]))
        assert np.array_equal(step.before, x)
        x = step.latents
    assert step.estimate().tobytes() == step.latents.tobytes()


def test_steps_are_numbered_and_carry_sigma():
    steps = list(sample(gaussian_velocity, np.zeros((1, 1, 1)), np.array([1, 0.5, 0]), "euler"))
    assert [(step.index, step.steps, step.sigma) for step in steps] == [(1, 2, 1.0), (2, 2, 0.5)]


def test_heun_calls_the_model_twice_but_once_at_the_end():
    calls = []
    list(sample(lambda x, sigma: calls.append(sigma) or x, np.zeros((1, 1, 1)), np.array([1, 0.5, 0]), "heun"))
    assert calls == [1, 0.5, 0.5]
