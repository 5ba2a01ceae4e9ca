"""8-bit weights and activations (W8A8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export import panels, primitives
from fluxonnx.export.graph import MICROSOFT, GraphBuilder
from fluxonnx.export.initializers import Part
from fluxonnx.export.panels import Columns
from fluxonnx.export.precisions import rounding
from fluxonnx.export.precisions.quantised import Quantised
from fluxonnx.machine import has_exact_int8_dot

# Steps of an activation on each side of zero, where pairs of products must not overflow 16 bits. Fewer steps leave more
# room for weights, as 2 * 112 * 146 < 2**15; from 104 to 120 the error is the same.
SATURATING_LEVELS = 112


@dataclass(frozen=True)
class Tuning:
    """Sizes at which int8 is fast or exact; the defaults were measured on the 4B model.

    Attributes:
        rotation: Inputs that `rotate` mixes at a time, a power of four; as in most of ComfyUI's convrot checkpoints.
        narrowing_rotation: Likewise for linears with more inputs than outputs, always: enough to make the outputs of
            SwiGLU look normal, at a quarter of the work.
        panel_widths: Columns of a panel, best first.
        panels_at_once: Panels that go through a feed-forward together: enough for all threads, few enough to stay in
            the caches.
        conv_channels: Inputs of a convolution from which on integers pay (3x3 at the decoder's sizes, milliseconds in
            float32 and integers: 512 inputs 87 and 29, 256 inputs 87 and 41, 128 inputs 93 and 73).
    """

    rotation: int = 256
    narrowing_rotation: int = 64
    panel_widths: tuple[int, ...] = panels.PANEL_WIDTHS
    panels_at_once: int = 12
    conv_channels: int = 256


class Int8(Quantised):
    """8-bit weights with a scale per output channel, activations rounded to 8 bits with a scale per row.

    The product of the integers is exact. Activations are unsigned, which processors multiply fastest. Some processors
    add pairs of products in 16 bits, which saturate (`machine.has_exact_int8_dot`). They get fewer levels of
    activations, and weights of which no two neighbours add up to what could overflow: at most a sixth more rounding
    error, and a quarter faster than onnxruntime's kernel for unsigned weights, which would also be exact.

    On processors with exact dot products the decoder's convolutions behind a norm are integer products, too.

    Integers of the checkpoint are kept, rotated or not as they are there. Where pairs of products would overflow, they
    are stored as unsigned integers around 128, for the kernel for unsigned weights.
    """

    name = "int8"
    takes_integers = True
    most_error = 0.04

    def __init__(
        self, keep: str | None = None, rotate: bool = False, saturating: bool | None = None, tuning: Tuning = Tuning()
    ) -> None:
        """Choose the variant.

        Args:
            keep: The layers that are not quantised.
            rotate: Whether all weights and activations are multiplied by Hadamard matrices, which leaves the product
                unchanged but takes outliers out of both.
            saturating: Whether pairs of products must not overflow 16 bits; by default as this machine needs it.
            tuning: The sizes to choose by.

        Raises:
            UsageError: `keep` is not a regular expression.
        """
        super().__init__(keep)
        self.rotate, self.tuning = rotate, tuning
        self.saturating = not has_exact_int8_dot() if saturating is None else saturating
        self.levels = SATURATING_LEVELS if self.saturating else 127
        # what the weights of a pair of inputs may add up to
        self.limit = np.iinfo(np.int16).max // (2 * self.levels) if self.saturating else None

    def settings(self) -> dict[str, str]:
        """Return the layers that are kept, whether everything is rotated, and which products the integers are for."""
        products = "pairs" if self.saturating else "exact"
        return {**super().settings(), "rotate": str(self.rotate).lower(), "products": products}

    def rotation(self, tensor: Tensor) -> int:
        """Return how many inputs of a linear are mixed at a time, 0 for none.

        Linears with more inputs than outputs read products of activations, whose outliers cost most: some inputs are
        always mixed (measured at full width, random weights: 0.94 % error without, 0.66 % with these, 0.62 % with all).
        """
        if tensor.quantisation:
            return tensor.quantisation.rotation
        n_out, n_in = tensor.shape
        if self.rotate and n_in % self.tuning.rotation == 0:
            return self.tuning.rotation
        narrowing = self.tuning.narrowing_rotation
        return narrowing if n_in > n_out and n_in % narrowing == 0 else 0

    def error(self, tensor: Tensor, inputs: np.ndarray) -> float:
        """Return the error of a product, as `Quantised.error` does."""
        return rounding.int8_error(tensor, inputs, self.levels, self.limit, self.rotation(tensor))

    def slices(self, width: int) -> list[int]:
        """Return slices of at most `panels_at_once` panels, as equal as possible."""
        panel = panels.panel_width(width, 1, self.tuning.panel_widths)
        count = width // panel
        slices = -(-count // self.tuning.panels_at_once)
        return [(count // slices + (i < count % slices)) * panel for i in range(slices)]

    def linear(
        self,
        g: GraphBuilder,
        xs: Sequence[Columns],
        tensor: Tensor,
        bias: str | None,
        sizes: Sequence[int],
        unit: int | None,
    ) -> list[Columns]:
        """Multiply as `Precision.linear` does, in integers; a product and a weight per size.

        Rows are rounded once for all linears that share them.
        """
        if not self.quantises(tensor):
            return super().linear(g, xs, tensor, bias, sizes, unit)
        if not g.fused:
            return self._portable(g, xs, tensor, bias, sizes)
        levels, rotation = 127 if tensor.quantisation else self.levels, self.rotation(tensor)
        if rotation:
            xs = g.once(("rotated", rotation, tuple(xs)), lambda: _rotated(g, xs, rotation))
        rows, row_scale = g.once(("int8", levels, tuple(xs)), lambda: _rounded(g, xs, levels))

        counts = [1 if unit is None else n // panels.panel_width(n, unit, self.tuning.panel_widths) for n in sizes]
        unsigned = self._store(g, tensor, sizes, counts, rotation)
        suffixes = _suffixes(sizes)
        zero_points = [g.constant(levels, np.uint8), *([g.constant(128, np.uint8)] if unsigned else [])]
        biases = primitives.split(g, bias, sizes) if bias else [None] * len(sizes)
        products = []
        for suffix, size, count, added in zip(suffixes, sizes, counts, biases, strict=True):
            weight, scale = tensor.name + suffix, f"{tensor.name}{suffix}.scale"
            shape = [*([] if count == 1 else [count]), *g.shape(rows)[:-1], size // count]
            inputs = [rows, weight, g.constant(1.0), scale, *zero_points]
            product = g.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT, like=row_scale, shape=shape)
            product = g.op("Mul", product, row_scale)
            if added and count > 1:
                added = g.op("Reshape", added, g.constant([count, 1, size // count], np.int64))
            products.append(Columns(primitives.add(g, product, added) if added else product, size, count))
        return products

    def _portable(
        self, g: GraphBuilder, xs: Sequence[Columns], tensor: Tensor, bias: str | None, sizes: Sequence[int]
    ) -> list[Columns]:
        """Multiply as `linear` does, with signed integers around 0 and matrices of two dimensions.

        Other runtimes know no others, or turn a product with a zero point into three.
        """
        levels, rotation = 127 if tensor.quantisation else self.levels, self.rotation(tensor)
        x = panels.joined(g, xs)
        if rotation:
            x = g.once(("rotated", rotation, x), lambda: _rotated_groups(g, x, rotation))
        rows, row_scale = g.once(("int8", levels, x), lambda: _signed(g, x, levels))
        self._store(g, tensor, sizes, [1] * len(sizes), rotation)
        biases = primitives.split(g, bias, sizes) if bias else [None] * len(sizes)
        products = []
        for suffix, size, added in zip(_suffixes(sizes), sizes, biases, strict=True):
            weight, scale = tensor.name + suffix, f"{tensor.name}{suffix}.scale"
            product = g.op("Cast", g.op("MatMulInteger", rows, weight), to=TensorProto.FLOAT)
            product = g.op("Mul", g.op("Mul", product, row_scale), scale)
            products.append(Columns(primitives.add(g, product, added) if added else product, size))
        return products

    def _store(self, g: GraphBuilder, tensor: Tensor, sizes: Sequence[int], counts: list[int], rotation: int) -> bool:
        """Store a weight as matrices of these sizes, each in its count of panels; returns whether it is unsigned."""
        unsigned = tensor.quantisation is not None and self.saturating and g.fused
        n_in, parts = tensor.shape[1], []
        for suffix, size, count in zip(_suffixes(sizes), sizes, counts, strict=True):
            width = size // count
            parts += [
                Part(suffix, "U8" if unsigned else "I8", (n_in, size) if count == 1 else (count, n_in, width)),
                Part(f"{suffix}.scale", "F32", (size,) if count == 1 else (count, 1, width)),
            ]

        widths = [size // count for size, count in zip(sizes, counts, strict=True) for _ in range(count)]

        def encode(source: Tensor) -> list[np.ndarray]:
            if source.quantisation:
                columns, scales = rounding.given_columns(source, unsigned)
                panels = np.split(columns, np.cumsum(widths)[:-1], axis=1)
                values = np.concatenate([panel.reshape(-1) for panel in panels])
            else:
                values, scales = rounding.int8_panels(source, widths, self.limit, rotation)
            ends = np.cumsum(sizes)[:-1]
            pairs = zip(np.split(values, ends * n_in), np.split(scales, ends), strict=True)
            return [array for pair in pairs for array in pair]

        g.encoded(tensor, parts, encode)
        return unsigned

    def conv(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int | None, **attributes: Any) -> str:
        """Convolve as `Precision.conv` does, in integers where that is exact and pays.

        With fewer channels, gathering the neighbours of each pixel takes as long as the product saves.
        """
        if bands is None or not self._convolves(tensor):
            return super().conv(g, x, tensor, bias, bands, **attributes)
        return _conv(g, x, tensor, bias, bands, **attributes)

    def band_conv(self, g: GraphBuilder, tensor: Tensor, bias: str, rounded: bool) -> Callable[..., str]:
        """Convolve bands as `Precision.band_conv` does, in integers as `conv`; each band is rounded by itself."""
        if not rounded or not self._convolves(tensor):
            return super().band_conv(g, tensor, bias, rounded)
        used: list[str] = []
        _store_kernels(g, tensor)

        def convolve(x: str, pads: Sequence[int], **attributes: Any) -> str:
            padded, step, zero = _rounded_pixels(g, x, pads)
            used.extend(g.aliases(tensor.name, 1) if used else [tensor.name])
            product = _neighbourhood_product(g, padded, tensor, used[-1], step, zero, bias)
            shape = [
                primitives.size_of(g, x, 0),
                g.constant([-1], np.int64),
                primitives.size_of(g, x, 3),
                g.constant([tensor.shape[0]], np.int64),
            ]
            pixels = g.op(
                "Reshape", product, g.op("Concat", *shape, axis=0), shape=["batch", None, None, tensor.shape[0]]
            )
            return g.op("Transpose", pixels, perm=[0, 3, 1, 2])

        return convolve

    def _convolves(self, tensor: Tensor) -> bool:
        few = tensor.shape[1] < self.tuning.conv_channels
        return not (self.saturating or self.keeps(tensor) or few)


def _suffixes(sizes: Sequence[int]) -> list[str]:
    return [""] if len(sizes) == 1 else [f".{i}" for i in range(len(sizes))]


def _conv(g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int, **attributes: Any) -> str:
    """Convolve without stride, as a product with the neighbourhoods of all pixels, one band of rows after the other.

    onnxruntime's own integer convolutions want to know the range of the result, or are slow with signed weights. Other
    runtimes get a Conv of the dequantised weights.
    """
    n_out, n_in, height, width = tensor.shape
    _store_kernels(g, tensor)
    weight, scale = tensor.name, tensor.name + ".scale"
    if not g.fused:
        floats = g.op("Mul", g.op("Cast", weight, to=TensorProto.FLOAT), scale)
        kernels = g.op("Reshape", floats, g.constant([height, width, n_in, n_out], np.int64))
        return g.op("Conv", x, g.op("Transpose", kernels, perm=[3, 2, 0, 1]), bias, **attributes)

    padded, step, zero = _rounded_pixels(g, x, attributes["pads"])
    top, _, bottom, _ = attributes["pads"]
    band_height = g.op("Div", primitives.size_of(g, x, 2), g.constant([bands], np.int64))
    sizes = [
        primitives.size_of(g, x, 0),
        band_height,
        primitives.size_of(g, x, 3),
        g.constant([n_out], np.int64),
    ]
    band_shape = g.op("Concat", *sizes, axis=0)
    starts = [g.op("Mul", band_height, g.constant([i], np.int64)) for i in range(bands + 1)]
    rim = g.constant([top + bottom], np.int64)
    products = []
    weights = [weight, *g.aliases(weight, bands - 1)]
    for (start, end), alias in zip(pairwise(starts), weights, strict=True):
        band = primitives.rows_from(g, padded, start, g.op("Add", end, rim), "band")
        product = _neighbourhood_product(g, band, tensor, alias, step, zero, bias)
        products.append(g.op("Reshape", product, band_shape, shape=["batch", None, None, n_out]))
    pixels = g.op("Concat", *products, axis=1)
    return g.op("Transpose", pixels, perm=[0, 3, 1, 2])


def _store_kernels(g: GraphBuilder, tensor: Tensor) -> None:
    n_out, n_in, height, width = tensor.shape
    parts = [Part("", "I8", (height * width * n_in, n_out)), Part(".scale", "F32", (n_out,))]
    g.encoded(tensor, parts, rounding.int8_kernels)


def _rounded_pixels(g: GraphBuilder, x: str, pads: Sequence[int]) -> tuple[str, str, str]:
    """Round [batch, channels, height, width] to uint8 [batch, rows, columns, channels], padded; with step and zero."""
    rounded, step, zero = g.op("DynamicQuantizeLinear", x, outputs=3)
    top, left, bottom, right = pads
    widths = g.constant([0, top, left, 0, 0, bottom, right, 0], np.int64)
    return g.op("Pad", g.op("Transpose", rounded, perm=[0, 2, 3, 1]), widths, zero), step, zero


def _neighbourhood_product(
    g: GraphBuilder, x: str, tensor: Tensor, weight: str, step: str, zero: str, bias: str
) -> str:
    """Multiply the neighbourhoods of pixels by `weight`, the kernels of `tensor` under some name: [pixels, n_out]."""
    n_out, _, height, width = tensor.shape
    inputs = [_neighbourhoods(g, x, height, width), weight, step, tensor.name + ".scale", zero, "", bias]
    return g.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT, like=step, shape=[None, n_out])


def _neighbourhoods(g: GraphBuilder, x: str, height: int, width: int) -> str:
    """Lay the `height` x `width` pixels around each pixel of `x` [batch, rows, columns, channels] side by side.

    Returns:
        [batch * rows * columns, height * width * channels]; pixels at the rim have no neighbourhood of their own.
    """
    last, axes = np.iinfo(np.int64).max, g.constant([1, 2], np.int64)
    shifted = []
    for dy, dx in np.ndindex(height, width):
        starts = g.constant([dy, dx], np.int64)
        ends = g.constant([dy - height + 1 or last, dx - width + 1 or last], np.int64)
        shifted.append(g.op("Slice", x, starts, ends, axes))
    columns = height * width * g.width(x)
    return primitives.reshape(g, g.op("Concat", *shifted, axis=-1), [-1, columns])


def _rotated(g: GraphBuilder, xs: Sequence[Columns], group: int) -> list[Columns]:
    """Multiply matrices that side by side are [rows, in] by a Hadamard matrix, `group` columns at a time."""
    if any(g.width(x.value) % group for x in xs):  # a group lies across two matrices or panels
        xs = [Columns(panels.joined(g, xs), sum(x.width for x in xs))]
    matrix = g.constant(rounding.hadamard(group))
    rotated = []
    for x in xs:
        groups = g.op("Reshape", x.value, g.constant([-1, group], np.int64))
        shape = g.shape(x.value)
        back = g.constant([*shape[:-2], -1, shape[-1]], np.int64)
        rotated.append(replace(x, value=g.op("Reshape", g.op("MatMul", groups, matrix), back, shape=shape)))
    return rotated


def _rounded(g: GraphBuilder, xs: Sequence[Columns], levels: int) -> tuple[str, str]:
    """Round rows to uint8 around `levels`; the largest magnitude of a row becomes `levels` steps.

    Returns:
        uint8 [rows, in] from 0 to 2 * levels, and the steps, float32 [rows, 1].
    """
    largest = [g.reduce("ReduceMax", g.op("Abs", x.value), [1] if x.panels == 1 else [0, 2]) for x in xs]
    whole = largest[0] if len(xs) == 1 else g.op("Max", *largest)
    if len(g.shape(whole)) == 3:
        whole = g.op("Reshape", whole, g.constant([-1, 1], np.int64))
    scale = g.op("Max", g.op("Mul", whole, g.constant(1 / levels)), g.constant(float(rounding.TINY)))
    per_row = g.op("Squeeze", scale, g.constant([-1], np.int64))
    middle = g.op("Expand", g.constant(levels, np.uint8), g.op("Shape", per_row), shape=g.shape(per_row))
    rows = [g.op("QuantizeLinear", x.value, per_row, middle, axis=len(g.shape(x.value)) - 2) for x in xs]
    return panels.joined(g, [replace(x, value=row) for x, row in zip(xs, rows, strict=True)]), scale


def _rotated_groups(g: GraphBuilder, x: str, group: int) -> str:
    """Multiply [..., in] by a Hadamard matrix, `group` columns at a time, in plain operators."""
    width, sequence = g.width(x), len(g.shape(x)) == 3
    groups = primitives.reshape(g, x, [0, -1, width // group, group] if sequence else [-1, width // group, group])
    rotated = g.op("MatMul", groups, g.constant(rounding.hadamard(group)))
    return primitives.reshape(g, rotated, [0, -1, width] if sequence else [-1, width])


def _signed(g: GraphBuilder, x: str, levels: int) -> tuple[str, str]:
    """Round rows of [..., in] to int8 around 0; the largest magnitude of a row becomes `levels` steps.

    OpenVINO has no QuantizeLinear with a scale per row.

    Returns:
        int8 [..., in] from -levels to levels, and the steps, float32 [..., 1].
    """
    largest = g.reduce("ReduceMax", g.op("Abs", x), [-1])
    scale = g.op("Max", g.op("Mul", largest, g.constant(1 / levels)), g.constant(float(rounding.TINY)))
    return g.op("Cast", g.op("Round", g.op("Div", x, scale)), to=TensorProto.INT8), scale
