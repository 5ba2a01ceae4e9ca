"""Pictures and feature maps: convolutions, GroupNorm, patches; for pictures in bands see `bands.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.ops.bands import Picture, added, halves, normalised, pairs, with_rims
from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.ops.norm import silu
from fluxonnx.export.primitives import add, mul, reshape, size_of, split


def conv(
    g: ModelBuilder,
    x: Picture,
    name: str,
    n_in: int,
    n_out: int,
    kernel: int = 3,
    stride: int = 1,
    scale: int | None = None,
) -> Picture:
    """Convolve [batch, n_in, height, width] with the checkpoint's `name`, which has a bias.

    Padded to keep the size; with stride 2 padded only right and below, as diffusers' Downsample2D does. Then the result
    has half as many bands, if there are several.

    Args:
        g: The graph.
        x: The picture.
        name: The layer.
        n_in: Channels of the picture.
        n_out: Channels of the result.
        kernel: Side of the kernel, 1 or 3.
        stride: 1 or 2.
        scale: See `norm_conv`.
    """
    if len(x) > 1:
        convolved = _band_conv(g, name, n_in, n_out, kernel, stride, scale)
        return convolved(pairs(g, x) if stride == 2 else x, lambda band: band)
    with g.scope(name):
        weight, bias = g.tensor("weight", (n_out, n_in, kernel, kernel)), g.weight("bias", n_out)
        pad = kernel // 2
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
        pads = [0, 0, 1, 1] if stride == 2 else [pad] * 4
        return [g.precision.conv(g, x[0], weight, bias, scale, pads=pads, **sizes)]


def _band_conv(
    g: ModelBuilder, name: str, n_in: int, n_out: int, kernel: int, stride: int, scale: int | None
) -> Callable[[Picture, Callable[[str], str]], Picture]:
    """Take the weights of a convolution; return a function that convolves bands as `conv` does, once it changed them.

    A band is changed with its rims, right before it is convolved: then no two changed bands are in memory at once.
    """
    pad, before = kernel // 2, 0 if stride == 2 else kernel // 2
    sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
    with g.scope(name):
        weight, bias = g.tensor("weight", (n_out, n_in, kernel, kernel)), g.weight("bias", n_out)
        convolve = g.precision.band_conv(g, weight, bias, scale is not None)

    def convolved(x: Picture, change: Callable[[str], str]) -> Picture:
        found = []
        for band, above, below in with_rims(g, x, before, pad):
            changed = change(band)
            with g.scope(name):
                found.append(convolve(changed, pads=[above, before, below, pad], **sizes))
        return found

    return convolved


def norm_conv(
    g: ModelBuilder,
    x: Picture,
    norm: str,
    name: str,
    n_in: int,
    n_out: int,
    groups: int,
    eps: float,
    scale: int | None = None,
    plus: Picture | Callable[[], Picture] | None = None,
) -> Picture:
    """GroupNorm, SiLU and a 3x3 convolution: [batch, n_in, height, width] -> [batch, n_out, height, width].

    Args:
        g: The graph.
        x: The picture.
        norm: The norm's layer.
        name: The convolution's layer.
        n_in: Channels of the picture.
        n_out: Channels of the result.
        groups: Groups of channels that are normalised together.
        eps: Added to their variance.
        scale: Rows of the picture per row of latents, in a decoder. What comes out of a norm may be rounded to 8 bits
            there; encoders are more sensitive.
        plus: What is added to the result, or a function that makes it.
    """
    if len(x) > 1:
        # Weights are taken in the same order as for whole pictures: all flavours share a weight file in this order.
        with g.scope(norm):
            weights = g.weight("weight", n_in), g.weight("bias", n_in)
        convolved = _band_conv(g, name, n_in, n_out, 3, 1, scale)
        made = plus() if callable(plus) else None
        normal = normalised(g, x, norm, weights, groups, eps, after=made)
        hidden = convolved(x, lambda band: silu(g, normal(band)))
        plus = made or plus
    else:
        hidden = conv(g, [silu(g, group_norm(g, x[0], norm, n_in, groups, eps))], name, n_in, n_out, scale=scale)
    if plus is None:
        return hidden
    return added(g, plus() if callable(plus) else plus, hidden)


def group_norm(g: ModelBuilder, x: str, name: str, channels: int, groups: int, eps: float) -> str:
    """Normalise [batch, channels, height, width] over each group of channels, then scale and shift each channel."""
    if not g.fused:
        return _group_norm(g, x, name, channels, groups, eps)
    with g.scope(name):
        per_channel = g.constant([-1, 1, 1], np.int64)
        weight = g.op("Reshape", g.weight("weight", channels), per_channel)
        bias = g.op("Reshape", g.weight("bias", channels), per_channel)
        grouped = reshape(g, x, [0, groups, -1])
        normal = g.op(
            "InstanceNormalization", grouped, g.constant(np.ones(groups)), g.constant(np.zeros(groups)), epsilon=eps
        )
        whole = g.op("Reshape", normal, g.op("Shape", x), shape=g.shape(x))
        return add(g, mul(g, whole, weight), bias)


def _group_norm(g: ModelBuilder, x: str, name: str, channels: int, groups: int, eps: float) -> str:
    """Normalise as `group_norm` does, in plain operators.

    Means are taken over a row, then over the rows, then over the channels of a group. Some runtimes add up one number
    after the other: over all pixels at once, the decoder is off by 2.1 % at 1024x1024, so by 0.15 %.
    """
    size = channels // groups
    average = g.constant(np.kron(np.eye(groups), np.full((size, size), 1 / size))[:, :, None, None])

    def mean(x: str) -> str:
        """[batch, channels, height, width] -> [batch, channels, 1, 1], the same for all channels of a group."""
        return g.op("Conv", g.reduce("ReduceMean", g.reduce("ReduceMean", x, [3]), [2]), average)

    with g.scope(name):
        per_channel = g.constant([1, channels, 1, 1], np.int64)
        weight = g.op("Reshape", g.weight("weight", channels), per_channel)
        bias = g.op("Reshape", g.weight("bias", channels), per_channel)
        centred = g.op("Sub", x, mean(x))
        deviation = g.op("Sqrt", add(g, mean(mul(g, centred, centred)), g.constant(eps)))
        return add(g, mul(g, centred, g.op("Div", weight, deviation)), bias)


def upsample_conv(g: ModelBuilder, x: Picture, name: str, channels: int) -> Picture:
    """Double height and width by repeating pixels, then convolve as `conv` does; of one band come two.

    At most 2x2 of the 3x3 pixels around an output pixel are different. So each of the four places that a pixel is
    repeated to has a 2x2 kernel of sums of weights: 4/9 of the work.
    """
    if not g.fused or not g.precision.sums_kernels:
        return conv(g, [_upsample(g, x[0])], name, channels, channels)
    with g.scope(name):
        # The bias comes before the kernel, as in `conv`: both flavours share a weight file in this order.
        bias = g.weight("bias", channels)
        kernels = _kernels_by_place(g, g.weight("weight", channels, channels, 3, 3))
        if len(x) == 1:
            return [_doubled(g, x[0], [(x[0], 1, 0), (x[0], 0, 1)], kernels, bias)]
        found = []
        for upper, lower in zip(with_rims(g, x, 1, 0), with_rims(g, x, 0, 1), strict=True):
            found += halves(g, _doubled(g, upper[0], [upper, lower], kernels, bias))
        return found


def _doubled(g: GraphBuilder, x: str, inputs: Sequence[tuple[str, int, int]], kernels: Sequence[str], bias: str) -> str:
    """Convolve for the four places and interleave them.

    Args:
        g: The graph.
        x: A value as wide as the picture.
        inputs: What the upper pixels and the lower ones are made of, with rows of padding above and below.
        kernels: As `_kernels_by_place` returns them.
        bias: What is added.
    """
    axis, row = g.constant([4], np.int64), g.constant([0, 0, 0, 1, -1], np.int64)
    rows = []
    for top, (value, above, below) in enumerate(inputs):
        places = []
        for left in (0, 1):
            pads = [above, 1 - left, below, left]
            place = g.op("Conv", value, kernels[2 * top + left], bias, kernel_shape=[2, 2], pads=pads)
            places.append(g.op("Unsqueeze", place, axis))
        rows.append(g.op("Reshape", g.op("Concat", *places, axis=4), row))
    width = g.op("Mul", size_of(g, x, 3), g.constant([2], np.int64))
    shape = g.op("Concat", g.constant([0, 0, -1], np.int64), width, axis=0)
    return g.op("Reshape", g.op("Concat", *rows, axis=3), shape, shape=[*g.shape(x)[:2], None, None])


def _kernels_by_place(g: GraphBuilder, weight: str) -> list[str]:
    """Sum [out, in, 3, 3] to [out, in, 2, 2] for the pixels top left, top right, bottom left and bottom right.

    This is a product of constants: onnxruntime computes it once, when it opens the graph.
    """
    upper = np.array([[1, 0], [0, 1], [0, 1]])  # rows of the kernel -> the two rows that an upper pixel sees
    lower = np.array([[1, 0], [1, 0], [0, 1]])
    places = [np.kron(rows, columns) for rows in (upper, lower) for columns in (upper, lower)]
    flat = g.weight_op("Reshape", weight, g.constant([0, 0, 9], np.int64))
    sums = g.weight_op("MatMul", flat, g.constant(np.concatenate(places, axis=1)))
    parts = g.weight_op("Split", sums, g.constant([4] * 4, np.int64), axis=2, outputs=4)
    return [g.weight_op("Reshape", part, g.constant([0, 0, 2, 2], np.int64)) for part in parts]


def _upsample(g: GraphBuilder, x: str) -> str:
    """Double height and width by repeating pixels."""
    scales = g.constant([1, 1, 2, 2])
    return g.op(
        "Resize",
        x,
        "",
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def first_channels(g: GraphBuilder, x: str, count: int) -> str:
    """Return the first `count` channels of [batch, channels, height, width]."""
    bounds = [g.constant([n], np.int64) for n in (0, count, 1)]
    return g.op("Slice", x, *bounds)


def patchify(g: GraphBuilder, x: str, channels: int) -> str:
    """[batch, channels, 2 * h, 2 * w] -> [batch, 4 * channels, h, w] (_patchify_latents, pipeline_flux2_klein.py)."""
    if not g.fused:  # no arithmetic with sizes, and no six dimensions: each output channel picks one pixel of four
        pick = np.eye(4 * channels).reshape(4 * channels, channels, 2, 2)
        return g.op("Conv", x, g.constant(pick), kernel_shape=[2, 2], strides=[2, 2])
    # Sizes are computed as a vector because two dimensions are unknown at once.
    grid = g.op("Div", g.op("Shape", x, start=2), g.constant([2, 2], np.int64))
    height, width = split(g, grid, [1, 1], axis=0)
    two = g.constant([2], np.int64)
    head = g.op("Concat", size_of(g, x, 0), g.constant([channels], np.int64), height, two, width, two, axis=0)
    pixels = g.op("Reshape", x, head, shape=["batch", channels, None, 2, None, 2])
    moved = g.op("Transpose", pixels, perm=[0, 1, 3, 5, 2, 4])
    tail = g.op("Concat", size_of(g, x, 0), g.constant([4 * channels], np.int64), height, width, axis=0)
    return g.op("Reshape", moved, tail, shape=["batch", 4 * channels, None, None])


def unpatchify(g: GraphBuilder, x: str, channels: int) -> str:
    """[batch, 4 * channels, h, w] -> [batch, channels, 2 * h, 2 * w], the inverse of `patchify`."""
    if not g.fused:
        # Columns, then rows, in four dimensions: IREE computes DepthToSpace's mode CRD wrongly, and onnx2torch has no
        # other.
        columns = g.op("Transpose", reshape(g, x, [-1, 2, 0, 0]), perm=[0, 2, 3, 1])  # [.., h, w, 2]
        wide = g.op("Transpose", reshape(g, columns, [0, 0, 1, -1]), perm=[0, 2, 1, 3])  # [.., 1, h, 2 * w]
        rows = g.op("Transpose", reshape(g, wide, [-1, 2, 0, 0]), perm=[2, 1, 0, 3])  # [h, 2, .., 2 * w]
        # OpenCV joins one Reshape with another, and reads zeros wrongly then: so none follows another.
        high = g.op("Transpose", reshape(g, rows, [1, -1, 0, 0]), perm=[0, 2, 1, 3])  # [1, .., 2 * h, 2 * w]
        return reshape(g, high, [-1, channels, 0, 0])
    height, width = size_of(g, x, 2), size_of(g, x, 3)
    batch, two = size_of(g, x, 0), g.constant([2], np.int64)
    head = g.op("Concat", batch, g.constant([channels, 2, 2], np.int64), height, width, axis=0)
    patches = g.op("Reshape", x, head, shape=["batch", channels, 2, 2, None, None])
    moved = g.op("Transpose", patches, perm=[0, 1, 4, 2, 5, 3])
    doubled = g.op("Mul", g.op("Concat", height, width, axis=0), two)
    tail = g.op("Concat", batch, g.constant([channels], np.int64), doubled, axis=0)
    return g.op("Reshape", moved, tail, shape=["batch", channels, None, None])
