"""Channels between two layers, scaled so that neither the weights nor the activations have outliers there.

A channel may be divided by any number where it is made, and multiplied by it where it is read: the function is the
same. A norm's gain or the rows of a linear layer make channels, the columns of linear layers read them. Trained models
have channels that are a hundred times as large as the others, which leave few steps of 8 bits for these.

For integers on both sides the geometric middle is best: the factor sqrt(activation / weight) of SmoothQuant (Xiao et
al., 2022, alpha 0.5). If only weights are rounded to few bits, their columns are made equal: the factor 1 / weight.
Magnitudes of activations are estimated from weights (Nagel et al., Data-Free Quantization Through Weight Equalization
and Bias Correction, 2019): a gain of its normalised input, or the length of a row. Whatever somebody did to a channel
and its counterpart, the factor undoes it.

Factors are powers of two. All products with them are exact, and channels that are alike keep the weights they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from fluxonnx.checkpoint.safetensors import Scaling, Tensor
from fluxonnx.export.initializers import float_rows
from fluxonnx.machine import usable_cores

# dtypes that a power of two changes exactly.
SCALABLE = ("BF16", "F16", "F32")
# Rows or columns of a matrix by which the magnitudes of its columns or rows are measured, to within 6 %.
SAMPLES = 128
# Factors are 1, or at least 2 to the first and at most 2 to the second power. Smaller ones gain nothing, and int4
# weights get other scales by chance (tiny-klein's prompt_embeds: 11.6 % with factors of 2, 10.3 % without). Larger ones
# would come near the ends of bfloat16.
LEAST, MOST = 2, 20


@dataclass(frozen=True)
class Writer:
    """What makes channels.

    Attributes:
        weight: A gain [dim], or a linear layer's weight [out, in]; the channels are its entries, or its rows.
        start: The first of them.
        gain: The gain of the norm before the linear layer.
        gate: The first row of the same or another weight, whose outputs the channels are multiplied by.
        bias: The bias that is added.
    """

    weight: str
    start: int = 0
    gain: str | None = None
    gate: tuple[str, int] | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Reader:
    """What reads channels: the columns of a linear layer's weight [out, in] from `start` on.

    Each head of `head_dim` channels is read `repeat` times, as in grouped-query attention.
    """

    weight: str
    start: int = 0
    repeat: int = 1
    head_dim: int = 1


@dataclass(frozen=True)
class Coupling:
    """Channels that all `writers` make and all `readers` read.

    `size` returns the channels' magnitudes, float64 [count] in any unit, where these are better known than from the
    writers' rows; NaN for what can't be known.
    """

    count: int
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    size: Callable[[Mapping[str, Tensor]], np.ndarray] | None = None

    @property
    def names(self) -> list[str]:
        """The weights of both sides."""
        return [*(writer.weight for writer in self.writers), *(reader.weight for reader in self.readers)]


def balanced(
    tensors: Mapping[str, Tensor],
    couplings: Iterable[Coupling],
    rounds: Callable[[Tensor], bool],
    activations: bool,
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Scale tensors for rounding, so that the function stays the same.

    Args:
        tensors: The checkpoint's tensors by name.
        couplings: Which of them belong together.
        rounds: Whether a weight will be rounded; one that is integers already can't be scaled.
        activations: Whether activations are rounded to about as few bits as weights.

    Returns:
        The tensors, and the expected magnitudes of what the readers read then, float64 [in] in any unit, by the names
        of their weights.
    """
    useful = [item for item in couplings if _can_scale(tensors, item) and _any_rounded(tensors, item, rounds)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        measured = list(pool.map(lambda item: _factors(tensors, item, activations), useful))
    found = dict(tensors)
    inputs: dict[str, np.ndarray] = {}
    for coupling, (made, factor) in zip(useful, measured, strict=True):
        for reader in coupling.readers:
            columns = _repeated(made / factor, reader)
            read = inputs.setdefault(reader.weight, np.ones(tensors[reader.weight].shape[1]))
            read[reader.start : reader.start + len(columns)] = columns
        if (factor == 1).all():
            continue
        for writer in coupling.writers:
            for name in filter(None, (writer.weight, writer.bias)):
                found[name] = _scaled(found[name], writer.start, 1 / factor, rows=True)
        for reader in coupling.readers:
            found[reader.weight] = _scaled(found[reader.weight], reader.start, _repeated(factor, reader), rows=False)
    return found, inputs


def _any_rounded(tensors: Mapping[str, Tensor], coupling: Coupling, rounds: Callable[[Tensor], bool]) -> bool:
    return any(rounds(tensors[reader.weight]) for reader in coupling.readers)


def _can_scale(tensors: Mapping[str, Tensor], coupling: Coupling) -> bool:
    """Whether all tensors are floats of the right shapes; the builder says what is wrong with those that are not."""
    for writer in coupling.writers:
        tensor = tensors.get(writer.weight)
        if tensor is None or tensor.quantisation or not tensor.shape or tensor.shape[0] < writer.start + coupling.count:
            return False
        others = {writer.gain: tensor.shape[1:], writer.bias: tensor.shape[:1]}
        if any(name and (name not in tensors or tensors[name].shape != shape) for name, shape in others.items()):
            return False
        if writer.gate and not _can_read(tensors, writer.gate[0], writer.gate[1] + coupling.count, tensor.shape[-1]):
            return False
    for reader in coupling.readers:
        if not _can_read(tensors, reader.weight, None, reader.start + coupling.count * reader.repeat):
            return False
    names = {name for w in coupling.writers for name in (w.gain, w.bias) if name}
    return all(tensors[name].dtype in SCALABLE for name in (*coupling.names, *names))


def _can_read(tensors: Mapping[str, Tensor], name: str, rows: int | None, columns: int) -> bool:
    tensor = tensors.get(name)
    if tensor is None or tensor.quantisation or len(tensor.shape) != 2 or tensor.dtype not in SCALABLE:
        return False
    return tensor.shape[1] >= columns and (rows is None or tensor.shape[0] >= rows)


def _factors(tensors: Mapping[str, Tensor], coupling: Coupling, activations: bool) -> tuple[np.ndarray, np.ndarray]:
    """Measure channels.

    Returns:
        Their expected magnitudes, float64 [count], and what each is to be divided by where it is made: powers of two,
        float32 [count].
    """
    if coupling.size:
        made = _relative(coupling.size(tensors))
    else:
        made = np.max([_made_size(tensors, writer, coupling.count) for writer in coupling.writers], axis=0)
    read = np.max([_read_size(tensors, reader, coupling.count) for reader in coupling.readers], axis=0)
    with np.errstate(all="ignore"):
        factor = np.sqrt(made / read) if activations else 1 / read
    usable = np.isfinite(factor) & (factor > 0)
    if not usable.any():
        return made, np.ones(coupling.count, np.float32)
    factor = np.where(usable, factor / np.median(factor[usable]), 1)
    # the nearest power of two; a logarithm would depend on the processor
    mantissa, exponent = np.frexp(factor)
    exponent = np.clip(np.where(mantissa < np.sqrt(0.5), exponent - 1, exponent), -MOST, MOST)
    exponent[np.abs(exponent) < LEAST] = 0
    return made, np.ldexp(np.float32(1), exponent).astype(np.float32)


def _relative(sizes: np.ndarray) -> np.ndarray:
    """Divide by the median, so that several layers count alike."""
    positive = sizes[np.isfinite(sizes) & (sizes > 0)]
    return sizes / np.median(positive) if positive.size else sizes


def _made_size(tensors: Mapping[str, Tensor], writer: Writer, count: int) -> np.ndarray:
    """Return the expected magnitude of each channel, in units of their median: float64 [count]."""
    tensor = tensors[writer.weight]
    if len(tensor.shape) == 1:
        return _relative(np.abs(float_rows(tensor, writer.start, writer.start + count).astype(np.float64)))
    step = max(1, tensor.shape[1] // SAMPLES)
    gain = float_rows(tensors[writer.gain])[::step].astype(np.float64) if writer.gain else 1.0
    places = [(writer.weight, writer.start), *([writer.gate] if writer.gate else [])]
    sizes = np.ones(count)
    for name, start in places:
        rows = float_rows(tensors[name], start, start + count, column_step=step)
        sizes = sizes * np.sqrt(np.square(rows * gain).sum(1))
    return _relative(sizes)


def _read_size(tensors: Mapping[str, Tensor], reader: Reader, count: int) -> np.ndarray:
    """Return the root mean square of each channel's column, in units of their median: float64 [count].

    Rows count alike, since each is rounded by steps of its own: they are divided by their medians, which outliers of
    columns do not change.
    """
    tensor = tensors[reader.weight]
    step = max(1, tensor.shape[0] // SAMPLES)
    columns = slice(reader.start, reader.start + count * reader.repeat)
    rows = float_rows(tensor, row_step=step)[:, columns].astype(np.float64)
    medians = np.median(np.abs(rows), 1, keepdims=True)
    rows = rows / np.where(medians > 0, medians, np.inf)
    # added up row by row, in one order on all processors
    sizes = np.sqrt(np.square(rows).sum(0))
    return _relative(sizes.reshape(-1, reader.repeat, reader.head_dim).max(1).reshape(-1))


def _repeated(factor: np.ndarray, reader: Reader) -> np.ndarray:
    """Return the factors of the columns that read the channels."""
    return np.repeat(factor.reshape(-1, 1, reader.head_dim), reader.repeat, 1).reshape(-1)


def _scaled(tensor: Tensor, start: int, factor: np.ndarray, rows: bool) -> Tensor:
    scaling = tensor.scaling or Scaling()
    axis = 0 if rows else 1
    known = scaling.rows if rows else scaling.columns
    values = np.ones(tensor.shape[axis], np.float32) if known is None else known.copy()
    values[start : start + len(factor)] *= factor
    return replace(tensor, scaling=replace(scaling, **{"rows" if rows else "columns": values}))
