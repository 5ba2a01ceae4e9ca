"""A graph builder that knows in which precision its weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxonnx.checkpoint.formats import check_scales
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.errors import CheckpointError
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.initializers import FLOATS
from fluxonnx.export.precisions import Precision
from fluxonnx.export.precisions.dequantised import dequantised


class ModelBuilder(GraphBuilder):
    """Builds one graph of a model in a precision."""

    def __init__(
        self,
        name: str,
        precision: Precision,
        flavour: str,
        opset: int,
        tensors: dict[str, Tensor] | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> None:
        """Start an empty graph; see `GraphBuilder` for the other arguments.

        Args:
            name: Its name.
            precision: How its weights are stored and its linear layers computed.
            flavour: "ort" or "portable".
            opset: The ai.onnx opset.
            tensors: The checkpoint's tensors by name.
            dims: The sizes of a static graph.
        """
        super().__init__(name, flavour, opset, tensors, dims, precision.arithmetic(name))
        self.precision = precision

    def tensor(self, name: str, shape: Sequence[int], integers: bool = True) -> Tensor:
        """Take a weight of the module in scope out of the checkpoint.

        Args:
            name: The parameter.
            shape: Its shape.
            integers: Whether it is used for a product, which some precisions compute with the integers of the file.

        Raises:
            CheckpointError: It is missing, has another shape or dtype, or scales that are no numbers.
        """
        tensor = super().tensor(name, shape)
        if tensor.dtype not in FLOATS and not tensor.quantisation:
            raise CheckpointError(f"{self.name}: tensor {self.path(name)} is {tensor.dtype}, expected BF16, F16 or F32")
        check_scales(tensor)
        takes = self.precision.takes_integers and integers and len(tensor.shape) == 2
        if tensor.quantisation and not takes:
            return dequantised(tensor, self.precision.integers_as)
        return tensor

    def weight(self, name: str, *shape: int) -> str:
        """Return a weight of the module in scope as a value."""
        return self.precision.weight(self, self.tensor(name, shape))
