"""What int8 and int4 have in common: the linears that are quantised, and the ones that are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np

from fluxonnx.checkpoint.encoded import Encoded
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.errors import UsageError
from fluxonnx.export import panels, primitives
from fluxonnx.export.balance import Coupling, balanced
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.initializers import FLOATS
from fluxonnx.export.panels import Columns
from fluxonnx.export.precisions import blocks
from fluxonnx.export.precisions.bf16 import BLOCKS, Precision, Prepared
from fluxonnx.export.precisions.fp16 import half_rows, half_weight
from fluxonnx.machine import usable_cores


class Quantised(Precision):
    """Few bits for the linears of the blocks; all other weights as in the checkpoint, copied into the build's files.

    Embeddings, modulation, norms, and the first and last layers are small, and errors in them reach everything.
    """

    self_contained = True
    # Whether activations are rounded to about as few bits as weights.
    rounds_activations = True
    # Bits of a weight: blocks of at most as many are kept.
    bits = 8
    # Names of weights whose error is above that.
    measured: frozenset[str] = frozenset()

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

    def file_label(self, flavour: str) -> str:
        """Return a label per flavour.

        Portable graphs have no panels and no bfloat16. MatMulNBits has unsigned integers, DequantizeLinear signed ones.
        """
        return self.name if flavour == "ort" else f"{self.name}.{flavour}"

    def keeps(self, tensor: Tensor) -> bool:
        """Whether the layer with this weight was asked to stay as the checkpoint has it, or has to."""
        name = (tensor.whole or tensor).name
        return name in self.measured or bool(self.keep and self.keep.search(name))

    def quantises(self, tensor: Tensor) -> bool:
        """Whether the linear with this weight is quantised; a weight that already is stays so."""
        if tensor.quantisation:
            return True
        if self.keeps_blocks(tensor):
            return False
        return tensor.name.startswith(BLOCKS) and not self.keeps(tensor)

    def keeps_blocks(self, tensor: Tensor) -> bool:
        """Whether the linear with this weight keeps the blocks of integers that the file has."""
        if not isinstance(tensor, Encoded) or tensor.blocks is None or len(tensor.shape) != 2:
            return False
        return tensor.blocks.bits <= self.bits and tensor.name.startswith(BLOCKS) and not self.keeps(tensor)

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply as `Precision.product` does, or by the blocks of the file."""
        if not self.keeps_blocks(tensor):
            return super().product(g, x, tensor, bias)
        assert isinstance(tensor, Encoded)
        product = blocks.product(g, x, tensor)
        return g.op("Add", product, bias) if bias else product

    def prepared(self, tensors: dict[str, Tensor], couplings: Sequence[Coupling]) -> Prepared:
        """Scale channels that are outliers (see `export.balance`), and keep layers that are rounded too badly still."""
        # channels that lie in a block can't be scaled, as the block has one scale
        kept_blocks = {name: tensor for name, tensor in tensors.items() if self.keeps_blocks(tensor)}
        scalable = tensors | {name: replace(tensor, dtype="blocks") for name, tensor in kept_blocks.items()}
        found, inputs = balanced(scalable, couplings, self.quantises, self.rounds_activations)
        found |= kept_blocks
        layers = [t for t in found.values() if len(t.shape) == 2 and t.dtype in FLOATS and self.quantises(t)]
        with ThreadPoolExecutor(usable_cores()) as pool:
            measured = pool.map(lambda t: self.error(t, inputs.get(t.name, np.ones(t.shape[1]))), layers)
            errors = {t.name: error for t, error in zip(layers, measured, strict=True) if np.isfinite(error)}
        kept = [name for name, error in errors.items() if error > self.most_error]
        chosen = copy(self)
        chosen.measured = frozenset(kept)
        named = {name.removesuffix(".weight"): round(error, 4) for name, error in errors.items()}
        return Prepared(chosen, found, named, [name.removesuffix(".weight") for name in kept])

    def error(self, tensor: Tensor, inputs: np.ndarray) -> float:
        """Return the relative L2 error of a product with this weight, for normal activations of magnitudes `inputs`.

        It is measured on some of the rows. NaN for a weight of zeros.
        """
        raise NotImplementedError

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value; few runtimes have bfloat16, so portable graphs have float16 instead."""
        if g.fused or self.stored_dtype(tensor) != "BF16":
            return super().weight(g, tensor)
        return half_weight(g, tensor) if len(tensor.shape) > 1 else g.stored(tensor, "F32", in_place=False)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows up as `Precision.embedding` does; likewise."""
        if g.fused or self.stored_dtype(tensor) != "BF16":
            return super().embedding(g, ids, tensor)
        return half_rows(g, ids, tensor)

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
