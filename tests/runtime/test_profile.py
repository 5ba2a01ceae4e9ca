"""onnxruntime's profile, summed up by operator type."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fluxonnx
from fluxonnx.errors import FluxonnxError
from fluxonnx.runtime.events import Operator, OperatorsTimed, PhaseBegan, total
from fluxonnx.runtime.profile import Profile, operators
from tests.support import Case


def profiled(text: str) -> tuple[Profile, Any, Path]:
    """A profile, a session that has written `text` where it was told to, and the file."""
    settings = SimpleNamespace()
    profile = Profile(settings)
    assert settings.enable_profiling
    path = Path(f"{settings.profile_file_prefix}_now.json")
    path.write_text(text)
    return profile, SimpleNamespace(end_profiling=lambda: str(path)), path


def record(name: str, op: str, microseconds: int, cat: str = "Node") -> dict[str, Any]:
    return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": op}}


RECORDS = [
    record("a_kernel_time", "Gemm", 600),
    record("a_fence_before", "Gemm", 5000),
    record("model_run", "", 9000, "Session"),
    record("b_kernel_time", "Add", 300),
    record("c_kernel_time", "Gemm", 100),
]


def test_sums_and_shares():
    assert operators(RECORDS) == (Operator("Gemm", 2, 700e-6, 0.7), Operator("Add", 1, 300e-6, 0.3))
    assert operators([]) == ()


def test_files_are_removed():
    profile, session, path = profiled(json.dumps(RECORDS))
    assert profile.finish(session, "transformer") == operators(RECORDS)
    assert not path.parent.exists()


def test_damaged_file():
    """As a full disk leaves it."""
    profile, session, path = profiled('[{"cat": "No')
    with pytest.raises(FluxonnxError, match="the profile of transformer can't be read"):
        profile.finish(session, "transformer")
    assert not path.parent.exists()


def test_total_of_several_sessions():
    """A graph may be loaded many times in a run; other events do not matter."""
    first, second = operators(RECORDS), operators(RECORDS[:1])
    events = [
        OperatorsTimed("transformer", first),
        PhaseBegan("decode"),
        OperatorsTimed("vae_decoder", second),
        OperatorsTimed("transformer", second),
    ]
    assert total(events) == {
        "transformer": [Operator("Gemm", 3, 1300e-6, 1300 / 1600), Operator("Add", 1, 300e-6, 300 / 1600)],
        "vae_decoder": [Operator("Gemm", 1, 600e-6, 1.0)],
    }


def test_of_a_real_run(checkpoints):
    timed: list[OperatorsTimed] = []

    def watch(event):
        timed.extend([event] if isinstance(event, OperatorsTimed) else [])

    with fluxonnx.load(checkpoints.exported(Case("odd-heads")), profile=True, watch=watch) as flux:
        flux.generate("a cat", 64, 64, steps=1, seed=1)
    assert [event.component for event in timed] == ["text_encoder", "transformer", "conditioning", "vae_decoder"]
    for event in timed:
        assert event.operators
        assert sum(row.share for row in event.operators) == pytest.approx(1)
        assert all(row.calls > 0 and row.seconds >= 0 for row in event.operators)
