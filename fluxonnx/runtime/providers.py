"""Execution providers: the CPU, a GPU, or another runtime that onnxruntime hands graphs to.

Their short names are onnxruntime's without the suffix: "cpu", "cuda", "coreml", "dml", "openvino", ... The provider
"openblas" is none of onnxruntime's: graphs go to the package's own engine, `fluxonnx.openblas`.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.library import SILENT, VARIABLE, library, log_severity

CPU = "cpu"
OPENBLAS = "openblas"
SUFFIX = "ExecutionProvider"
# Sends whole models to a web service, and computes nothing on this machine.
REMOTE = "azure"


@dataclass(frozen=True)
class Traits:
    """What suits a provider.

    Attributes:
        package: The wheel that contains it, to be installed in place of onnxruntime.
        precision: The precision that it is fastest with; None for that of the checkpoint's weights.
        flavour: The flavour whose graphs it runs without leaving nodes to the CPU.
        settings: Its own options, as onnxruntime's documentation names them.
    """

    package: str
    precision: str | None = "fp16"
    flavour: str = "portable"
    settings: dict[str, Any] = field(default_factory=dict)


KNOWN = {
    CPU: Traits("onnxruntime", None, "ort"),
    # An arena that grows by doubling would allocate twice the memory that 8 GB of weights need.
    "cuda": Traits("onnxruntime-gpu", flavour="ort", settings={"arena_extend_strategy": "kSameAsRequested"}),
    "tensorrt": Traits("onnxruntime-gpu"),
    "dml": Traits("onnxruntime-directml", flavour="ort"),
    # The default, an older format, supports neither float16 nor most of the operators.
    "coreml": Traits("onnxruntime", settings={"ModelFormat": "MLProgram"}),
    "openvino": Traits("onnxruntime-openvino", None),
    OPENBLAS: Traits("fluxonnx[openblas]", None, "ort"),
    "webgpu": Traits("onnxruntime-webgpu", flavour="ort"),
}


def traits(provider: str) -> Traits:
    """Return what suits a provider; for an unknown one, what suits any."""
    return KNOWN.get(provider, Traits("onnxruntime"))


def available() -> list[str]:
    """Return the providers of the installed onnxruntime, in its order; whether they work here is for `works` to say."""
    return [name for name in _full_names(library().get_available_providers()) if name != REMOTE]


def _full_names(providers: list[str]) -> dict[str, str]:
    """Return onnxruntime's names by the short ones."""
    return {name.removesuffix(SUFFIX).lower(): name for name in providers}


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
    package = traits(provider).package
    cure = "choose one of these"
    if package != traits(CPU).package:
        cure += f", or pip uninstall onnxruntime and install {package} in its place"
    raise UsageError(f"provider {provider!r} is not in the installed onnxruntime, which has {', '.join(names)}: {cure}")


def session_providers(provider: str, threads: int | None) -> list[Any]:
    """Return the `providers` of an InferenceSession: the chosen one, then the CPU for the nodes that it can't run.

    Args:
        provider: The short name of the chosen one.
        threads: Threads per operator, for providers that ignore the session's own setting.
    """
    if provider == CPU:
        return [f"CPU{SUFFIX}"]
    onnxruntime = library()
    full = _full_names(onnxruntime.get_available_providers())[provider]
    settings = dict(traits(provider).settings)
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        # It finds the CUDA libraries that pip installed, and prints on standard output which ones it does not find.
        with redirect_stdout(io.StringIO() if log_severity() == SILENT else sys.stderr):
            onnxruntime.preload_dlls()
    if provider == "openvino" and threads is not None:
        settings["load_config"] = json.dumps({"CPU": {"INFERENCE_NUM_THREADS": str(threads)}})
    return [(full, settings), f"CPU{SUFFIX}"]


def check_started(session: Any, provider: str) -> None:
    """Check that a session did not silently fall back to the CPU.

    Raises:
        FluxonnxError: The provider is not among those the session runs on.
    """
    if provider not in _full_names(session.get_providers()):
        raise FluxonnxError(
            f"onnxruntime can't start its {provider} provider, most often for lack of a driver or library: "
            f"install what {traits(provider).package} needs ({VARIABLE}=3 shows what it lacks), or use --provider cpu"
        )


def works(provider: str) -> bool:
    """Whether one of the `available` providers can be started on this machine; it is tried with a tiny graph."""
    from onnx import TensorProto, helper

    onnxruntime = library()
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = log_severity()
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=session_providers(provider, None), enable_fallback=0
        )
        check_started(session, provider)
    except Exception:  # whatever the reason, it can't be used
        return False
    return True
