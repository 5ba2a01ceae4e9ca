"""What an operator is given, and the table of operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fluxonnx.openblas.gemm import Blas
from fluxonnx.openblas.weights import Wide
from fluxonnx.openblas.workers import Workers

MICROSOFT = "com.microsoft"
# The domain of operators that a plan makes out of several.
FUSED = "fused"


class Unsupported(Exception):
    """An operator has an attribute or an input of a kind that is not computed here."""


@dataclass(frozen=True)
class Node:
    """An operator of a graph; inputs that are left out have the name ""."""

    name: str
    type: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A node with the values of its inputs.

    Attributes:
        node: The node.
        inputs: Arrays, or None where one is left out; `Wide` values only for operators that take them.
        dying: The inputs that nothing reads afterwards.
        workers: Threads and memory.
        blas: Products of matrices.
    """

    node: Node
    inputs: list[Any]
    dying: frozenset[int]
    workers: Workers
    blas: Blas

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        return self.node.attributes.get(name, default)

    def input(self, i: int) -> Any:
        """Return an input; None if it is left out."""
        return self.inputs[i] if i < len(self.inputs) else None

    def numbers(self, i: int, attribute: str) -> list[int] | None:
        """Return a list of integers that is an input since some opset, and was an attribute before."""
        value = self.input(i)
        return self.attribute(attribute) if value is None else [int(n) for n in np.asarray(value).reshape(-1)]

    def empty(self, shape: Any, dtype: Any = np.float32) -> np.ndarray:
        """Return an array for a result, uninitialised."""
        return self.workers.arena.empty(shape, dtype)

    def result(self, shape: tuple[int, ...], dtype: Any, *inputs: int) -> np.ndarray:
        """Return an array for a result: one of the inputs that has this shape and dies here, else a new one."""
        for i in inputs:
            value = self.inputs[i]
            fits = i in self.dying and value.shape == shape and value.dtype == dtype
            if fits and self.workers.arena.lies_alone(value):
                return value
        return self.empty(shape, dtype)


Function = Callable[[Call], Any]


@dataclass(frozen=True)
class Operator:
    """How an operator is computed, and whether it takes `Wide` inputs."""

    function: Function
    wide: bool


OPERATORS: dict[tuple[str, str], Operator] = {}


def operator(*names: str, domain: str = "", wide: bool = False) -> Callable[[Function], Function]:
    """Enter a function into the table under the names of operators.

    Args:
        *names: The names.
        domain: Their domain, "" for ai.onnx.
        wide: Whether inputs may be `Wide`.
    """

    def enter(function: Function) -> Function:
        for name in names:
            OPERATORS[domain, name] = Operator(function, wide)
        return function

    return enter


def whole(value: Any) -> Any:
    """Return a value as an array."""
    return value.array() if isinstance(value, Wide) else value
