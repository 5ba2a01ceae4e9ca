"""An engine that records what is run, models that are opened with options of a test's own, stand-ins for providers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fluxonnx.checkpoint.manifest import Build, build_name, read_manifest
from fluxonnx.contract import open_checkpoint
from fluxonnx.runtime import providers
from fluxonnx.runtime.engine import Runner, SessionOptions
from fluxonnx.runtime.pipeline import Flux
from fluxonnx.runtime.session import onnxruntime_engine


class RecordingEngine:
    """onnxruntime, and a record of its use.

    Attributes:
        loaded: The components that were loaded, in order.
        open: The components that are loaded now.
        most_open: How many were loaded at once at most. The conditioning graph, which has no weights, does not count.
        batches: The batch size of each run of the transformer.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.most_open = 0
        self.batches: list[int] = []

    def __call__(self, path: Path, component: str, build: Build, options: SessionOptions) -> Runner:
        runner = onnxruntime_engine(path, component, build, options)
        self.loaded.append(component)
        self.open.append(component)
        self.most_open = max(self.most_open, len([name for name in self.open if name != "conditioning"]))
        return RecordedRunner(self, component, runner)


class RecordedRunner:
    def __init__(self, engine: RecordingEngine, component: str, runner: Runner) -> None:
        self._engine, self._component, self._runner = engine, component, runner

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        if self._component == "transformer":
            self._engine.batches.append(len(inputs["hidden_states"]))
        return self._runner.run(**inputs)

    def close(self) -> None:
        self._runner.close()
        self._engine.open.remove(self._component)


@pytest.fixture
def engine() -> Iterator[RecordingEngine]:
    """An engine whose graphs must all be closed at the end of the test."""
    engine = RecordingEngine()
    yield engine
    assert engine.open == []


OpenFlux = Callable[..., Flux]


@pytest.fixture
def open_flux() -> Iterator[OpenFlux]:
    """open_flux(root, precision="bf16", **options of a session): a model, which is closed at the end of the test."""
    opened: list[Flux] = []

    def open_flux(root: Path, precision: str = "bf16", cache_dir: Path | None = None, **options: Any) -> Flux:
        manifest = read_manifest(root)
        assert manifest is not None
        build = manifest.builds[build_name(precision, "ort")]
        opened.append(Flux(open_checkpoint(root), manifest, build, SessionOptions(**options), cache_dir))
        return opened[-1]

    yield open_flux
    for flux in opened:
        flux.close()


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(name, error): an onnxruntime with this provider, whose results are off by so much; its sessions."""
    real, made = onnxruntime.InferenceSession, []

    def stand_in(name: str, error: float) -> list:
        class Wrong:
            def __init__(self, model, options, providers, **others):
                self.session, self.chosen = real(model, options, providers=["CPUExecutionProvider"]), providers
                made.append(self)

            def get_providers(self):
                return [name, "CPUExecutionProvider"]

            def run(self, *words):
                off = np.float32(0 if self.chosen == ["CPUExecutionProvider"] else error)
                return [value + off for value in self.session.run(*words)]

        monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name, "CPUExecutionProvider"])
        return made

    return stand_in


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    """plugin(source): a package onnxruntime_ep_mlx with this source is installed."""

    def plugin(source: str) -> None:
        folder = tmp_path / "packages/onnxruntime_ep_mlx"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source, "utf-8")
        monkeypatch.syspath_prepend(folder.parent)
        monkeypatch.delitem(sys.modules, "onnxruntime_ep_mlx", raising=False)
        providers.plugins.cache_clear()

    yield plugin
    providers.plugins.cache_clear()
