"""What int8 and int4 have in common: the linears that are quantised, and the ones that are not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.errors import UsageError
from fluxonnx.export import panels, primitives
from fluxonnx.export.balance import Coupling, balanced
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.panels import Columns
from fluxonnx.export.precisions.bf16 import BLOCKS, Precision


class Quantised(Precision):
    """Few bits for the linears of the blocks; all other weights as in the checkpoint, copied into the build's files.

    Embeddings, modulation, norms, and the first and last layers are small, and errors in them reach everything.
    """

    self_contained = True
    # Whether activations are rounded to about as few bits as weights.
    rounds_activations = True

    def __init__(self, keep: str | None = None) -> None:
        """Choose the layers that are not quantised.

        Args:
            keep: A regular expression; layers whose names it matches stay as the checkpoint has them.

        Raises:
            UsageError: It is not a regular expression.
        """
        try:
            self.keep = re.compile(keep) if keep else None
        except re.error as error:
            raise UsageError(f"--keep {keep!r} is not a regular expression: {error}") from None

    def settings(self) -> dict[str, str]:
        """Return the layers that are kept."""
        return {"keep": self.keep.pattern if self.keep else ""}

    def keeps(self, tensor: Tensor) -> bool:
        """Whether the layer with this weight was asked to stay as the checkpoint has it."""
        return bool(self.keep and self.keep.search((tensor.whole or tensor).name))

    def quantises(self, tensor: Tensor) -> bool:
        """Whether the linear with this weight is quantised; a weight that already is stays so."""
        if tensor.quantisation:
            return True
        return tensor.name.startswith(BLOCKS) and not self.keeps(tensor)

    def balanced(self, tensors: dict[str, Tensor], couplings: Sequence[Coupling]) -> dict[str, Tensor]:
        """Scale channels so that neither their weights nor their activations are outliers; see `export.balance`."""
        return balanced(tensors, couplings, self.quantises, self.rounds_activations)

    def linear(
        self,
        g: GraphBuilder,
        xs: Sequence[Columns],
        tensor: Tensor,
        bias: str | None,
        sizes: Sequence[int],
        unit: int | None,
    ) -> list[Columns]:
        """Multiply as `Precision.linear` does; a weight that is kept is multiplied slice by slice.

        A weight is in memory whole when it is cast. For the modulations that is 226 MB, more than anything else in a
        step, and new memory is slow.
        """
        if len(sizes) == 1 or self.quantises(tensor):
            return super().linear(g, xs, tensor, bias, sizes, unit)
        x = panels.joined(g, xs)
        biases = primitives.split(g, bias, sizes) if bias else [None] * len(sizes)
        parts = zip(tensor.split(sizes), biases, sizes, strict=True)
        return [Columns(self.product(g, x, part, added), size) for part, added, size in parts]
