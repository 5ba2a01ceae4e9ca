"""What onnxruntime is told."""

from __future__ import annotations

import pytest

from fluxonnx.manifest import Build
from fluxonnx.runtime import session as sessions
from fluxonnx.runtime.session import Session, SessionOptions
from tests.conftest import Case

UNSIGNED = "session.x64quantprecision"


def test_memory_is_given_back_at_once(checkpoints):
    """No buffer waits for a value of the same shape: in the 4B transformer that would be 0.5 GB of weights."""
    path = checkpoints.exported(Case("odd-heads")) / "vae_decoder.onnx"
    with Session(path, "vae_decoder", SessionOptions()) as session:
        settings = session._session.get_session_options()
    assert not settings.enable_mem_reuse
    assert not settings.enable_mem_pattern


@pytest.mark.parametrize(
    ("exact", "products", "made_unsigned"),
    [(True, "exact", False), (True, "pairs", False), (False, "exact", True), (False, "pairs", False)],
)
def test_weights_are_made_unsigned_only_where_products_would_saturate(
    checkpoints, monkeypatch, exact, products, made_unsigned
):
    """It halves the speed of int8 on processors that need no such thing."""
    monkeypatch.setattr(sessions, "adds_int8_products_exactly", lambda: exact)
    path = checkpoints.exported(Case("odd-heads")) / "conditioning.onnx"
    build = Build("int8", "ort", 23, {"products": products})
    with Session(path, "conditioning", SessionOptions(), build) as session:
        settings = session._session.get_session_options()
    if made_unsigned:
        assert settings.get_session_config_entry(UNSIGNED) == "1"
    else:
        with pytest.raises(RuntimeError):
            settings.get_session_config_entry(UNSIGNED)
