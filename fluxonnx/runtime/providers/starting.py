"""Which providers there are on this machine, and what onnxruntime is told to start one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fluxonnx.checkpoint.reading import shown
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import user_caches
from fluxonnx.runtime.library import VARIABLE, library
from fluxonnx.runtime.providers.assignment import RECORD
from fluxonnx.runtime.providers.description import CPU, OPENBLAS
from fluxonnx.runtime.providers.plugins import SUFFIX, plugin_of, plugins, short_name
from fluxonnx.runtime.providers.registry import KNOWN, traits

# Sends whole models to a web service, and computes nothing on this machine.
REMOTE = "azure"


def available() -> list[str]:
    """Return the providers of the installed onnxruntime, in its order, then those of plugins that offer a device.

    Whether they work here is for `works` to say.
    """
    found = [name for name in built_in() if name != REMOTE]
    return found + [
        name for plugin in plugins() if plugin.devices for name in plugin.providers[:1] if name not in found
    ]


def built_in() -> dict[str, str]:
    """Return onnxruntime's own providers by their short names."""
    return {short_name(name): name for name in library().get_available_providers()}


def check_provider(provider: str) -> None:
    """Check that the installed onnxruntime has a provider, or that our own engine has what it needs.

    Raises:
        UsageError: It does not; the message lists those that it has.
    """
    if provider == OPENBLAS:
        if find_spec("threadpoolctl") is None:
            package = traits(provider).package
            raise UsageError(f"provider {provider!r} needs threadpoolctl: run pip install '{package}', or choose cpu")
        return
    if provider == CPU or provider in (names := available()):
        return
    known = traits(provider)
    if plugin := plugin_of(provider):
        needs = f" (it needs {known.needs})" if known.needs else ""
        raise UsageError(
            f"provider {provider!r}: {plugin.package} {plugin.version} is installed, but {plugin.problem}{needs}: "
            f"choose one of these: {', '.join(names)}"
        )
    cures = ["choose one of these"]
    if known.plugin:
        cures.append(f"pip install {known.plugin}")
    if known.package not in (traits(CPU).package, known.plugin):
        cures.append(f"pip uninstall onnxruntime and install {known.package} in its place")
    needs = f" ({provider} needs {known.needs})" if provider in KNOWN and known.needs else ""
    raise UsageError(
        f"provider {provider!r} is not in the installed onnxruntime, which has {', '.join(names)}: "
        f"{', or '.join(cures)}{needs}"
    )


def check_provider_options(provider: str, given: Mapping[str, str]) -> None:
    """Check options of a provider by their names and values, as far as they are known.

    Raises:
        UsageError: It has no such option, or the option no such value.
    """
    known = {} if provider in (CPU, OPENBLAS) else traits(provider).options
    for name, value in given.items():
        if known is None:
            continue
        if name not in known:
            which = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"provider {provider!r} has no option {shown(name)}: {which}")
        if known[name] and value not in known[name]:
            raise UsageError(
                f"option {name} of provider {provider!r} can't be {shown(value)}: choose {' or '.join(known[name])}"
            )


def _cached(provider: str, identity: str | None) -> dict[str, str]:
    """Return the option for a folder that holds what a provider compiles of one graph; it does not see changes."""
    option, caches = traits(provider).cache, user_caches()
    if not option or identity is None or caches is None:
        return {}
    folder = caches / "fluxonnx" / provider / identity
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}  # it is compiled each time
    return {option: str(folder)}


def session_providers(
    provider: str,
    threads: int | None,
    options: Any = None,
    given: Mapping[str, str] | None = None,
    identity: str | None = None,
) -> list[Any] | None:
    """Return the `providers` of an InferenceSession: the chosen one, then the CPU for the nodes that it can't run.

    Args:
        provider: The short name of the chosen one.
        threads: Threads per operator, for providers that ignore the session's own setting.
        options: The session's SessionOptions. The provider of a plugin is added to them, and the result is None.
        given: Options of the provider that a person chose.
        identity: A name for what the graph and its weights hold, for caches; None for no cache.

    Raises:
        UsageError: There is no such provider.
    """
    if provider == CPU:
        return [f"CPU{SUFFIX}"]
    known = traits(provider)
    settings = dict(known.settings)
    if threads is not None:
        settings |= known.thread_settings(threads)
    settings |= {**_cached(provider, identity), **(given or {})}
    if options is not None:
        options.add_session_config_entry(RECORD, "1")
    if full := built_in().get(provider):
        known.prepare()
        return [(full, settings), f"CPU{SUFFIX}"]
    plugin = plugin_of(provider)
    if plugin is None or not plugin.devices or options is None:
        check_provider(provider)
        raise UsageError(f"provider {provider!r} can't be used here: choose cpu")
    options.add_provider_for_devices(list(plugin.devices[:1]), {key: str(value) for key, value in settings.items()})
    return None


def check_started(session: Any, provider: str) -> None:
    """Check that a session did not silently fall back to the CPU.

    Raises:
        FluxonnxError: The provider is not among those the session runs on.
    """
    if provider not in map(short_name, session.get_providers()):
        raise FluxonnxError(
            f"onnxruntime can't start its {provider} provider, most often for lack of a driver or library: "
            f"install what {traits(provider).package} needs ({VARIABLE}=3 shows what it lacks), or use --provider cpu"
        )
