"""What onnxruntime is told."""

from __future__ import annotations

from fluxonnx.runtime.session import Session, SessionOptions
from tests.conftest import Case


def test_memory_is_given_back_at_once(checkpoints):
    """No buffer waits for a value of the same shape: in the 4B transformer that would be 0.5 GB of weights."""
    path = checkpoints.exported(Case("odd-heads")) / "vae_decoder.onnx"
    with Session(path, "vae_decoder", SessionOptions()) as session:
        settings = session._session.get_session_options()
    assert not settings.enable_mem_reuse
    assert not settings.enable_mem_pattern
