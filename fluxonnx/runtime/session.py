"""Open, run and release a graph in onnxruntime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.machine import adds_int8_products_exactly
from fluxonnx.manifest import Build
from fluxonnx.runtime.profile import Profile
from fluxonnx.runtime.providers import CPU, check_provider, check_started, session_providers

# Sinusoids of large numbers, which a provider that computes in half precision would ruin; they take no time.
ALWAYS_ON_CPU = ("conditioning",)

# ConstantFolding would turn the casts of these graphs' bf16 weights into 16 GB of float32. The VAE is small, and its
# convolutions are only laid out for the CPU's caches when their weights are constants.
STREAMED = ("text_encoder", "transformer")

# Graphs with products of 8-bit weights. onnxruntime would lay these out for the processor first, as a copy in memory
# that takes seconds to make, except where they lie in runs; as such they are multiplied about as fast. Each product has
# a copy of its own, and in the decoder all bands of rows have the same weights.
NOT_PACKED = (*STREAMED, "vae_decoder")


# observe(component, inputs by name, outputs)
Observer = Callable[[str, dict[str, np.ndarray], list[np.ndarray]], None]


@dataclass(frozen=True)
class SessionOptions:
    """How graphs are run.

    Attributes:
        threads: Threads per operator; None for one per core.
        profile: Told how long each operator took; None to run without onnxruntime's profiler.
        observe: Called after each run with the component's name, its inputs and its outputs.
        low_memory: One picture is made at a time, and large ones are encoded and decoded in tiles.
        provider: What computes, see `providers`.
    """

    threads: int | None = None
    profile: Profile | None = None
    observe: Observer | None = None
    low_memory: bool = False
    provider: str = CPU

    def __post_init__(self) -> None:
        """Refuse what can't be; raises UsageError."""
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}, but must be at least 1")
        check_provider(self.provider)


class Session:
    """One graph, loaded: a context manager, since its memory is worth giving back early."""

    def __init__(self, path: Path, component: str, options: SessionOptions, build: Build | None = None) -> None:
        """Load the graph at `path`, a `component` of some `build`.

        Args:
            path: The graph.
            component: Which one it is.
            options: How graphs are run.
            build: What is known about how it was made.

        Raises:
            FluxonnxError: onnxruntime can't load it, or can't start the provider.
        """
        import onnxruntime  # slow to import, and needed only to run

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        # A pattern lays all temporaries of a run into one block: with weights cast on the fly that is 0.7 GB more for
        # the 4B transformer (measured: 1.90 against 1.23 GB), and no faster.
        settings.enable_mem_pattern = False
        # A buffer that waits for the next value of its shape, such as the same weight of the next block, holds memory
        # meanwhile. Giving it back costs no time (measured for the 4B model at 512x512: 1.52 against 1.01 GB).
        settings.enable_mem_reuse = False
        # An arena grows by doubling. Of the VAE's few huge buffers that is 0.15 GB in vain; without one it takes an
        # eighth longer (measured for the decoder at 512x512: 1.35 against 1.20 GB).
        settings.enable_cpu_mem_arena = component in STREAMED or not options.low_memory
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        if not adds_int8_products_exactly() and (build is None or build.settings.get("products") != "pairs"):
            # Products with signed 8-bit weights saturate on this processor unless onnxruntime makes them unsigned. It
            # does so wherever it is told to, also where it helps nothing: with VNNI a step takes twice as long then.
            settings.add_session_config_entry("session.x64quantprecision", "1")
        elif component in STREAMED and build is not None and build.flavour == "ort" and options.provider == CPU:
            # These graphs are exported as onnxruntime would make them; to look for more is half of the time to open one
            # (11500 nodes: 0.95 s with, 0.45 s without). To make weights unsigned is the work of one of the optimisers.
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if component in NOT_PACKED and build is not None and build.precision == "int8":
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if options.profile is not None:
            options.profile.start(settings, component)
        disabled = ["ConstantFolding"] if component in STREAMED else None
        provider = CPU if component in ALWAYS_ON_CPU else options.provider
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                settings,
                providers=session_providers(provider, options.threads),
                disabled_optimizers=disabled,
                enable_fallback=0,
            )
        except Exception as error:  # onnxruntime raises many types, all meaning this
            raise FluxonnxError(f"{path} can't be loaded: {_first_line(error)}; export again with --force") from error
        check_started(self._session, provider)
        give_back_free_memory()  # what was used to load: 0.4 GB for the VAE decoder
        self._path, self._component = path, component
        self._profile, self._observe = options.profile, options.observe
        self._worker = ThreadPoolExecutor(1)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph.

        Raises:
            FluxonnxError: It failed, most often for want of memory.
        """
        import onnxruntime

        options = onnxruntime.RunOptions()
        try:
            # A run can take minutes, and Python sees Ctrl-C only between bytecodes: so it waits here, and onnxruntime
            # works in another thread that can be told to stop.
            outputs = self._worker.submit(self._session.run, None, inputs, options).result()
            # Outputs are views into the session's arena: one that is kept would keep all of it (measured: 0.3 GB for
            # the 0.3 MB of a short prompt), so they are copied.
            copies = [output.copy() for output in outputs]
        except KeyboardInterrupt:
            options.terminate = True
            raise
        except Exception as error:
            raise FluxonnxError(f"{self._path.name} failed: {_first_line(error)}") from error
        if self._observe is not None:
            self._observe(self._component, inputs, copies)
        return copies

    def close(self) -> None:
        """Give the graph's memory back, after a run that was interrupted has come to its end."""
        self._worker.shutdown()
        if self._profile is not None:
            self._profile.collect(self._component, self._session)
        del self._session
        give_back_free_memory()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def give_back_free_memory() -> None:
    """Have glibc give freed memory back to the system; it keeps pieces of up to 32 MB otherwise. Elsewhere, nothing."""
    with suppress(OSError, AttributeError, TypeError):  # no such library, no such function, Windows
        ctypes.CDLL(None).malloc_trim(0)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
