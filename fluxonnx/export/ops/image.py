"""Pictures and feature maps: convolutions, GroupNorm, patches."""

from __future__ import annotations

import numpy as np

from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.ops.norm import silu
from fluxonnx.export.primitives import add, mul, reshape, size_of, split


def conv(
    g: ModelBuilder,
    x: str,
    name: str,
    n_in: int,
    n_out: int,
    kernel: int = 3,
    stride: int = 1,
    scale: int | None = None,
) -> str:
    """Convolve [batch, n_in, height, width] with the checkpoint's `name`, which has a bias.

    Padded to keep the size; with stride 2 padded only right and below, as diffusers' Downsample2D does.

    Args:
        g: The graph.
        x: The picture.
        name: The layer.
        n_in: Channels of the picture.
        n_out: Channels of the result.
        kernel: Side of the kernel, odd.
        stride: 1 or 2.
        scale: See `norm_conv`.
    """
    with g.scope(name):
        weight, bias = g.tensor("weight", (n_out, n_in, kernel, kernel)), g.weight("bias", n_out)
        pad = kernel // 2
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
        pads = [0, 0, 1, 1] if stride == 2 else [pad] * 4
        return g.precision.conv(g, x, weight, bias, scale, pads=pads, **sizes)


def norm_conv(
    g: ModelBuilder,
    x: str,
    norm: str,
    name: str,
    n_in: int,
    n_out: int,
    groups: int,
    eps: float,
    scale: int | None = None,
) -> str:
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
    """
    hidden = silu(g, group_norm(g, x, norm, n_in, groups, eps))
    return conv(g, hidden, name, n_in, n_out, scale=scale)


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


def upsample_conv(g: ModelBuilder, x: str, name: str, channels: int) -> str:
    """Double height and width by repeating pixels, then convolve as `conv` does.

    At most 2x2 of the 3x3 pixels around an output pixel are different. So each of the four places that a pixel is
    repeated to has a 2x2 kernel of sums of weights: 4/9 of the work.
    """
    if not g.fused or not g.precision.sums_kernels:
        return conv(g, _upsample(g, x), name, channels, channels)
    with g.scope(name):
        # The bias comes before the kernel, as in `conv`: both flavours share a weight file in this order.
        bias = g.weight("bias", channels)
        kernels = _kernels_by_place(g, g.weight("weight", channels, channels, 3, 3))
        axis, row = g.constant([4], np.int64), g.constant([0, 0, 0, 1, -1], np.int64)
        rows = []
        for top in (0, 1):
            places = []
            for left in (0, 1):
                pads = [1 - top, 1 - left, top, left]
                place = g.op("Conv", x, kernels[2 * top + left], bias, kernel_shape=[2, 2], pads=pads)
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
