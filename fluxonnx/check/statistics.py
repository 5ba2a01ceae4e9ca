"""Statistics of a tensor, of which only a chunk is in memory at a time: all of it, or rows that are spread over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fluxonnx.checkpoint.safetensors import DTYPES, Tensor

# Values that are converted to float32 at a time.
CHUNK = 1 << 21
# Of a larger tensor a sample is read: about so many values, in whole rows.
SAMPLE = 1 << 18
# Rows of a sample at least, so that columns can be compared; and at most, since rows lie apart and each costs a read.
FEWEST_ROWS, MOST_ROWS = 16, 96
# A matrix of at least this many rows and columns tells whether its values were drawn independently.
SMALLEST = 16
# Values whose sizes are sorted, for a quantile.
SORTED = 1 << 16


@dataclass(frozen=True)
class Statistics:
    """What was measured of a tensor, taken as rows [out, in].

    Attributes:
        values: Values of the tensor.
        read: Values that were read.
        not_finite: NaNs and infinities among them; they are left out of all that follows.
        std: Standard deviation.
        kurtosis: Fourth moment over the square of the second: 3 for normal, 1.8 for uniform random numbers.
        largest: The largest absolute value.
        usual: The absolute value that a hundredth of the values exceed.
        zero_rows: Rows that hold only zeros.
        constant: Whether all values are the same.
        spread: How much the mean squares of rows or of columns (the larger of both) differ, over how much they would
            if all values were drawn independently: 1 for random numbers of any distribution; 0 for a tensor with too
            few rows or columns to tell.
    """

    values: int
    read: int
    not_finite: int
    std: float
    kurtosis: float
    largest: float
    usual: float
    zero_rows: int
    constant: bool
    spread: float


def measure(tensor: Tensor, whole: bool = False) -> Statistics | None:
    """Measure a tensor; None for one that holds no weights (integers that are not quantised), or nothing.

    Args:
        tensor: A tensor of floats, or of integers with a scale.
        whole: Read all of it, however large it is.

    Raises:
        CheckpointError: It has an unknown dtype.
        OSError: The file can't be read.
    """
    if not math.prod(tensor.shape) or (tensor.dtype in DTYPES and not _holds_weights(tensor)):
        return None
    array = tensor.array()
    rows = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
    chosen = np.arange(len(rows)) if whole or rows.size <= SAMPLE else _sample(*rows.shape)
    scale = _scale(tensor)
    return _of_chunks(_chunks(rows, chosen, scale), rows.size, len(chosen), rows.shape[1])


def _holds_weights(tensor: Tensor) -> bool:
    return tensor.quantisation is not None or DTYPES[tensor.dtype].kind not in "iub"


def _sample(rows: int, columns: int) -> np.ndarray:
    """Return the indices of rows that are spread evenly, the first and the last included."""
    count = min(rows, MOST_ROWS, max(FEWEST_ROWS, SAMPLE // columns))
    return np.unique(np.linspace(0, rows - 1, count).round().astype(np.int64))


def _scale(tensor: Tensor) -> np.ndarray | None:
    if tensor.quantisation is None:
        return None
    return tensor.quantisation.scale.array().astype(np.float32).reshape(-1, 1)


def _chunks(rows: np.ndarray, chosen: np.ndarray, scale: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield blocks of the chosen rows, as float32 [some, columns]; a block of a very long row is a part of it."""
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(chosen), step):
        block = chosen[start : start + step]
        values = rows[block[0] : block[-1] + 1] if len(block) == block[-1] - block[0] + 1 else rows[block]
        # NaNs are looked for, so they are not worth a warning
        with np.errstate(invalid="ignore", over="ignore"):
            found = values.astype(np.float32)
            yield found if scale is None else found * (scale[block] if len(scale) > 1 else scale)


def _of_chunks(chunks: Iterator[np.ndarray], values: int, rows: int, columns: int) -> Statistics:
    read = not_finite = zero_rows = 0
    total = squares = fourths = 0.0
    low, high, usual = math.inf, -math.inf, 0.0
    by_row: list[np.ndarray] = []
    by_column = np.zeros(columns)
    for chunk in chunks:
        read += chunk.size
        finite = np.isfinite(chunk)
        if not finite.all():
            not_finite += chunk.size - int(finite.sum())
            chunk = np.where(finite, chunk, np.float32(0))
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
        total += float(chunk.sum(dtype=np.float64))
        # float64 only here: the squares of damaged values overflow float32, and copies of all values would take time
        peak = max(abs(low), abs(high))
        square = np.square(chunk, dtype=np.float64 if peak > 1e9 else np.float32)
        row = square.sum(1, dtype=np.float64)
        by_row.append(row)
        by_column += square.sum(0, dtype=np.float64)
        zero_rows += int((row == 0).sum())
        squares += float(row.sum())
        fourths += float(np.vdot(square, square))
        size = np.abs(chunk.ravel()[:: max(1, chunk.size // SORTED)])
        place = (len(size) - 1) * 99 // 100
        usual = max(usual, float(np.partition(size, place)[place]))
    count = max(1, read - not_finite)
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    # of values around zero, which weights of products are; gains are not asked for it
    kurtosis = fourths / count / (squares / count) ** 2 if squares else 0.0
    spread = 0.0
    if min(rows, columns) >= SMALLEST:
        spread = max(_spread(np.concatenate(by_row), columns, kurtosis), _spread(by_column, rows, kurtosis))
    largest = max(abs(low), abs(high))
    return Statistics(
        values, read, not_finite, math.sqrt(variance), kurtosis, largest, usual, zero_rows, low == high, spread
    )


def _spread(sums: np.ndarray, summed: int, kurtosis: float) -> float:
    """Return the relative deviation of sums of squares over that of sums of independent values."""
    mean = float(sums.mean())
    expected = math.sqrt(max(kurtosis - 1, 1e-6) / summed)
    return float(sums.std()) / mean / expected if mean > 0 and len(sums) > 1 else 0.0
