"""Which providers are installed and compute right, on what machine, and what adds the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from fluxonnx.auto import FASTER_THAN_CPU
from fluxonnx.check.findings import one_line
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.machine import (
    available_memory,
    cpu_flags,
    has_exact_int8_dot,
    memory_limit,
    processor_time_limit,
    thread_limit,
    total_memory,
    usable_cores,
)
from fluxonnx.measure.tables import machine
from fluxonnx.openblas.gemm import VARIABLE as BLAS_VARIABLE
from fluxonnx.openblas.gemm import find_blas
from fluxonnx.runtime import providers
from fluxonnx.runtime.library import VARIABLE as LOG_VARIABLE

WORKS, WRONG, FAILS, UNUSABLE, MISSING = "works", "wrong", "fails", "unusable", "not installed"

# Features of processors that decide how fast products of matrices are, as Linux names them.
FEATURES = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
# Environment variables that change what is computed where.
VARIABLES = (
    BLAS_VARIABLE,
    LOG_VARIABLE,
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
PACKAGES = ("onnx", "numpy", "threadpoolctl")

AUTO = (
    f"--precision auto takes {', '.join(FASTER_THAN_CPU)} where it works, as GPUs compute faster than CPUs, "
    "and else cpu; others may be slower and have to be named"
)

# A build for providers that take graphs of one size only, which the bench draws.
STATIC = "-d DIR --precision fp16 --flavour portable --shape 256x256"


@dataclass(frozen=True)
class Found:
    """What was found of one provider.

    Attributes:
        provider: Its short name.
        state: `WORKS`; `WRONG`, it computes wrong; `FAILS`, it does not start or run; `UNUSABLE`, it is installed, but
            something is missing; or `MISSING`.
        text: The reason, or how right it computes.
        errors: The relative L2 errors of the parts of a small graph.
        on_cpu: The share of the small graph's nodes that ran on the CPU; None if it is not known.
        package: The package that it is in, with its version.
        install: The command that adds it, or, of a plugin that is unusable, the wheel that has it, too; "" if it is
            there, or if none is known.
        needs: What a machine has to have for it.
        tested: Where it was tested; "" for nowhere.
        limits: What it can't do.
        devices: The devices that a plugin offers.
    """

    provider: str
    state: str
    text: str
    errors: dict[str, float] = field(default_factory=dict)
    on_cpu: float | None = None
    package: str = ""
    install: str = ""
    needs: str = ""
    tested: str = ""
    limits: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


def surroundings() -> dict[str, Any]:
    """Describe the machine and the software as far as providers depend on it; sizes in bytes."""
    flags = cpu_flags()
    return {
        **machine(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "features": [name for name in FEATURES if name in flags],
        "exact_int8_dot": has_exact_int8_dot(),
        "usable_cores": usable_cores(),
        "threads": thread_limit() or usable_cores(),
        "processor_time_limit": processor_time_limit(),
        "memory": total_memory(),
        "memory_limit": memory_limit(),
        "free_memory": available_memory(),
        "blas": blas(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "tells_fallback": _tells_fallback(),
    }


def blas() -> str:
    """Name the BLAS library that the provider openblas uses, or that numpy was built with."""
    with suppress(FluxonnxError):
        return find_blas().name
    import numpy as np

    with suppress(Exception):  # older versions have no such mode
        built: Any = np.show_config(mode="dicts")
        found = built["Build Dependencies"]["blas"]
        return f"numpy's {found['name']} {found['version']}"
    return "unknown"


def _tells_fallback() -> bool:
    from fluxonnx.runtime.library import library

    return hasattr(library().InferenceSession, "get_provider_graph_assignment_info")


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def examine() -> Iterator[Found]:
    """Try each provider that is installed with a small graph; yield all that are known, the CPU's first."""
    there = providers.available()
    unknown = [name for plugin in providers.plugins() for name in plugin.providers if name not in providers.KNOWN]
    for name in dict.fromkeys((*providers.KNOWN, *there, *unknown)):
        yield _examined(name, there)
    for plugin in providers.plugins():
        if not plugin.providers and not any(plugin is providers.plugin_of(name) for name in providers.KNOWN):
            yield Found(
                plugin.package, UNUSABLE, one_line(plugin.problem), package=f"{plugin.package} {plugin.version}"
            )


