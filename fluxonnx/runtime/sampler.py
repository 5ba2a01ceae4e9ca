"""The one denoising loop: a generator that yields steps; what is being made is the caller's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# velocity(latents f32 [batch, seq, channels], sigma) -> f32 of the same shape, noise minus picture
Velocity = Callable[[np.ndarray, np.float32], np.ndarray]


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


def sample(velocity: Velocity, latents: np.ndarray, sigmas: np.ndarray) -> Iterator[Step]:
    """Integrate the flow along `sigmas` with Euler steps.

    Source: FlowMatchEulerDiscreteScheduler.step, diffusers.

    Args:
        velocity: The model.
        latents: f32 [batch, image_seq, channels], at noise level sigmas[0].
        sigmas: f32 [steps + 1], falling, the last usually 0.

    Yields:
        A Step after each one.
    """
    steps = len(sigmas) - 1
    for i in range(steps):
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(latents, sigmas[i])
        yield Step(i + 1, steps, float(sigmas[i]), latents)
