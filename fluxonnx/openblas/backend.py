"""The engine behind ONNX's own interface for backends, `onnx.backend.base`, with which its official tests run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.backend.base import Backend, BackendRep

from fluxonnx.errors import UsageError
from fluxonnx.openblas.graph import Graph
from fluxonnx.openblas.plan import unknown

# The newest IR version that onnxruntime reads is of no concern here; this one knows all of our operators.
IR_VERSION = 10


class BlasRep(BackendRep):
    """A graph that is loaded; `close` frees its memory."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def run(self, inputs: Any, **_: Any) -> tuple[np.ndarray, ...]:
        """Run the graph.

        Args:
            inputs: Arrays by name, or in the order of the graph's inputs; a single array for a single input.

        Returns:
            The outputs, in the graph's order; they belong to the caller.

        Raises:
            UsageError: There are too many or too few inputs.
            FluxonnxError: An input is of another dtype or shape, or a node failed.
        """
        if not isinstance(inputs, Mapping):
            given = inputs if isinstance(inputs, Sequence) else [inputs]
            names = [value.name for value in self._graph.plan.inputs]
            if len(given) != len(names):
                raise UsageError(f"the graph takes {len(names)} inputs ({', '.join(names)}), not {len(given)}")
            inputs = dict(zip(names, given, strict=True))
        return tuple(self._graph.run(inputs))

    def close(self) -> None:
        """Free the graph's memory, and end its threads."""
        self._graph.close()


class BlasBackend(Backend):
    """Runs graphs on numpy and BLAS: `BlasBackend.prepare(onnx.load(path)).run(inputs)`."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> BlasRep:
        """Load a graph.

        Args:
            model: The graph.
            device: "CPU"; there is no other.
            **kwargs: `folder`, where external data that is not loaded lies, by default the working directory;
                `threads`, see `Graph`.

        Raises:
            UsageError: The device is not "CPU", or threadpoolctl is missing.
            FluxonnxError: The graph holds something that is not supported.
        """
        if not cls.supports_device(device):
            raise UsageError(f"the openblas backend runs on the device CPU, not on {device}")
        return BlasRep(Graph(model, Path(kwargs.get("folder", ".")), threads=kwargs.get("threads")))

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[np.ndarray, ...]:
        """Run one node.

        Args:
            node: The node.
            inputs: Arrays, one for each input of the node that is not left out.
            device: "CPU".
            outputs_info: Not needed, and ignored.
            **kwargs: `opset_version`, by default the newest that the installed onnx knows.

        Raises:
            UsageError: The device is not "CPU", or the number of inputs is wrong.
            FluxonnxError: The node is not supported, or failed.
        """
        names = [name for name in node.input if name]
        arrays = [np.asarray(value) for value in inputs]
        if len(arrays) != len(names):
            raise UsageError(f"the node takes {len(names)} inputs, not {len(arrays)}")
        takes = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in dict(zip(names, arrays, strict=True)).items()
        ]
        gives = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        opset = kwargs.get("opset_version") or onnx.defs.onnx_opset_version()
        opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(node.domain, 1)] if node.domain else [])
        model = helper.make_model(
            helper.make_graph([node], "node", takes, gives), opset_imports=opsets, ir_version=IR_VERSION
        )
        loaded = cls.prepare(model, device)
        try:
            return loaded.run(dict(zip(names, arrays, strict=True)))
        finally:
            loaded.close()

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **_: Any) -> bool:
        """Whether all operators of a graph are known; what their attributes ask for is seen when the graph runs."""
        return cls.supports_device(device) and not unknown(model)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether graphs can run on a device: on "CPU" only."""
        return device.partition(":")[0] == "CPU"