def _examined(name: str, there: list[str]) -> Found:
    known, plugin = providers.traits(name), providers.plugin_of(name)
    told: dict[str, Any] = {"needs": known.needs, "tested": known.tested, "limits": known.limits}
    if plugin:
        told["package"] = f"{plugin.package} {plugin.version}".strip()
        told["devices"] = tuple(_device(device) for device in plugin.devices)
    try:
        providers.check_provider(name)
    except UsageError:
        if plugin:
            other = providers.installation(name, plugin=False)
            return Found(name, UNUSABLE, one_line(plugin.problem), install=other, **told)
        return Found(name, MISSING, "", install=providers.installation(name), **told)
    if not plugin and name in there:
        wheel = known.package.partition("[")[0]
        told["package"] = f"{wheel} {_version(wheel)}".strip()
    try:
        trial = providers.trial(name)
    except Exception as error:  # a driver may raise anything
        return Found(name, FAILS, one_line(str(error)), **told)
    share = trial.on_cpu / trial.nodes if trial.nodes and trial.on_cpu is not None else None
    if trial.fault:
        return Found(name, WRONG, trial.fault, trial.errors, share, **told)
    text = f"right to {max(trial.errors.values()):.1g}"
    if trial.on_cpu:
        text += f"; {trial.on_cpu} of {trial.nodes} nodes of a small graph ran on the CPU"
    return Found(name, WORKS, text, trial.errors, share, **told)


def _device(device: Any) -> str:
    with suppress(Exception):  # a class of onnxruntime that is young
        return f"{device.device.type.name} {device.device.vendor}".strip()
    return "unknown"


def describe(here: dict[str, Any]) -> str:
    """Write `surroundings` for a person."""
    gigabytes = {
        name: here[name] and f"{here[name] / 1e9:.1f} GB" for name in ("memory", "memory_limit", "free_memory")
    }
    time = here["processor_time_limit"]
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    exact = "exact 8-bit dot products" if here["exact_int8_dot"] else "no exact 8-bit dot products"
    lines = [
        f"fluxonnx {here['fluxonnx']}, Python {here['python']}, onnxruntime {here['onnxruntime']}, {packages}",
        f"system: {here['system']}",
        f"processor: {here['processor']}: {' '.join(here['features']) or 'features unknown'}; {exact}",
        f"cores: {here['cores']}, of which this process may use {here['usable_cores']}"
        + (f" (limit of its control group: {time:g})" if time else ""),
        f"threads per operator: {here['threads']}",
        f"memory: {gigabytes['memory'] or 'unknown'}, free {gigabytes['free_memory']}, limit of the control group "
        f"{gigabytes['memory_limit'] or 'none'}",
        f"BLAS: {here['blas']}",
    ]
    lines += [f"{name}={value}" for name, value in here["environment"].items()]
    if not here["tells_fallback"]:
        lines.append("this onnxruntime does not tell which nodes run on the CPU: run pip install -U onnxruntime")
    return "\n".join(lines)


def line(found: Found) -> str:
    """Write what was found of a provider in one line."""
    parts = [found.text, found.package and f"[{found.package}]"]
    if found.state == MISSING:
        parts = [f"needs {found.needs}" if found.needs else "", found.install]
    elif found.state != WORKS:
        parts += [f"needs {found.needs}" if found.needs else "", found.install and f"or {found.install}"]
    elif not found.tested:
        parts.append("untested by us")
    return f"{found.provider:<9} {found.state:<13} {'; '.join(filter(None, parts))}".rstrip()


def closing(results: list[Found]) -> str:
    """Say what `auto` chooses, and what to send back of providers that nobody has tested."""
    lines = [AUTO]
    untested = [found.provider for found in results if not found.tested and found.state in (WORKS, WRONG, FAILS)]
    if untested:
        names = " ".join(untested)
        static = [name for name in untested if providers.traits(name).static_shapes]
        first = f"fluxonnx export {STATIC}; " if static else ""
        lines.append(
            f"Nobody has told us yet how {' and '.join(untested)} does. Please send what these print: "
            f"fluxonnx providers --json; fluxonnx check --json; {first}fluxonnx bench --provider cpu {names}"
        )
    return "\n".join(lines)


def to_text(here: dict[str, Any], results: list[Found]) -> str:
    """Write everything as JSON."""
    listed = [asdict(found) for found in results]
    for values in listed:  # JSON has no infinity
        values["errors"] = {part: error if error < float("inf") else None for part, error in values["errors"].items()}
    return json.dumps({"machine": here, "providers": listed, "auto": AUTO}, indent=2)
