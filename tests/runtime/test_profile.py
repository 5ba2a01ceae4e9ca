"""onnxruntime's profile, summed up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import fluxonnx
from fluxonnx.errors import FluxonnxError
from fluxonnx.runtime.profile import Operator, Profile
from tests.conftest import Case


def session(profile: Profile, component: str, text: str) -> SimpleNamespace:
    """What `Session` hands over: something that has written `text` where it was told to."""
    settings = SimpleNamespace()
    profile.start(settings, component)
    assert settings.enable_profiling
    path = Path(f"{settings.profile_file_prefix}_now.json")
    path.write_text(text)
    return SimpleNamespace(end_profiling=lambda: str(path), path=path)


def event(name: str, op: str, microseconds: int, cat: str = "Node") -> dict:
    return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": op}}


def test_sums_and_shares():
    first = [
        event("a_kernel_time", "Gemm", 600),
        event("a_fence_before", "Gemm", 5000),
        event("model_run", "", 9000, "Session"),
        event("b_kernel_time", "Add", 300),
    ]
    with Profile() as profile:
        for events in (first, [event("a_kernel_time", "Gemm", 100)]):
            opened = session(profile, "transformer", json.dumps(events))
            profile.collect("transformer", opened)
            assert not opened.path.exists()
        assert profile.operators() == {
            "transformer": [Operator("Gemm", 2, 700e-6, 0.7), Operator("Add", 1, 300e-6, 0.3)],
        }
    assert not opened.path.parent.exists()


def test_damaged_file():
    """As a full disk leaves it."""
    with Profile() as profile, pytest.raises(FluxonnxError, match="the profile of transformer can't be read"):
        profile.collect("transformer", session(profile, "transformer", '[{"cat": "No'))


def test_of_a_real_run(checkpoints):
    with Profile() as profile:
        with fluxonnx.load(checkpoints.exported(Case("odd-heads")), profile=profile) as flux:
            flux.generate("a cat", 64, 64, steps=1, seed=1)
        assert list(profile.operators()) == ["text_encoder", "transformer", "conditioning", "vae_decoder"]
        assert not any(Path(profile._folder.name).iterdir())
