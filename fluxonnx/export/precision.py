"""How a weight is stored and a linear computed, per precision; nothing else in the package knows.

A new precision is a subclass that stores weights its own way, and a line in `PRECISIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint import Tensor
from fluxonnx.errors import UsageError
from fluxonnx.export import half, int8, linears, ops, quantise
from fluxonnx.export.graph import MICROSOFT, Part
from fluxonnx.machine import adds_int8_products_exactly

if TYPE_CHECKING:
    from fluxonnx.export.graph import GraphBuilder


class Precision:
    """Weights as the checkpoint stores them (bf16 for the released models), arithmetic in float32.

    Nothing is copied: initializers point into the checkpoint's own files, and the graph casts each weight right
    before it is used.
    """

    name = "bf16"
    # Whether a build has files for all its weights, instead of pointing into the checkpoint's.
    self_contained = False
    # Whether it can multiply by weights that are integers in the checkpoint.
    takes_integers = False
    # Whether convolutions are computed with float32 kernels, which may then be sums of those in the file.
    sums_kernels = True

    def settings(self) -> dict[str, str]:
        """Return what distinguishes this build from others of the same name."""
        return {}

    def lowest_opset(self, flavour: str) -> int:
        """Return the oldest ai.onnx opset with the operators this needs."""
        return 17

    def file_label(self, flavour: str) -> str:
        """Return what names the build's weight files; both flavours share them where their bytes are the same."""
        return self.name

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return the safetensors dtype under which `tensor` is stored."""
        return tensor.dtype

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value."""
        value = g.stored(tensor, self.stored_dtype(tensor))
        if self.stored_dtype(tensor) == "F32":
            return value
        return g.weight_op("Cast", value, to=TensorProto.FLOAT)

    def pieces(self, size: int) -> list[int]:
        """Return the sizes of the values that hold `size` columns between the linears of a feed-forward."""
        return [size]

    def linear(
        self,
        g: GraphBuilder,
        xs: Sequence[str],
        tensor: Tensor,
        bias: str | None,
        sizes: Sequence[int],
        unit: int | None,
    ) -> list[str]:
        """Multiply rows by `tensor` [out, in] as the checkpoint has it, and add `bias` [out].

        Args:
            g: The graph.
            xs: Values [rows, n] or [runs, rows, n] that side by side are [rows, in].
            tensor: The weight.
            bias: What is added.
            sizes: Columns of each of the values that the result [rows, out] is returned as.
            unit: Of how many columns a run has to be a multiple, if one may be [runs, rows, size / runs] instead of
                [rows, size]; else None.
        """
        return ops.split(g, self.product(g, linears.side_by_side(g, xs), tensor, bias), sizes)

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply the rows of `x` [rows, in] by `tensor` [out, in], and add `bias` [out]."""
        weight = self.weight(g, tensor)
        return g.op("Gemm", x, weight, *([bias] if bias else []), transB=1)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows of `tensor` [entries, dim] up by int64 `ids`, as float32; only the rows are cast, not the table."""
        rows = g.op("Gather", g.stored(tensor, self.stored_dtype(tensor)), ids, axis=0)
        if self.stored_dtype(tensor) == "F32":
            return rows
        return g.op("Cast", rows, to=TensorProto.FLOAT)

    def conv(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int | None, **attributes: Any) -> str:
        """Convolve `x` [batch, in, height, width] with `tensor` [out, in, height, width], and add `bias` [out].

        Args:
            g: The graph.
            x: The picture.
            tensor: The weight.
            bias: What is added.
            bands: See `ops.conv`.
            **attributes: Those of Conv.
        """
        return g.op("Conv", x, self.weight(g, tensor), bias, **attributes)

    def attention(self, g: GraphBuilder, q: str, k: str, v: str, attend: Callable[[str, str, str], str]) -> str:
        """Return attend(q, k, v), all float32 [batch, seq, heads * head_dim]; `attend` takes float16, too."""
        return attend(q, k, v)


