"""Load, run and release a graph in onnxruntime."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fluxonnx.checkpoint.manifest import Build
from fluxonnx.contract import KV_COMPONENTS
from fluxonnx.errors import FluxonnxError
from fluxonnx.machine import has_exact_int8_dot, thread_limit
from fluxonnx.runtime.engine import Runner, SessionOptions
from fluxonnx.runtime.events import OperatorsTimed
from fluxonnx.runtime.library import library, log_severity
from fluxonnx.runtime.profile import Profile
from fluxonnx.runtime.providers import CPU, check_right, check_started, session_providers, tell_of_fallback, traits

# Sinusoids of large numbers, which a provider that computes in half precision would ruin. They take no time.
ALWAYS_ON_CPU = ("conditioning",)

# ConstantFolding would turn the casts of these graphs' bf16 weights into 16 GB of float32. The VAE is small, and its
# convolutions are only laid out for the CPU's caches when their weights are constants.
STREAMED = ("text_encoder", "transformer", *KV_COMPONENTS)

# Graphs with products of 8-bit weights. onnxruntime would first lay these weights out for the processor, as a copy in
# memory that takes seconds to make. Weights stored in panels are multiplied about as fast without it. Each product
# would get a copy of its own, although all bands of rows in the decoder share the same weights.
NOT_PACKED = (*STREAMED, "vae_decoder")

# Seconds after which a wait begins anew. A signal that comes just before a wait does not interrupt it.
WAIT = 0.5


@dataclass(frozen=True)
class Settings:
    """What onnxruntime is told about one session.

    Attributes:
        provider: The short name of the execution provider.
        threads: Threads per operator; None for one per core that this process may use.
        arena: Whether freed buffers are kept for later ones.
        memory_pattern: Whether all temporaries of a run are laid out in one block.
        memory_reuse: Whether a buffer waits for the next value of its shape.
        optimise: Whether onnxruntime rewrites the graph.
        disabled_optimizers: Rewriters that are left out.
        config: Entries of its configuration.
    """

    provider: str
    threads: int | None
    arena: bool
    # A pattern costs 0.7 GB more for the 4B transformer, whose weights are cast on the fly, and is no faster (measured:
    # 1.90 against 1.23 GB).
    memory_pattern: bool = False
    # A buffer that waits, for the same weight of the next block for example, holds memory meanwhile. Giving it back
    # costs no time (measured for the 4B model at 512x512: 1.52 against 1.01 GB).
    memory_reuse: bool = False
    optimise: bool = True
    disabled_optimizers: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)


def settings(component: str, build: Build | None, options: SessionOptions, exact_int8_dot: bool) -> Settings:
    """Return what onnxruntime is told about a session.

    Args:
        component: The name of the graph.
        build: The build that it is part of; None if that is unknown.
        options: How graphs are run.
        exact_int8_dot: Whether this processor adds products of 8-bit integers exactly.
    """
    streamed = component in STREAMED
    config = {}
    optimise = True
    if not exact_int8_dot and (build is None or not build.parsed_settings.saturating):
        # Products with signed 8-bit weights saturate on this processor unless onnxruntime makes the weights unsigned,
        # which is done by one of its optimisers. With VNNI that would only double the time of a step.
        config["session.x64quantprecision"] = "1"
    elif streamed and build is not None and build.flavour == "ort" and options.provider == CPU:
        # These graphs are exported in the form that onnxruntime would give them. Looking for more to rewrite takes
        # half of the time to open one (11500 nodes: 0.95 s with, 0.45 s without).
        optimise = False
    if component in NOT_PACKED and build is not None and build.precision == "int8":
        config["session.disable_prepacking"] = "1"
    return Settings(
        provider=CPU if component in ALWAYS_ON_CPU else options.provider,
        threads=options.threads,
        # An arena grows by doubling, which wastes 0.15 GB on the VAE's few huge buffers. Without one the VAE takes an
        # eighth longer (measured for the decoder at 512x512: 1.35 against 1.20 GB).
        arena=streamed or not options.low_memory,
        optimise=optimise,
        disabled_optimizers=("ConstantFolding",) if streamed else (),
        config=config,
    )


def native(chosen: Settings) -> Any:
    """Return settings as an `onnxruntime.SessionOptions`."""
    onnxruntime = library()
    found = onnxruntime.SessionOptions()
    found.log_severity_level = log_severity()
    found.enable_mem_pattern = chosen.memory_pattern
    found.enable_mem_reuse = chosen.memory_reuse
    found.enable_cpu_mem_arena = chosen.arena
    if chosen.threads is not None:
        found.intra_op_num_threads = chosen.threads
    if not chosen.optimise:
        found.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in chosen.config.items():
        found.add_session_config_entry(key, value)
    return found


class Session:
    """One graph, loaded by onnxruntime: a `Runner`, and a context manager that closes it."""

    def __init__(
        self,
        path: Path,
        component: str,
        options: SessionOptions,
        build: Build | None = None,
        override: Settings | None = None,
    ) -> None:
        """Load the graph at `path`.

        Args:
            path: The graph.
            component: Its name.
            options: How graphs are run.
            build: The build that it is part of; None if that is unknown.
            override: What onnxruntime is told, for measurements; by default `settings`.

        Raises:
            FluxonnxError: onnxruntime can't load it, or can't start the provider.
        """
        onnxruntime = library()
        chosen = override or settings(component, build, options, has_exact_int8_dot())
        if chosen.threads is None:
            chosen = replace(chosen, threads=thread_limit())
        check_right(chosen.provider, build.flavour if build is not None else None)
        told = native(chosen)
        self._path, self._component, self._watch = path, component, options.watch
        self._place = "" if chosen.provider == CPU else f" on {chosen.provider}"
        self._cure = "; if memory is short, use --low-memory or a smaller size" + (
            "" if chosen.provider == CPU else ", or use --provider cpu"
        )
        self._adapted = options.adapted  # onnxruntime uses its arrays where they are
        self._profile = Profile(told) if options.profile else None
        try:
            self._session = onnxruntime.InferenceSession(
                options.adapted.handed_to(told, path.parent) if options.adapted else str(path),
                told,
                providers=session_providers(
                    chosen.provider, chosen.threads, told, options.provider_options, _identity(build, component)
                ),
                disabled_optimizers=list(chosen.disabled_optimizers) or None,
                enable_fallback=0,
            )
        except Exception as error:  # onnxruntime raises many types, all meaning this
            if self._profile is not None:
                self._profile.discard()
            raise FluxonnxError(f"{path} can't be loaded: {_cured(_first_line(error), chosen.provider)}") from error
        check_started(self._session, chosen.provider)
        if chosen.provider != CPU:
            tell_of_fallback(self._session, component, chosen.provider)
        give_back_free_memory()  # what was used to load: 0.4 GB for the VAE decoder
        self._worker = ThreadPoolExecutor(1)
        self._inputs = DeviceInputs(traits(chosen.provider).device) if traits(chosen.provider).device else None

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph.

        Raises:
            FluxonnxError: It failed, most often for lack of memory.
        """
        options = library().RunOptions()
        options.log_severity_level = log_severity()
        try:
            # A run can take minutes, and Python handles Ctrl-C only between bytecodes. So this thread waits, and
            # onnxruntime works in another one that can be told to stop.
            outputs = _result(self._worker.submit(self._start, inputs, options))
            # Outputs are views into the session's arena. One that is kept would keep all of it (measured: 0.3 GB for
            # the 0.3 MB of a short prompt), so they are copied.
            return [output.copy() for output in outputs]
        except Exception as error:
            raise FluxonnxError(f"{self._path.name} failed{self._place}: {_first_line(error)}{self._cure}") from error
        except BaseException:  # Ctrl-C, or another signal that ends the program
            options.terminate = True
            raise

    def _start(self, inputs: Mapping[str, np.ndarray], options: Any) -> list[np.ndarray]:
        if self._inputs is None:
            return self._session.run(None, inputs, options)
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run_with_ort_values(names, self._inputs.placed(inputs), options)
        return [value.numpy() for value in found]

    def close(self) -> None:
        """Free the graph's memory, once a run that was interrupted has ended; report the profile, if there is one.

        Raises:
            FluxonnxError: The profile can't be read.
        """
        self._worker.shutdown()
        try:
            if self._profile is not None:
                operators = self._profile.finish(self._session, self._component)
                if self._watch is not None:
                    self._watch(OperatorsTimed(self._component, operators))
        finally:
            del self._session, self._inputs
            give_back_free_memory()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _result(future: Future[list[np.ndarray]]) -> list[np.ndarray]:
    """Wait for a run, and let no signal wait for it."""
    while not future.done():
        wait([future], WAIT)
    return future.result()


