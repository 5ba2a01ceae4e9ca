"""A graph that is loaded, and its runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fluxonnx.errors import FluxonnxError
from fluxonnx.machine import usable_cores
from fluxonnx.openblas.call import OPERATORS, Call, Unsupported, whole
from fluxonnx.openblas.gemm import Blas, find_blas, one_thread_per_call
from fluxonnx.openblas.plan import Plan, Step, described, plan, read, steps
from fluxonnx.openblas.weights import Packed, Wide
from fluxonnx.openblas.workers import Workers

# Results of folding that are kept, in values: norms' weights and tables, but no matrices.
FOLDED = 1 << 16


class Graph:
    """A loaded graph."""

    def __init__(
        self,
        model: onnx.ModelProto | Path,
        folder: Path | None = None,
        threads: int | None = None,
        blas: Blas | None = None,
        timed: bool = False,
    ) -> None:
        """Load a graph; its external data is mapped, not read.

        Args:
            model: The graph, or its file.
            folder: Where external data lies; by default where the file does.
            threads: Threads per operator; None for one per core that this process may use.
            blas: Products of matrices; by default those of `find_blas`.
            timed: Whether the time of each operator is taken down.

        Raises:
            UsageError: threadpoolctl is missing, or the BLAS that was asked for.
            FluxonnxError: The graph can't be read, or holds something that is not supported.
        """
        self.blas = blas or find_blas()
        if isinstance(model, onnx.ModelProto):
            found = plan(model, folder or Path())
        else:
            try:
                found = plan(read(model), folder or model.parent)
            except FluxonnxError as error:
                raise FluxonnxError(
                    f"{model} can't be loaded: {error}" if str(model) not in str(error) else str(error)
                ) from None
        self._workers = Workers(threads or usable_cores())
        self.constants = dict(found.constants)
        self._timed = timed
        self.times: list[tuple[str, int, int]] = []  # (operator type, calls, microseconds)
        try:
            with one_thread_per_call():
                self.plan = self._folded(found)
        except BaseException:
            self._workers.close()
            raise

    def _folded(self, found: Plan) -> Plan:
        """Compute what depends on constants alone, as far as the results are small; forget constants not needed."""
        nodes = []
        for step in found.steps:
            node = step.node
            ready = all(name in self.constants or not name for name in node.inputs)
            if ready and node.inputs and not set(node.outputs) & set(found.outputs):
                values = [self.constants[name] if name else None for name in node.inputs]
                if all(_size(value) <= FOLDED for value in values):
                    made = self._compute(Step(node, frozenset(), ()), values)
                    if all(isinstance(value, np.ndarray) and value.size <= FOLDED for value in made):
                        self.constants.update(zip(node.outputs, map(np.array, made), strict=False))
                        continue
            nodes.append(node)
        needed = {name for node in nodes for name in node.inputs} | set(found.outputs)
        self.constants = {name: value for name, value in self.constants.items() if name in needed}
        return replace(found, steps=steps(nodes, found.outputs))

    def run(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Run the graph.

        Args:
            inputs: An array for each input of the graph.

        Returns:
            The outputs; they belong to the caller.

        Raises:
            FluxonnxError: An input is missing, unknown, or of another dtype or shape; or a node failed.
        """
        values: dict[str, Any] = dict(_checked(self.plan, inputs))
        with one_thread_per_call():
            for step in self.plan.steps:
                known = [self._value(name, values) for name in step.node.inputs]
                for name in step.forgotten:
                    values.pop(name, None)
                made = self._compute(step, known)
                for name, value in zip(step.node.outputs, made, strict=False):
                    if name and name not in step.forgotten:
                        values[name] = value
                del known, made
        return [np.array(_plain(self._value(name, values))) for name in self.plan.outputs]

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if not name:
            return None
        return values[name] if name in values else self.constants[name]

    def _compute(self, step: Step, inputs: list[Any]) -> tuple[Any, ...]:
        """Compute a node."""
        node = step.node
        found = OPERATORS[node.domain, node.type]
        start = time.perf_counter_ns() if self._timed else 0
        try:
            if not found.wide:
                inputs[:] = map(whole, inputs)
            if node.type not in ("Cast", "DequantizeLinear"):
                inputs[:] = map(_plain, inputs) if not found.wide else inputs
            with np.errstate(all="ignore"):
                made = found.function(Call(node, inputs, step.dying, self._workers, self.blas))
        except Unsupported as error:
            raise FluxonnxError(f"{described(node)} can't be computed: {error}; use --provider cpu") from None
        except MemoryError:
            raise FluxonnxError(f"{described(node)} failed for lack of memory: choose a smaller size") from None
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FluxonnxError(f"{described(node)} failed: {reason}; the inputs are {_shapes(inputs)}") from error
        if self._timed:
            self.times.append((node.type, 1, (time.perf_counter_ns() - start) // 1000))
        return made if isinstance(made, tuple) else (made if isinstance(made, Wide) else np.asarray(made),)

    def close(self) -> None:
        """Free the memory, and end the threads."""
        self._workers.close()
        self.constants = {}


def _plain(value: Any) -> Any:
    """Return a packed constant or a wide value as an array."""
    return value.whole() if isinstance(value, Packed) else whole(value)


def _size(value: Any) -> int:
    return int(np.prod(value.shape)) if value is not None else 0


def _shapes(inputs: list[Any]) -> str:
    return ", ".join(f"{getattr(x, 'dtype', 'float32')} {list(x.shape)}" for x in inputs if x is not None) or "none"


def _checked(found: Plan, inputs: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """Check the inputs of a run."""
    names = [value.name for value in found.inputs]
    if set(inputs) != set(names):
        raise FluxonnxError(f"the graph {found.name} takes {', '.join(names)}, but was given {', '.join(inputs)}")
    arrays = {}
    for value in found.inputs:
        array = np.asarray(inputs[value.name])
        if array.dtype != value.dtype:
            raise FluxonnxError(f"the input {value.name} is {array.dtype}, but must be {value.dtype}")
        if value.shape is not None:
            # A size with a name may be 1 where others of that name are not: such an input is broadcast.
            fits = len(value.shape) == array.ndim and all(
                size == wanted or not isinstance(wanted, int)
                for wanted, size in zip(value.shape, array.shape, strict=True)
            )
            if not fits:
                wanted_shape = ", ".join("?" if n is None else str(n) for n in value.shape)
                raise FluxonnxError(f"the input {value.name} is {list(array.shape)}, but must be [{wanted_shape}]")
        arrays[value.name] = array
    return arrays
