"""What onnxruntime is told about memory."""

from __future__ import annotations

import numpy as np
import pytest

from fluxonnx.runtime.session import Session, SessionOptions
from tests.conftest import Case

CASE = Case("odd-heads")


@pytest.mark.parametrize("low_memory", [False, True])
def test_low_memory_frees_at_once(checkpoints, low_memory):
    """Without an arena, and no value waits for another one of its size; results are bitwise the same."""
    path = checkpoints.exported(CASE) / "vae_decoder.onnx"
    latents = np.random.default_rng(0).standard_normal((1, 32, 4, 4), np.float32)
    with Session(path, "vae_decoder", SessionOptions()) as plain:
        expected = plain.run(latents=latents)[0]
    with Session(path, "vae_decoder", SessionOptions(low_memory=low_memory)) as session:
        settings = session._session.get_session_options()
        assert settings.enable_mem_reuse is not low_memory
        assert settings.enable_cpu_mem_arena is not low_memory
        np.testing.assert_array_equal(session.run(latents=latents)[0], expected)
