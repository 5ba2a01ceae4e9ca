"""A small graph with the operators of ours that providers get wrong, and what it should compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fluxonnx.errors import FluxonnxError
from fluxonnx.runtime.library import library, log_severity
from fluxonnx.runtime.providers.assignment import assigned
from fluxonnx.runtime.providers.description import CPU, OPENBLAS
from fluxonnx.runtime.providers.registry import traits
from fluxonnx.runtime.providers.starting import check_started, session_providers

# Relative L2 error. Products in bfloat16 round to 0.01 of their result; the faults that were seen begin at 0.1.
TOLERANCE = 0.03
SEQ, HEADS, HEAD_DIM = 40, 2, 32
WIDTH = HEADS * HEAD_DIM
EPSILON = 1e-6

_right: set[tuple[str, str]] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Trial:
    """What a provider made of the graph.

    Attributes:
        errors: The relative L2 error of each part: "attention", "norm", "convolution".
        nodes: The graph's nodes after optimisation; None if onnxruntime does not tell.
        on_cpu: Those of them that ran on the CPU.
    """

    errors: dict[str, float]
    nodes: int | None = None
    on_cpu: int | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong, with numbers; None if nothing is."""
        wrong = [f"{part} by {error:.2g}" for part, error in self.errors.items() if not error <= TOLERANCE]
        return f"{' and '.join(wrong)} (relative; rounding explains {TOLERANCE})" if wrong else None


@lru_cache(maxsize=1)
def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    shapes = {
        "x": (1, SEQ, WIDTH),
        "picture": (1, 4, 8, 8),
        **dict.fromkeys(("q", "k", "v"), (WIDTH, WIDTH)),
        "scale": (WIDTH,),
        "kernel": (8, 4, 3, 3),
        "bias": (8,),
    }
    found = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("q", "k", "v"):  # scores of some units: a softmax that is neither flat nor all of one key
        found[name] /= np.float32(WIDTH**0.5)
    return found


def model(flavour: str) -> Any:
    """Return the graph as an `onnx.ModelProto`.

    Inputs are x float32 [1, 40, 64] and picture float32 [1, 4, 8, 8]; outputs attention and norm, shaped like x, and
    convolution float32 [1, 8, 8, 8].

    Args:
        flavour: "ort" for one with onnxruntime's own operators, else of ONNX's alone.
    """
    from onnx import TensorProto, helper, numpy_helper

    ort = flavour == "ort"
    weights = _weights()
    constants = {name: value for name, value in weights.items() if name not in ("x", "picture")}
    nodes = []

    def add(kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], output, domain=domain, **attributes))

    for name in ("q", "k", "v"):
        add("MatMul", ["x", name], f"{name}_tokens")
    if ort:
        tokens = ["q_tokens", "k_tokens", "v_tokens"]
        add("MultiHeadAttention", tokens, "attention", "com.microsoft", num_heads=HEADS)
        add("RMSNormalization", ["x", "scale"], "norm", axis=-1, epsilon=EPSILON)
    else:
        constants |= {
            "by_head": np.array([1, SEQ, HEADS, HEAD_DIM], np.int64),
            "joined": np.array([1, SEQ, WIDTH], np.int64),
            "root": np.array(HEAD_DIM**-0.5, np.float32),
            "epsilon": np.array(EPSILON, np.float32),
        }
        for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            add("Reshape", [f"{name}_tokens", "by_head"], f"{name}_heads")
            add("Transpose", [f"{name}_heads"], f"{name}_first", perm=order)
        add("MatMul", ["q_first", "k_first"], "products")
        add("Mul", ["products", "root"], "scores")
        add("Softmax", ["scores"], "shares", axis=-1)
        add("MatMul", ["shares", "v_first"], "mixed")
        add("Transpose", ["mixed"], "tokens", perm=[0, 2, 1, 3])
        add("Reshape", ["tokens", "joined"], "attention")
        add("Mul", ["x", "x"], "squares")
        add("ReduceMean", ["squares"], "mean", axes=[-1])
        add("Add", ["mean", "epsilon"], "above_zero")
        add("Sqrt", ["above_zero"], "length")
        add("Div", ["x", "length"], "unit")
        add("Mul", ["unit", "scale"], "norm")
    add("Conv", ["picture", "kernel", "bias"], "convolution", pads=[1, 1, 1, 1])
    ports = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (
            *((name, weights[name].shape) for name in ("x", "picture")),
            *((name, (1, SEQ, WIDTH)) for name in ("attention", "norm")),
            ("convolution", (1, 8, 8, 8)),
        )
    }
    graph = helper.make_graph(
        nodes,
        "probe",
        [ports["x"], ports["picture"]],
        [ports["attention"], ports["norm"], ports["convolution"]],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = (
        [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)] if ort else [helper.make_opsetid("", 17)]
    )
    return helper.make_model(graph, opset_imports=opsets, ir_version=11 if ort else 8)


