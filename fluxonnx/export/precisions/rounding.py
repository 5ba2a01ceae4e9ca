"""Rounding weights to few bits: integers and scales as pure functions of a tensor's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from fluxonnx.checkpoint.safetensors import ROWS, Tensor
from fluxonnx.errors import CheckpointError
from fluxonnx.export.initializers import float_columns, float_rows

# Rows of a matrix, and rows of activations, on which an error is measured.
ROW_SAMPLES, ACTIVATION_SAMPLES = 16, 8
# Values that are rounded at a time, and the fewest rows: their float32 copies stay in the cache.
BLOCK, FEWEST = 1 << 19, 32
# Bytes of a line of the processor's cache.
LINE = 64
# The scale of a row or block of zeros.
TINY = np.float32(1e-30)
# float16 ends at 65504; half of that leaves room for the rounding of weights, activations and sums.
HALF_SUM = 2.0**15


def int8_rows(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Quantise each row of a matrix to 8 bits with a step of its own: its largest value is 127 steps.

    Returns:
        int8 [out, in], -127 to 127, and the steps: float32 [out].
    """
    quantised = np.empty(tensor.shape, np.int8)
    scales = np.empty(tensor.shape[0], np.float32)
    for i in range(0, tensor.shape[0], ROWS):
        rows, scales[i : i + ROWS] = _rounded(float_rows(tensor, i, i + ROWS))
        quantised[i : i + ROWS] = rows
    return quantised, scales


