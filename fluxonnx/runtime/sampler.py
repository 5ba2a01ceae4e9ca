"""The denoising loop as a generator of steps, and the solvers that it can use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# velocity(latents f32 [batch, seq, channels], sigma) -> f32 of the same shape, noise minus picture
Velocity = Callable[[np.ndarray, np.float32], np.ndarray]

# hold(latents, sigma) -> the latents at noise level sigma, with what has to stay as it is put back
Hold = Callable[[np.ndarray, np.float32], np.ndarray]

# advance(velocity, latents, sigma, next sigma) -> latents at the next sigma, and the velocity at this sigma
Advanced = tuple[np.ndarray, np.ndarray]
Advance = Callable[[Velocity, np.ndarray, np.float32, np.float32], Advanced]


@dataclass(frozen=True)
class SolverStep:
    """The state after a step.

    Attributes:
        index: 1 after the first step.
        steps: How many there are.
        sigma: The noise level at the start of the step, in [0, 1].
        latents: f32 [batch, image_seq, channels], after the step.
        before: Likewise, before the step.
        velocity: Of `before`.
        hold: Puts back what has to stay as it is.
    """

    index: int
    steps: int
    sigma: float
    latents: np.ndarray
    before: np.ndarray
    velocity: np.ndarray
    hold: Hold

    def estimate(self) -> np.ndarray:
        """Return the clean picture that the model expected before the step: f32 [batch, image_seq, channels].

        It is where a straight line along the velocity ends, and so equals `latents` after a step to sigma 0.
        """
        return self.hold(self.before - self.sigma * self.velocity, np.float32(0))


def as_it_is(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
    """Put nothing back."""
    return latents


def sample(
    velocity: Velocity, latents: np.ndarray, sigmas: np.ndarray, solver: str = "euler", hold: Hold = as_it_is
) -> Iterator[SolverStep]:
    """Walk from noise to a picture along `sigmas`.

    Args:
        velocity: The model, with everything that conditions it.
        latents: f32 [batch, image_seq, channels], at noise level sigmas[0].
        sigmas: f32 [steps + 1], falling, the last usually 0.
        solver: A key of `SOLVERS`.
        hold: Called after each step, with the noise level that it led to.

    Yields:
        The state after each step.
    """
    advance = SOLVERS[solver]()
    steps = len(sigmas) - 1
    for i in range(steps):
        before = latents
        latents, found = advance(velocity, before, sigmas[i], sigmas[i + 1])
        latents = hold(latents, sigmas[i + 1])
        yield SolverStep(i + 1, steps, float(sigmas[i]), latents, before, found, hold)


def euler() -> Advance:
    """First order, one model call per step (FlowMatchEulerDiscreteScheduler.step, diffusers)."""

    def advance(velocity: Velocity, x: np.ndarray, sigma: np.float32, following: np.float32) -> Advanced:
        found = velocity(x, sigma)
        return x + (following - sigma) * found, found

    return advance


def heun() -> Advance:
    """Second order, two model calls per step, one in the last (Karras et al. 2022, algorithm 1, on a straight flow)."""

    def advance(velocity: Velocity, x: np.ndarray, sigma: np.float32, following: np.float32) -> Advanced:
        first = velocity(x, sigma)
        guess = x + (following - sigma) * first
        if following == 0:
            return guess, first
        second = velocity(guess, following)
        return x + (following - sigma) * np.float32(0.5) * (first + second), first

    return advance


def dpmpp_2m() -> Advance:
    """Second order from one model call per step: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    On a straight flow, alpha = 1 - sigma. Half the logarithmic signal-to-noise ratio, lambda = log(alpha / sigma), is
    infinite for pure noise and for the clean picture, so the steps from and to these are of first order.
    """
    previous: tuple[np.ndarray, float] | None = None  # the last prediction of the picture, and its lambda

    def advance(velocity: Velocity, x: np.ndarray, sigma: np.float32, following: np.float32) -> Advanced:
        nonlocal previous
        found = velocity(x, sigma)
        picture = x - sigma * found
        if following == 0:
            return picture, found
        here, there = _half_log_snr(sigma), _half_log_snr(following)
        step = there - here
        target = picture
        if previous is not None and math.isfinite(previous[1]):
            ratio = (here - previous[1]) / step
            target = picture + np.float32(0.5 / ratio) * (picture - previous[0])
        previous = (picture, here)
        # alpha_next * (1 - exp(-step)), where exp(-step) = 0 when coming from pure noise
        weight = np.float32((1 - float(following)) * -math.expm1(-step))
        return following / sigma * x + weight * target, found

    return advance


def _half_log_snr(sigma: np.float32) -> float:
    return math.log((1 - float(sigma)) / float(sigma)) if sigma < 1 else -math.inf


SOLVERS: dict[str, Callable[[], Advance]] = {"euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}
