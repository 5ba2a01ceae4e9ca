"""Weights as the checkpoint stores them; the base of the other precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto

from fluxonnx.checkpoint.encoded import Encoded
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export import panels, primitives
from fluxonnx.export.balance import Coupling
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.panels import Columns
from fluxonnx.export.precisions import float8

# The module lists whose linears hold nearly all of the weights.
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "model.layers.")

# The newest opset whose InstanceNormalization onnxruntime's CUDA provider has.
NORMS_ON_GPUS = 21
# Rows of a weight above which a static portable graph multiplies by parts of it: CoreML takes no larger dimension.
# Source: IsInputSupported, onnxruntime/core/providers/coreml/builders/helper.cc.
MOST_ROWS = 16384


@dataclass(frozen=True)
class Prepared:
    """What a precision makes of a model's weights.

    Attributes:
        precision: Itself, with what it found out about these weights.
        tensors: The weights to build the graph of.
        errors: The relative error of a product that the rounding of this layer is expected to make, by its name.
        kept: Those of these layers that are not rounded, because their error would be too large.
    """

    precision: Precision
    tensors: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


class Precision:
    """Weights as the checkpoint stores them (bf16 for the released models), arithmetic in float32.

    Nothing is copied: initializers point into the checkpoint's own files, and the graph casts each weight right
    before it is used.
    """

    name = "bf16"
    # Whether all weights are in files of the build, instead of in the checkpoint's.
    self_contained = False
    # Whether all weights that are matrices are converted, so that a copy needs none of the checkpoint's files.
    converts = False
    # Whether the checkpoint may hold weights that are quantised to integers.
    takes_integers = False
    # The dtype of the weights that are computed from such integers otherwise.
    integers_as = "BF16"
    # Whether kernels of convolutions are float32 in the graph: then they may be sums of the checkpoint's kernels.
    sums_kernels = True
    # Whether large pictures go through the autoencoder in bands of rows, which saves memory on processors; on GPUs many
    # small kernels cost time.
    bands = True
    # The relative error of a product above which the weight of a layer is not rounded.
    most_error = 1.0
    # The newest opset of the autoencoder's graphs; None for that of the build.
    autoencoder_opset: int | None = None
    # The flavours that can be computed so.
    flavours: tuple[str, ...] = ("ort", "portable")

    def settings(self) -> dict[str, str]:
        """Return what tells this build from others of the same name."""
        return {}

    def lowest_opset(self, flavour: str) -> int:
        """Return the oldest ai.onnx opset that has the operators this needs."""
        return 17

    def opset(self, component: str, opset: int) -> int:
        """Return the ai.onnx opset of one graph of a build of `opset`."""
        return min(opset, self.autoencoder_opset or opset) if component.startswith("vae") else opset

    def file_label(self, flavour: str) -> str:
        """Return the label of the build's weight files; both flavours share files of the same bytes."""
        return self.name

    def prepared(self, tensors: dict[str, Tensor], couplings: Sequence[Coupling]) -> Prepared:
        """Look at all weights of a graph before it is built; `couplings` say which of them belong together."""
        return Prepared(self, tensors)

    def arithmetic(self, component: str) -> int:
        """Return the ONNX type that a graph computes in."""
        return TensorProto.FLOAT

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return the safetensors dtype under which `tensor` is stored; values that are computed are rounded to BF16."""
        return "BF16" if isinstance(tensor, Encoded) else tensor.dtype

    def cuts(self, tensor: Tensor) -> bool:
        """Whether a slice of a tensor is cut out of the whole, as which it is stored by the checkpoint's name."""
        return False

    def _stored(self, g: GraphBuilder, tensor: Tensor) -> str:
        return g.stored(tensor, self.stored_dtype(tensor), in_place=not self.self_contained)

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a value of the type that the graph computes in: float32 but for `arithmetic`."""
        if tensor.whole is not None and self.cuts(tensor):
            return g.weight_rows(self.weight(g, tensor.whole), tensor)
        if not self.self_contained and float8.is_castable(g, tensor) and self.stored_dtype(tensor) != "F32":
            value = float8.cast(g, tensor)
        else:
            value = self._stored(g, tensor)
        if g.dtype(value) == g.arithmetic:
            return value
        return g.weight_op("Cast", value, to=g.arithmetic)

    def slices(self, width: int) -> list[int]:
        """Return the widths of the slices in which `width` columns go through a feed-forward."""
        return [width]

    def linear(
        self,
        g: GraphBuilder,
        xs: Sequence[Columns],
        tensor: Tensor,
        bias: str | None,
        sizes: Sequence[int],
        unit: int | None,
    ) -> list[Columns]:
        """Multiply rows by `tensor` [out, in], the checkpoint's layout, and add `bias` [out].

        Args:
            g: The graph.
            xs: Matrices that side by side are [rows, in].
            tensor: The weight.
            bias: What is added.
            sizes: Widths of the matrices as which the result [rows, out] is returned.
            unit: The number that the width of a panel must be a multiple of; None for no panels.
        """
        x = panels.joined(g, xs)
        if g.static and not g.fused and tensor.shape[0] > MOST_ROWS and len(sizes) > 1:
            biases = primitives.split(g, bias, sizes) if bias else [None] * len(sizes)
            parts = zip(tensor.split(sizes), biases, sizes, strict=True)
            return [Columns(self.product(g, x, part, added), size) for part, added, size in parts]
        values = primitives.split(g, self.product(g, x, tensor, bias), sizes)
        return [Columns(value, size) for value, size in zip(values, sizes, strict=True)]

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply `x` [..., in] by `tensor` [out, in], and add `bias` [out]."""
        return primitives.product(g, x, self.weight(g, tensor), bias)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look up rows of `tensor` [entries, dim] by int64 `ids`, as `weight` does; only these rows are cast."""
        return g.cast(g.op("Gather", self._stored(g, tensor), ids, axis=0), g.arithmetic)

    def conv(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int | None, **attributes: Any) -> str:
        """Convolve `x` [batch, in, height, width] with `tensor` [out, in, height, width], and add `bias` [out].

        Args:
            g: The graph.
            x: The picture.
            tensor: The weight.
            bias: What is added.
            bands: A number that divides the height, if the picture may be rounded to 8 bits; else None.
            **attributes: The attributes of Conv.
        """
        return g.op("Conv", x, self.weight(g, tensor), bias, **attributes)

    def band_conv(self, g: GraphBuilder, tensor: Tensor, bias: str, rounded: bool) -> Callable[..., str]:
        """Return a function that convolves a band of a picture as `conv` does, with the attributes of Conv.

        Args:
            g: The graph.
            tensor: The weight.
            bias: What is added.
            rounded: Whether the picture may be rounded to 8 bits.
        """
        weight = self.weight(g, tensor)
        return lambda x, **attributes: g.op("Conv", x, weight, bias, **attributes)

    def attention(self, g: GraphBuilder, q: str, k: str, v: str, attend: Callable[[str, str, str], str]) -> str:
        """Return attend(q, k, v), all float32 [batch, seq, heads * head_dim]; `attend` also takes float16."""
        return attend(q, k, v)
