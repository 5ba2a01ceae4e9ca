"""The reference: diffusers and transformers in float32; these tests are skipped where they are not installed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import fluxonnx
from tests.support import Case


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


@pytest.fixture
def both(checkpoints, reference):
    """both(case) -> a Flux, the reference pipeline, and the hidden states they use."""
    opened = []

    def both(case: Case):
        flux = fluxonnx.load(checkpoints.exported(case))
        opened.append(flux)
        return flux, reference(checkpoints.get(case)), flux.text_encoder_out_layers

    yield both
    for flux in opened:
        flux.close()
