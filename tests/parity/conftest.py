"""The reference: diffusers and transformers in float32; these tests are skipped where they are not installed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest


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