class Float32(Precision):
    """Weights converted to float32, in a file of their own: twice the size, no casts."""

    name = "fp32"

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return F32, whatever the checkpoint has."""
        return "F32"

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value; what is stored has the checkpoint's names, so no parts."""
        if tensor.whole is not None:
            return g.weight_rows(self.weight(g, tensor.whole), tensor)
        return super().weight(g, tensor)


class Float16(Precision):
    """Weights converted to float16, half of float32's size, and products computed so; see `half` for what is not."""

    name = "fp16"
    self_contained = True
    sums_kernels = False

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return F32: what is not a matrix is small, and errors in it reach everything."""
        return "F32"

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value."""
        return half.weight(g, tensor) if len(tensor.shape) > 1 else super().weight(g, tensor)

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply as `Precision.product` does."""
        if not tensor.name.startswith(BLOCKS):
            return super().product(g, x, tensor, bias)
        return half.linear(g, x, tensor, bias)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows up as `Precision.embedding` does."""
        return half.embedding(g, ids, tensor)

    def conv(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int | None, **attributes: Any) -> str:
        """Convolve as `Precision.conv` does."""
        return half.conv(g, x, tensor, bias, **attributes)

    def attention(self, g: GraphBuilder, q: str, k: str, v: str, attend: Callable[[str, str, str], str]) -> str:
        """Attend in float16 in the blocks; in the autoencoder nothing bounds the products of q and k."""
        return half.attention(g, q, k, v, attend) if g.path("").startswith(BLOCKS) else attend(q, k, v)


