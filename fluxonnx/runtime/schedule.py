"""Sigmas: at which noise levels the model is asked, as pure functions."""

from __future__ import annotations

import math

import numpy as np


def empirical_mu(image_seq: int, steps: int) -> float:
    """Return the shift that FLUX.2 was tuned with, from the number of image tokens and steps.

    Source: compute_empirical_mu, diffusers pipeline_flux2_klein.py; the constants are fits through 10 and 200 steps.
    """
    at_200_steps = 0.00016927 * image_seq + 0.45666666
    if image_seq > 4300:
        return at_200_steps
    at_10_steps = 8.73809524e-05 * image_seq + 1.89833333
    slope = (at_200_steps - at_10_steps) / 190.0
    return slope * steps + (at_200_steps - 200.0 * slope)


def flow_sigmas(image_seq: int, steps: int) -> np.ndarray:
    """Return the default schedule: evenly spaced sigmas under an exponential time shift.

    Source: FlowMatchEulerDiscreteScheduler.set_timesteps with use_dynamic_shifting, diffusers.

    Args:
        image_seq: Number of latent tokens of the picture.
        steps: Number of denoising steps.

    Returns:
        float32 [steps + 1], falling from 1 to 0.
    """
    mu = empirical_mu(image_seq, steps)
    # float32 before the shift, as set_timesteps does, so that every sigma is the reference's to the last bit
    sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1) ** 1.0)
    return np.append(shifted, 0.0).astype(np.float32)


def timestep(sigma: float | np.float32) -> np.float32:
    """Return what the model gets for a sigma: itself, but rounded on its way through diffusers' 0 to 1000 scale."""
    return np.float32(sigma) * np.float32(1000) / np.float32(1000)