@lru_cache(maxsize=1)
def expected() -> dict[str, np.ndarray]:
    """Compute the outputs in float64, by sums of products that no BLAS has a part in."""
    w = {name: value.astype(np.float64) for name, value in _weights().items()}
    q, k, v = (np.einsum("bsi,io->bso", w["x"], w[n]).reshape(SEQ, HEADS, HEAD_DIM) for n in ("q", "k", "v"))
    scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5)
    shares = scores / scores.sum(-1, keepdims=True)
    padded = np.pad(w["picture"], ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return {
        "attention": np.einsum("hqk,khd->qhd", shares, v).reshape(1, SEQ, WIDTH),
        "norm": w["x"] / np.sqrt((w["x"] ** 2).mean(-1, keepdims=True) + EPSILON) * w["scale"],
        "convolution": np.einsum("bchwij,ocij->bohw", windows, w["kernel"]) + w["bias"][:, None, None],
    }


def compared(run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]) -> dict[str, float]:
    """Return the relative L2 errors of what `run` computes from the graph's inputs."""
    outputs = run({name: _weights()[name] for name in ("x", "picture")})
    errors = {}
    for (name, right), found in zip(expected().items(), outputs, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
        errors[name] = float(error) if np.isfinite(error) else float("inf")
    return errors


def trial(provider: str, flavour: str | None = None) -> Trial:
    """Run the graph on a provider.

    Args:
        provider: One of `available`, or openblas.
        flavour: That of the graph; by default the one that suits the provider.

    Raises:
        FluxonnxError: It can't be started, or fails.
    """
    graph = model(flavour or traits(provider).flavour)
    if provider == OPENBLAS:
        from fluxonnx.openblas.graph import Graph

        engine = Graph(graph, threads=1)
        try:
            return Trial(compared(engine.run))
        finally:
            engine.close()
    onnxruntime = library()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_severity()
    chosen = session_providers(provider, None, options)
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime raises many types, all meaning this
        raise FluxonnxError(
            f"provider {provider} can't load a small graph: {_line(error)}; use --provider cpu"
        ) from error
    check_started(session, provider)
    try:
        errors = compared(lambda inputs: session.run(None, inputs))
    except Exception as error:
        raise FluxonnxError(
            f"provider {provider} can't run a small graph: {_line(error)}; use --provider cpu"
        ) from error
    if provider == CPU or (places := assigned(session)) is None:
        return Trial(errors)
    whole = sum(nodes.total() for nodes in places.values())
    return Trial(errors, whole, whole - places[provider].total() if provider in places else whole)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def works(provider: str) -> bool:
    """Whether one of the `available` providers can be started on this machine and computes right."""
    try:
        return trial(provider).fault is None
    except Exception:  # whatever the reason, it can't be used
        return False


def check_right(provider: str, flavour: str | None = None) -> None:
    """Check, once per process, that a provider computes right; the CPU's own is not tried.

    Args:
        provider: The provider.
        flavour: That of the graphs it will get.

    Raises:
        FluxonnxError: It does not, or it can't be started.
    """
    flavour = flavour or traits(provider).flavour
    if provider == CPU:
        return
    with _lock:
        if (provider, flavour) in _right:
            return
        if fault := trial(provider, flavour).fault:
            other = ", or a build with --flavour portable" if flavour == "ort" else ""
            raise FluxonnxError(
                f"provider {provider} computes wrong on this machine: in a small graph {fault}; update its driver and "
                f"{traits(provider).package}, or use --provider cpu{other}"
            )
        _right.add((provider, flavour))