class Quantised(Precision):
    """Few bits for the linears of the blocks; everything else as the checkpoint has it, copied into the build's files.

    Embeddings, modulation, norms, and the first and last layers are small, and errors in them reach everything.
    """

    self_contained = True

    def __init__(self, keep: str | None = None) -> None:
        """Choose what is not quantised.

        Args:
            keep: A regular expression; layers in whose names it is found stay as the checkpoint has them.

        Raises:
            UsageError: It is none.
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
        """Whether the linear with this weight has few bits; what has few bits already keeps them."""
        if tensor.quantisation:
            return True
        return tensor.name.startswith(BLOCKS) and not self.keeps(tensor)

    def linear(
        self,
        g: GraphBuilder,
        xs: Sequence[str],
        tensor: Tensor,
        bias: str | None,
        sizes: Sequence[int],
        unit: int | None,
    ) -> list[str]:
        """Multiply as `Precision.linear` does, by parts of a weight that is kept.

        What is cast is in memory whole: of the modulations 226 MB, more than anything else in a step, and new memory is
        slow.
        """
        if len(sizes) == 1 or self.quantises(tensor):
            return super().linear(g, xs, tensor, bias, sizes, unit)
        x = linears.side_by_side(g, xs)
        biases = ops.split(g, bias, sizes) if bias else [None] * len(sizes)
        return [self.product(g, x, part, added) for part, added in zip(tensor.split(sizes), biases, strict=True)]


class Int8(Quantised):
    """W8A8: 8-bit weights with a scale per output channel, activations rounded to 8 bits with a scale per row.

    The product of integers is exact. Activations are unsigned, which is what processors multiply fastest. Those that
    add products in pairs, in 16 bits that saturate (`machine.adds_int8_products_exactly`), get fewer levels of
    activations, and weights of which no two neighbours add up to what could overflow: a sixth more rounding error at
    most, and a quarter faster than the kernel for unsigned weights, which would be exact, too.

    Where products are exact without more ado, the decoder's convolutions behind a norm are such products, too.

    Weights that are integers in the checkpoint stay those integers, rotated or not as they are there; where pairs of
    products would overflow they are stored around 128, for the kernel for unsigned weights.
    """

    name = "int8"
    takes_integers = True

    def __init__(self, keep: str | None = None, rotate: bool = False, paired: bool | None = None) -> None:
        """Choose how.

        Args:
            keep: What is not quantised.
            rotate: Whether all weights and activations are multiplied by a Hadamard matrix, `ROTATION` inputs at a
                time, which leaves the product as it is but takes the outliers out of both.
            paired: Whether products have to be safe to add in pairs; by default what is best on this machine.
        """
        super().__init__(keep)
        self.rotate = rotate
        self.paired = not adds_int8_products_exactly() if paired is None else paired
        self.levels = PAIRED_LEVELS if self.paired else 127

    def settings(self) -> dict[str, str]:
        """Return the layers that are kept, whether everything is rotated, and what the integers are made for."""
        products = "pairs" if self.paired else "exact"
        return {**super().settings(), "rotate": str(self.rotate).lower(), "products": products}

    def rotation(self, tensor: Tensor) -> int:
        """Return how many inputs of a linear are mixed at a time, 0 for none.

        Linears that narrow read products of activations, whose outliers cost most: a few are mixed even if none need
        be (measured at full width, random weights: 0.94 % error without, 0.66 % with these, 0.62 % with all).
        """
        if tensor.quantisation:
            return tensor.quantisation.rotation
        n_out, n_in = tensor.shape
        if self.rotate and n_in % ROTATION == 0:
            return ROTATION
        return NARROWING_ROTATION if n_in > n_out and n_in % NARROWING_ROTATION == 0 else 0

    def pieces(self, size: int) -> list[int]:
        """Return as many runs at a time as `RUNS`, or a little fewer so that all pieces are alike."""
        width = int8.width_of_runs(size, 1)
        count = size // width
        values = -(-count // RUNS)
        return [(count // values + (i < count % values)) * width for i in range(values)]

    def linear(
        self,
        g: GraphBuilder,
        xs: Sequence[str],
        tensor: Tensor,
        bias: str | None,
        sizes: Sequence[int],
        unit: int | None,
    ) -> list[str]:
        """Multiply as `Precision.linear` does, in integers."""
        if not self.quantises(tensor):
            return super().linear(g, xs, tensor, bias, sizes, unit)
        levels = 127 if tensor.quantisation else self.levels
        return int8.linear(g, xs, tensor, bias, sizes, unit, levels, self.rotation(tensor), self.paired)

    def conv(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int | None, **attributes: Any) -> str:
        """Convolve as `Precision.conv` does, in integers where that is exact and pays.

        With fewer channels, gathering the neighbours of each pixel takes what the product saves.
        """
        if bands is None or self.paired or self.keeps(tensor) or tensor.shape[1] < CONV_CHANNELS:
            return super().conv(g, x, tensor, bias, bands, **attributes)
        return int8.conv(g, x, tensor, bias, bands, **attributes)


class Int4(Quantised):
    """4-bit weights with a scale for each block of a row; embeddings are 8-bit rows with a scale each."""

    name = "int4"

    def __init__(self, keep: str | None = None, block: int = 64) -> None:
        """Choose what is not quantised, and how many weights share a scale: 32, 64 or 128.

        Raises:
            UsageError: Another number.
        """
        super().__init__(keep)
        if block not in INT4_BLOCKS:
            raise UsageError(f"--block {block} is out of range: choose one of {', '.join(map(str, INT4_BLOCKS))}")
        self.block = block

    def settings(self) -> dict[str, str]:
        """Return the layers that are kept, and the size of a block."""
        return {**super().settings(), "block": str(self.block)}

    def lowest_opset(self, flavour: str) -> int:
        """Return 21 for portable graphs: int4, and DequantizeLinear by blocks."""
        return 17 if flavour == "ort" else 21

    def file_label(self, flavour: str) -> str:
        """Return a name per flavour: MatMulNBits has unsigned integers, DequantizeLinear signed ones."""
        return self.name if flavour == "ort" else f"{self.name}.{flavour}"

    def quantises(self, tensor: Tensor) -> bool:
        """Whether the linear with this weight has few bits: its rows must consist of whole blocks."""
        return super().quantises(tensor) and tensor.shape[1] % self.block == 0

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply by MatMulNBits, or by the weights after DequantizeLinear."""
        if not self.quantises(tensor):
            return super().product(g, x, tensor, bias)
        product = self._blocked(g, x, tensor)
        return g.op("Add", product, bias) if bias else product

    def _blocked(self, g: GraphBuilder, x: str, tensor: Tensor) -> str:
        n_out, n_in = tensor.shape
        block, blocks = self.block, n_in // self.block
        fused = g.target.fused
        packed = Part("", "U8", (n_out, blocks, block // 2))
        if not fused:
            packed = replace(packed, graph_dtype=TensorProto.INT4, graph_shape=(n_out, n_in))
        parts = (packed, Part(".scale", "F32", (n_out, blocks)))

        def encode(source: Tensor) -> tuple[np.ndarray, np.ndarray]:
            integers, scales = quantise.int4_blocks(source, block)
            # MatMulNBits takes unsigned integers around 8, ONNX's own int4 is in two's complement
            return quantise.pack_int4(integers, 8 if fused else 0), scales

        g.encoded(tensor, parts, encode)
        weight, scale = tensor.name, tensor.name + ".scale"
        if fused:
            # accuracy_level 4: activations are rounded to int8, block by block
            sizes: dict[str, Any] = {"K": n_in, "N": n_out, "bits": 4, "block_size": block, "accuracy_level": 4}
            shape = [*g.shape(x)[:-1], n_out]
            return g.op("MatMulNBits", x, weight, scale, domain=MICROSOFT, like=x, shape=shape, **sizes)
        floats = g.weight_op("DequantizeLinear", weight, scale, axis=1, block_size=block)
        return g.op("Gemm", x, floats, transB=1)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows up and scale them."""
        parts = (Part("", "I8", tensor.shape), Part(".scale", "F32", (tensor.shape[0], 1)))
        g.encoded(tensor, parts, quantise.int8_rows)
        rows = g.op("Cast", g.op("Gather", tensor.name, ids, axis=0), to=TensorProto.FLOAT)
        return g.op("Mul", rows, g.op("Gather", tensor.name + ".scale", ids, axis=0))


# Inputs that are mixed at a time, a power of four; as in most of ComfyUI's "convrot" checkpoints.
ROTATION = 256
# Enough to make the products of SwiGLU look normal, at a quarter of the work.
NARROWING_ROTATION = 64
# Runs of columns that go through a feed-forward together: enough to share out among threads, few enough to stay near.
RUNS = 12
# Inputs of a convolution from which on integers are worth it (3x3 at the decoder's sizes, milliseconds in float32 and
# integers: 512 inputs 87 and 29, 256 inputs 87 and 41, 128 inputs 93 and 73).
CONV_CHANNELS = 256
# On each side of zero. Fewer leave more room for weights, as 2 * 112 * 146 < 2**15; from 104 to 120 the error is alike.
PAIRED_LEVELS = 112
INT4_BLOCKS = (32, 64, 128)
# The module lists whose linears hold nearly all of the weights.
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "model.layers.")
PRECISIONS: dict[str, type[Precision]] = {cls.name: cls for cls in (Precision, Float32, Float16, Int8, Int4)}


def make_precision(name: str, keep: str | None = None, block: int | None = None, rotate: bool = False) -> Precision:
    """Return a precision by its name.

    Raises:
        UsageError: An unknown name, or an option that this precision does not have.
    """
    if name not in PRECISIONS:
        raise UsageError(f"precision {name!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    kind = PRECISIONS[name]
    if keep is not None and not issubclass(kind, Quantised):
        raise UsageError(f"--keep is for int8 and int4, but the precision is {name}")
    if block is not None and kind is not Int4:
        raise UsageError(f"--block is for int4, but the precision is {name}")
    if rotate and kind is not Int8:
        raise UsageError(f"--rotate is for int8, but the precision is {name}")
    if kind is Int4:
        return Int4(keep, *([] if block is None else [block]))
    return Int8(keep, rotate) if kind is Int8 else kind()
