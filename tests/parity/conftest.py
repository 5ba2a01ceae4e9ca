"""The reference: diffusers and transformers in float32; these tests are skipped where they are not installed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# Graphs agree with the reference to this relative L2 error: float32 round-off of another order of summation, through
# up to thirty layers. An error of meaning (a wrong epsilon, a transposed axis) shows at 1e-3 and above.
GRAPH_TOLERANCE = 1e-5
# A whole run multiplies the graphs' error by its steps.
LATENTS_TOLERANCE = 1e-4
# A pixel may fall on the other side of a rounding.
IMAGE_TOLERANCE = 1


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error; infinite where shapes differ or values are not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@lru_cache(maxsize=4)
def _reference(path: Path) -> SimpleNamespace:
    import torch
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def reference():
    """reference(path) -> Flux2KleinPipeline in float32."""
    return _reference