def half(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Round to float16, divided by a power of two where the range of float16 is too small or too coarse.

    Trained weights need no division: the magnitudes of the weights of an output add up to some hundreds.

    Returns:
        float16 of the tensor's shape, where these magnitudes add up to `HALF_SUM` at most, and the divisor, float32 [].

    Raises:
        CheckpointError: The tensor holds infinities or NaNs.
    """
    starts = range(0, tensor.shape[0], ROWS)
    pieces = (np.abs(float_rows(tensor, i, i + ROWS)) for i in starts)
    largest = max(float(piece.sum(tuple(range(1, piece.ndim)), np.float64).max()) for piece in pieces)
    if not np.isfinite(largest):
        raise CheckpointError(f"{tensor.file}: {tensor.name} holds infinities or NaNs: download it again")
    scale = np.float32(1)
    if largest > 0 and not 1 <= largest <= HALF_SUM:
        scale = np.float32(2.0 ** max(math.ceil(math.log2(largest / HALF_SUM)), -126))
    rounded = np.empty(tensor.shape, np.float16)
    for i in starts:
        rounded[i : i + ROWS] = float_rows(tensor, i, i + ROWS) / scale
    return rounded, np.asarray(scale)


def hadamard(size: int) -> np.ndarray:
    """Return a symmetric orthogonal Hadamard matrix, float32 [size, size]; `size` is a power of four.

    It spreads an outlier over all channels, which makes the step of a row smaller (QuaRot, Ashkboos et al., 2024). All
    rows and columns have the same sum (a regular Hadamard matrix), so a mean does not collect in one channel (ConvRot,
    arXiv:2512.03673). ComfyUI's rotated checkpoints have the same signs (_build_hadamard,
    comfy_kitchen/tensor/int8_utils.py in Comfy-Org/comfy-kitchen).
    """
    signs = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, signs)
    return matrix / np.float32(np.sqrt(size))


def int8_panels(
    tensor: Tensor, widths: Sequence[int], limit: int | None, rotation: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise as `int8_rows` does, for MatMulInteger.

    Args:
        tensor: The matrix.
        widths: Outputs of each panel; together they are all outputs.
        limit: The largest magnitude that the weights of inputs 2 * i and 2 * i + 1 may add up to; None for no limit.
        rotation: Size of the `hadamard` matrix that groups of inputs are multiplied by first; 0 for none.

    Returns:
        The panels, one behind the other: int8 [in, width] each, in one array [out * in]; and the steps: float32 [out].
    """
    n_out, n_in = tensor.shape
    values = np.empty(n_out * n_in, np.int8)
    scales = np.empty(n_out, np.float32)
    matrix = hadamard(rotation) if rotation else None
    at_once = max(FEWEST, min(ROWS, BLOCK // n_in // FEWEST * FEWEST))
    halves = [np.empty((at_once, n), np.float32) for n in (n_in - n_in // 2, n_in // 2)]
    blocks = [_column_block(at_once, half.shape[1]) for half in halves]
    for start, end in pairwise([0, *accumulate(widths)]):
        panel = values[start * n_in : end * n_in].reshape(n_in, end - start)
        for i in range(start, end, at_once):
            stop = min(i + at_once, end)
            even, odd = (half[: stop - i] for half in halves)
            if matrix is None:
                float_columns(tensor, i, stop, even, odd)
            else:
                rows = rotated(float_rows(tensor, i, stop), matrix)
                even[:], odd[:] = rows[:, 0::2], rows[:, 1::2]
            scales[i:stop] = _round((even, odd), limit)
            for first, columns, block in zip((0, 1), (even, odd), blocks, strict=True):
                np.copyto(block[: stop - i], columns, casting="unsafe")
                panel[first::2, i - start : stop - start] = block[: stop - i].T
    return values, scales


def _column_block(rows: int, columns: int) -> np.ndarray:
    """Return int8 [rows, columns] whose columns are read fast.

    From row to row it has an odd number of cache lines: with others, the rows of a column would compete for a few
    places in the cache, and turning them into columns would take twice as long.
    """
    return np.empty((rows, (columns // LINE + 1 | 1) * LINE), np.int8)[:, :columns]


def rotated(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Multiply groups of inputs by a `hadamard` matrix, in small products: BLAS gives a large one to all its threads.

    They would wait for each other, as other tensors are encoded by other threads.
    """
    groups = rows.reshape(-1, len(matrix))
    if len(groups) % len(matrix) == 0:
        groups = groups.reshape(-1, *matrix.shape)
    return np.matmul(groups, matrix).reshape(rows.shape)


def int8_kernels(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Quantise the kernels [out, in, height, width] of a convolution: the largest weight of each is 127 steps.

    Returns:
        int8 [height * width * in, out], and the steps: float32 [out].
    """
    kernels = float_rows(tensor).transpose(0, 2, 3, 1)
    rows, scales = _rounded(kernels.reshape(len(kernels), -1))
    return np.ascontiguousarray(rows.astype(np.int8).T), scales


def given_columns(tensor: Tensor, unsigned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers and scales of a quantised tensor unchanged.

    Returns:
        [in, out], int8 or uint8 around 128; and the steps: float32 [out].
    """
    assert tensor.quantisation is not None
    columns = np.ascontiguousarray(tensor.array().T)
    if unsigned:
        # two's complement with the highest bit flipped
        columns = columns.view(np.uint8)
        columns ^= np.uint8(128)
    scale = tensor.quantisation.scale.array().astype(np.float32).reshape(-1)
    return columns, np.ascontiguousarray(np.broadcast_to(scale, tensor.shape[:1]))


def _rounded(rows: np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows by their steps and round them, in place; `limit` as for `int8_panels`. Returns also the steps."""
    return rows, _round([rows] if limit is None else [rows[:, 0::2], rows[:, 1::2]], limit)


def _round(parts: Sequence[np.ndarray], limit: int | None) -> np.ndarray:
    """Divide rows by their steps and round them, in place.

    Args:
        parts: The columns of the rows: all, or the even and the odd ones, which a limit needs.
        limit: As for `int8_panels`.

    Returns:
        The steps, float32 [rows].
    """
    scales = np.max([_largest(columns) for columns in parts], axis=0) / np.float32(127)
    if limit is not None:
        even, odd = parts
        # rounding can add a half to each of the two
        np.maximum(scales, _largest(even[:, : odd.shape[1]] + odd) / np.float32(limit - 1), out=scales)
    np.maximum(scales, TINY, out=scales)
    factors = (np.float32(1) / scales)[:, None]
    for columns in parts:
        columns *= factors
        np.rint(columns, out=columns)
    return scales


def _largest(rows: np.ndarray) -> np.ndarray:
    """Return the largest magnitude in each row."""
    return np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0))


def int8_error(tensor: Tensor, inputs: np.ndarray, levels: int, limit: int | None, rotation: int = 0) -> float:
    """Measure the relative L2 error of a product of rounded activations and rounded weights.

    Args:
        tensor: The matrix.
        inputs: The magnitudes of the activations, which are normal: [in].
        levels: Steps on each side of zero to which a row of activations is rounded.
        limit: As for `int8_panels`.
        rotation: Likewise.
    """
    rows, power = _sample(tensor), np.square(inputs, dtype=np.float64)
    if rotation:
        rows = rotated(rows, hadamard(rotation))
        power = power.reshape(-1, rotation).mean(1).repeat(rotation)
    integers, scales = _rounded(rows.copy(), limit)
    activations = np.random.RandomState(0).standard_normal((ACTIVATION_SAMPLES, len(power))) * np.sqrt(power)
    step = np.square(np.abs(activations).max(1) / levels).mean()
    # the error of rounding is spread evenly over a step
    missed = np.square(integers * scales[:, None] - rows) @ power + step / 12 * np.square(rows).sum(1)
    return _ratio(missed, np.square(rows) @ power)


def int4_error(tensor: Tensor, inputs: np.ndarray, block: int) -> float:
    """Measure the relative L2 error of a product with weights of 4 bits; arguments as for `int8_error`."""
    rows, power = _sample(tensor), np.square(inputs, dtype=np.float64)
    blocks = rows.reshape(len(rows), -1, block)
    steps, scales = _rounded_blocks(blocks)
    missed = np.square(steps * scales[..., None] - blocks).reshape(rows.shape) @ power
    return _ratio(missed, np.square(rows) @ power)


def _sample(tensor: Tensor) -> np.ndarray:
    return float_rows(tensor, row_step=max(1, tensor.shape[0] // ROW_SAMPLES))


def _ratio(missed: np.ndarray, power: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.sqrt(missed.sum() / power.sum()))


def int4_blocks(tensor: Tensor, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise each block of a row to 4 bits with a step of its own.

    The weight furthest from zero becomes -8, the end that reaches further (as in ggml's q4_0); the step is then the
    least-squares fit to the integers.

    Returns:
        int8 [out, in], -8 to 7, and the steps: float32 [out, in / block].
    """
    out, n_in = tensor.shape
    quantised = np.empty((out, n_in), np.int8)
    scales = np.empty((out, n_in // block), np.float32)
    for i in range(0, out, ROWS):
        steps, scales[i : i + ROWS] = _rounded_blocks(float_rows(tensor, i, i + ROWS).reshape(-1, n_in // block, block))
        quantised[i : i + ROWS] = steps.reshape(-1, n_in)
    return quantised, scales


def _rounded_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers of blocks [rows, blocks, block], as float32, and their steps [rows, blocks]."""
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    step = furthest / np.float32(-8)
    step[step == 0] = TINY
    steps = np.clip(np.rint(blocks / step), -8, 7)
    weight = np.maximum((steps * steps).sum(-1, keepdims=True), TINY)
    return steps, ((blocks * steps).sum(-1, keepdims=True) / weight)[..., 0]


def pack_int4(quantised: np.ndarray, offset: int) -> np.ndarray:
    """Put two integers in a byte, the first in the low half: uint8 [out, in / 2] of (values + offset) modulo 16."""
    nibbles = (quantised + np.int8(offset)).view(np.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
