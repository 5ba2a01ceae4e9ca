"""Sigmas: the noise levels at which the model is called, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fluxonnx.errors import UsageError


def empirical_mu(image_seq: int, steps: int) -> float:
    """Return the shift that FLUX.2 was tuned with, for a number of image tokens and of steps.

    Source: compute_empirical_mu, diffusers pipeline_flux2_klein.py; the constants are fits through 10 and 200 steps.
    """
    at_200_steps = 0.00016927 * image_seq + 0.45666666
    if image_seq > 4300:
        return at_200_steps
    at_10_steps = 8.73809524e-05 * image_seq + 1.89833333
    slope = (at_200_steps - at_10_steps) / 190.0
    return slope * steps + (at_200_steps - 200.0 * slope)


def flow_sigmas(image_seq: int, steps: int) -> np.ndarray:
    """Return the schedule that the model was trained for: evenly spaced sigmas under an exponential time shift.

    Source: FlowMatchEulerDiscreteScheduler.set_timesteps with use_dynamic_shifting, diffusers.

    Args:
        image_seq: Number of latent tokens of the picture.
        steps: Number of denoising steps.

    Returns:
        float32 [steps + 1], falling from 1 to 0.
    """
    shift = math.exp(empirical_mu(image_seq, steps))
    # float32 before the shift, as set_timesteps does, so that every sigma equals the reference's bit for bit
    sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    return np.append(shift / (shift + (1 / sigmas - 1)), 0.0).astype(np.float32)


def power_sigmas(steps: int, alpha: float) -> np.ndarray:
    """Return 1 - (i / steps)**alpha: alpha 1 is linear, more spends more steps at high noise.

    Source: flux_linear_schedule and flux_power_schedule, antirez/flux2.c flux_sample.c.

    Returns:
        float32 [steps + 1], falling from 1 to 0.
    """
    return (1.0 - np.linspace(0.0, 1.0, steps + 1) ** alpha).astype(np.float32)


def custom_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    """Return sigmas unchanged, without any shift; 0 is appended unless they end with it.

    Raises:
        UsageError: They do not fall strictly, or are not in [0, 1].
    """
    values = list(sigmas)
    if not values or not all(0 <= sigma <= 1 for sigma in values) or values[0] == 0:
        raise UsageError(f"sigmas {values} can't be a schedule: they must be from 0 to 1, the first above 0")
    if any(after >= before for before, after in pairwise(values)):
        raise UsageError(f"sigmas {values} can't be a schedule: each must be lower than the one before")
    return np.array(values if values[-1] == 0 else [*values, 0.0], np.float32)


def make_sigmas(
    schedule: str, image_seq: int, steps: int, power_alpha: float, sigmas: Sequence[float] | None
) -> np.ndarray:
    """Return a schedule by its name, "flow", "linear", "power" or "custom": float32 [steps + 1]."""
    if schedule == "custom":
        return custom_sigmas(sigmas or ())
    if schedule == "flow":
        return flow_sigmas(image_seq, steps)
    return power_sigmas(steps, power_alpha if schedule == "power" else 1.0)


def start_step(steps: int, strength: float) -> int:
    """Return how many steps at the start of a schedule image-to-image leaves out.

    steps * strength of them run, rounded up. At 4 steps, strength 0.75 and 0.7 run the last three, 0.5 the last two,
    anything up to 0.25 the last one.

    Source: get_timesteps, diffusers pipeline_flux2_klein_inpaint.py.
    """
    return int(max(steps - min(steps * strength, steps), 0))


def timestep(sigma: float | np.float32) -> np.float32:
    """Return the timestep of a sigma: the same number, rounded as in diffusers, which scales it by 1000 and back."""
    return np.float32(sigma) * np.float32(1000) / np.float32(1000)
