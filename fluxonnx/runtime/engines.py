"""Which engine runs the graphs of a provider: onnxruntime, or our own on numpy and BLAS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fluxonnx.checkpoint.manifest import Build
from fluxonnx.runtime.engine import Engine, Runner, SessionOptions
from fluxonnx.runtime.events import OperatorsTimed, ranked
from fluxonnx.runtime.providers import OPENBLAS, check_right
from fluxonnx.runtime.session import give_back_free_memory, onnxruntime_engine


class BlasRunner:
    """One graph, loaded by `fluxonnx.openblas`: a `Runner`."""

    def __init__(self, path: Path, component: str, options: SessionOptions) -> None:
        """Load the graph at `path`.

        Args:
            path: The graph.
            component: Its name.
            options: How graphs are run.

        Raises:
            UsageError: threadpoolctl, or the BLAS library that was asked for, is missing.
            FluxonnxError: The graph can't be loaded.
        """
        from fluxonnx.openblas.graph import Graph  # imports onnx, which takes a while

        self._component, self._options = component, options
        model = options.adapted.inlined() if options.adapted else path
        self._graph = Graph(model, path.parent, threads=options.threads, timed=options.profile)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph.

        Raises:
            FluxonnxError: It failed, or an input does not fit.
        """
        return self._graph.run(inputs)

    def close(self) -> None:
        """Free the graph's memory; report the times of its operators, if they were taken."""
        self._graph.close()
        give_back_free_memory()
        if self._options.profile and self._options.watch is not None:
            self._options.watch(OperatorsTimed(self._component, ranked(self._graph.times)))


def openblas_engine(path: Path, component: str, build: Build, options: SessionOptions) -> Runner:
    """The `Engine` of the openblas provider."""
    check_right(OPENBLAS, build.flavour)
    return BlasRunner(path, component, options)


def engine_for(provider: str) -> Engine:
    """Return the engine that runs the graphs of a provider."""
    return openblas_engine if provider == OPENBLAS else onnxruntime_engine


def name_of(engine: Engine) -> str:
    """Name an engine in a way that stays the same in another process."""
    named = engine if hasattr(engine, "__qualname__") else type(engine)
    return f"{named.__module__}.{named.__qualname__}"
