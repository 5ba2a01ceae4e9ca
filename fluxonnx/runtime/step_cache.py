"""Step caching: the model is called in every n-th step, and its velocity continued along a line in between.

A Taylor expansion of first order, as TaylorSeer (Liu et al. 2025) makes it of the features of each block, but of the
velocity alone, so that any solver, mode and engine can use it. With the bundled base model at 50 steps, the PSNR from
the full run, at the median over three prompts, is 51.6 dB for n = 2 (26 calls), 47.0 for n = 3 (18 calls) and 41.2 for
n = 4 (14 calls). 25 and 17 steps instead give 48.7 and 40.6 dB. The second order is worse: 48.2, 40.7 and 28.7 dB. At
16 steps nothing is gained: 41.9 dB for n = 2 (9 calls), 42.2 with 9 steps.
"""

from __future__ import annotations

import numpy as np

from fluxonnx.runtime.sampler import Velocity

# Calls at the start that are never skipped: the velocity changes most in pure noise.
FIRST = 3


def cached(velocity: Velocity, every: int) -> Velocity:
    """Return a velocity that calls the model the first times and then every `every`-th time.

    Args:
        velocity: The model. It is a function of one run: the calls are counted.
        every: 1 for each time.
    """
    if every == 1:
        return velocity
    calls = 0
    known: list[tuple[np.float32, np.ndarray]] = []  # the last two noise levels, and the velocities there

    def along_a_line(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls <= FIRST or (calls - FIRST) % every == 0:
            found = velocity(latents, sigma)
            if known and known[-1][0] == sigma:  # a solver of second order asks twice at one noise level
                known.pop()
            known.append((sigma, found))
            del known[:-2]
            return found
        if len(known) < 2:
            return known[-1][1]
        (before, first), (after, second) = known
        share = np.float32((sigma - after) / (after - before))
        return second + share * (second - first)

    return along_a_line
