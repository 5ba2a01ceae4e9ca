"""The one denoising loop: a generator that yields steps; what is being made is the caller's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# velocity(latents f32 [batch, seq, channels], sigma) -> f32 of the same shape, noise minus picture
Velocity = Callable[[np.ndarray, np.float32], np.ndarray]

# advance(velocity, latents, sigma, next sigma) -> latents at the next sigma
Advance = Callable[[Velocity, np.ndarray, np.float32, np.float32], np.ndarray]


@dataclass(frozen=True)
class Step:
    """The state after a step.

    Attributes:
        index: 1 after the first step.
        steps: How many there are.
        sigma: The noise level the step started from, in [0, 1].
        latents: f32 [batch, image_seq, channels], after the step.
    """

    index: int
    steps: int
    sigma: float
    latents: np.ndarray


def sample(velocity: Velocity, latents: np.ndarray, sigmas: np.ndarray, solver: str = "euler") -> Iterator[Step]:
    """Walk the flow from noise towards a picture along `sigmas`.

    Args:
        velocity: The model, with all that conditions it.
        latents: f32 [batch, image_seq, channels], at noise level sigmas[0].
        sigmas: f32 [steps + 1], falling, the last usually 0.
        solver: A key of `SOLVERS`.

    Yields:
        A Step after each one.
    """
    advance = SOLVERS[solver]()
    steps = len(sigmas) - 1
    for i in range(steps):
        latents = advance(velocity, latents, sigmas[i], sigmas[i + 1])
        yield Step(i + 1, steps, float(sigmas[i]), latents)


def euler() -> Advance:
    """First order, one model call a step (FlowMatchEulerDiscreteScheduler.step, diffusers)."""
    return lambda velocity, x, sigma, following: x + (following - sigma) * velocity(x, sigma)


def heun() -> Advance:
    """Second order, two model calls a step but for the last (Karras et al. 2022, algorithm 1, on a straight flow)."""

    def advance(velocity: Velocity, x: np.ndarray, sigma: np.float32, following: np.float32) -> np.ndarray:
        first = velocity(x, sigma)
        guess = x + (following - sigma) * first
        if following == 0:
            return guess
        second = velocity(guess, following)
        return x + (following - sigma) * np.float32(0.5) * (first + second)

    return advance


def dpmpp_2m() -> Advance:
    """Second order from one model call a step: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    On a straight flow alpha = 1 - sigma; steps from pure noise and to the clean picture, where half the logarithmic
    signal-to-noise ratio lambda = log(alpha / sigma) is infinite, are of first order.
    """
    previous: tuple[np.ndarray, float] | None = None  # the last prediction of the picture, and its lambda

    def advance(velocity: Velocity, x: np.ndarray, sigma: np.float32, following: np.float32) -> np.ndarray:
        nonlocal previous
        picture = x - sigma * velocity(x, sigma)
        if following == 0:
            return picture
        here, there = _half_log_snr(sigma), _half_log_snr(following)
        step = there - here
        estimate = picture
        if previous is not None and math.isfinite(previous[1]):
            ratio = (here - previous[1]) / step
            estimate = picture + np.float32(0.5 / ratio) * (picture - previous[0])
        previous = (picture, here)
        # alpha_next * (1 - exp(-step)), where exp(-step) = 0 when coming from pure noise
        weight = np.float32((1 - float(following)) * -math.expm1(-step))
        return following / sigma * x + weight * estimate

    return advance


def _half_log_snr(sigma: np.float32) -> float:
    return math.log((1 - float(sigma)) / float(sigma)) if sigma < 1 else -math.inf


SOLVERS: dict[str, Callable[[], Advance]] = {"euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}
