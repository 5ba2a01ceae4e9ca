"""Providers that packages add to onnxruntime 1.23 and later: `onnxruntime-ep-openvino`, `-ep-webgpu`, `-ep-mlx`, ...

Such a package has the functions `get_library_path` and `get_ep_name` or `get_ep_names`.
Source: onnxruntime.ai, "Plugin Execution Provider Library Packaging Guidance".
"""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fluxonnx.runtime.library import library

PREFIX = "onnxruntime_ep_"
SUFFIX = "ExecutionProvider"


@dataclass(frozen=True)
class Plugin:
    """A plugin that is installed.

    Attributes:
        package: Its package.
        version: The version of that; "" if it is not known.
        providers: The short names of its providers; none if it could not be asked.
        devices: onnxruntime's devices that it offers, all of its first provider.
        problem: Why it can't be used here; "" if it can.
    """

    package: str
    version: str
    providers: tuple[str, ...]
    devices: tuple[Any, ...]
    problem: str


def short_name(provider: str) -> str:
    """Return the short name of a provider: "cuda" for CUDAExecutionProvider."""
    return provider.removesuffix(SUFFIX).lower()


@lru_cache(maxsize=1)
def plugins() -> tuple[Plugin, ...]:
    """Find the plugins that are installed and register them with onnxruntime, once per process."""
    names = sorted(module.name for module in pkgutil.iter_modules() if module.name.startswith(PREFIX))
    return tuple(map(_registered, names))


def plugin_of(provider: str) -> Plugin | None:
    """Return the installed plugin that has a provider; also one that can't be used."""
    named = f"onnxruntime-ep-{provider}"
    return next((found for found in plugins() if provider in found.providers or found.package == named), None)


def _registered(module: str) -> Plugin:
    package, version, full = module.replace("_", "-"), "", []
    from importlib import metadata  # takes as long as onnxruntime, and most runs have no plugins

    with suppress(metadata.PackageNotFoundError):  # a folder on the path, without the record of an installation
        version = metadata.version(package)
    try:
        found = importlib.import_module(module)
        full = list(found.get_ep_names()) if hasattr(found, "get_ep_names") else [found.get_ep_name()]
        onnxruntime = library()
        if not hasattr(onnxruntime, "register_execution_provider_library"):
            problem = f"onnxruntime {onnxruntime.__version__} takes no plugins: run pip install -U onnxruntime"
            return Plugin(package, version, tuple(map(short_name, full)), (), problem)
        # some plugins call their provider by the name that they are registered under
        onnxruntime.register_execution_provider_library(full[0], found.get_library_path())
        devices = tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == full[0])
    except Exception as error:  # a stranger's package, and a library of another version
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Plugin(package, version, tuple(map(short_name, full)), (), f"it can't be loaded ({lines[0][:300]})")
    problem = "" if devices else "it offers no device on this machine"
    return Plugin(package, version, tuple(map(short_name, full)), devices, problem)