class DeviceInputs:
    """Inputs in the memory of a device, where those of the last run stay until another array takes their place."""

    def __init__(self, device: str) -> None:
        """Nothing is copied yet; `device` is the name that OrtValue knows."""
        self._device = device
        self._last: dict[str, tuple[np.ndarray, Any]] = {}

    def placed(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the inputs as OrtValues; arrays must not be changed between runs."""
        for name, array in inputs.items():
            if name not in self._last or self._last[name][0] is not array:
                self._last[name] = array, library().OrtValue.ortvalue_from_numpy(array, self._device, 0)
        return {name: self._last[name][1] for name in inputs}


def _identity(build: Build | None, component: str) -> str | None:
    """Name a graph by what it and its weights hold; None if that is unknown."""
    found = build.components.get(component) if build else None
    if found is None or not found.files:
        return None
    return hashlib.sha256(json.dumps([found.files, found.sources], sort_keys=True).encode()).hexdigest()[:32]


def onnxruntime_engine(path: Path, component: str, build: Build, options: SessionOptions) -> Runner:
    """The default `Engine`."""
    return Session(path, component, options, build)


def give_back_free_memory() -> None:
    """Have glibc return freed memory to the system, of which it keeps pieces of up to 32 MB; elsewhere, do nothing."""
    with suppress(OSError, AttributeError, TypeError):  # no such library, no such function, Windows
        ctypes.CDLL(None).malloc_trim(0)


def _cured(problem: str, provider: str) -> str:
    """Return what is wrong with a graph, and what to do."""
    if problem.startswith("NOT_IMPLEMENTED"):
        return f"the {provider} provider can't compute this ({problem}); choose another --precision or --provider"
    return f"{problem}; export again with --force"


def _first_line(error: Exception) -> str:
    """Return the innermost message of an error, without the C++ functions that passed it on."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r".*\[ONNXRuntimeError\] : \d+ : ", "", line)
