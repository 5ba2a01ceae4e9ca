"""What a LoRA adds to a weight [out, in]: a matrix that is stored as a few small ones.

Each kind knows the rows that one of several fused layers has, and can be computed whole, for small models and tests.
Sources: LoRA (Hu et al., 2021); LoHa and LoKr (Yeh et al., 2023), `lycoris/modules` of KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Rows = Sequence[tuple[int, int]]


def rows_of(array: np.ndarray, rows: Rows) -> np.ndarray:
    """Return some ranges of rows, one after the other; a view where that is possible."""
    pieces = [array[start:end] for start, end in rows]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def part_of(rows: Rows, start: int, size: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the rows `start` to `start + size` of what the ranges `rows` are."""
    found, place = [], 0
    for first, end in rows:
        low, high = max(first, first + start - place), min(end, first + start + size - place)
        if low < high:
            found.append((low, high))
        place += end - first
    return tuple(found)


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down: up [out, rank], down [rank, in]."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    def of_rows(self, rows: Rows) -> LowRank:
        """Return what is added to some rows of the weight."""
        return replace(self, up=rows_of(self.up, rows))

    def whole(self) -> np.ndarray:
        """Return the matrix, float32 [out, in]."""
        return np.float32(self.scale) * (_float(self.up) @ _float(self.down))


@dataclass(frozen=True)
class Hadamard:
    """scale * (up @ down) * (other_up @ other_down), where the middle product is of elements (LoHa)."""

    down: np.ndarray
    up: np.ndarray
    other_down: np.ndarray
    other_up: np.ndarray
    scale: float

    def of_rows(self, rows: Rows) -> Hadamard:
        """Return what is added to some rows of the weight."""
        return replace(self, up=rows_of(self.up, rows), other_up=rows_of(self.other_up, rows))

    def whole(self) -> np.ndarray:
        """Return the matrix, float32 [out, in]."""
        first, second = _float(self.up) @ _float(self.down), _float(self.other_up) @ _float(self.other_down)
        return np.float32(self.scale) * first * second


@dataclass(frozen=True)
class Kronecker:
    """Rows of scale * kron(left, right): left [a, b], right [c, d], a * c outputs, b * d inputs (LoKr)."""

    left: np.ndarray
    right: np.ndarray
    scale: float
    rows: Rows

    def of_rows(self, rows: Rows) -> Kronecker:
        """Return what is added to some rows of the weight."""
        return replace(
            self, rows=tuple(piece for start, end in rows for piece in part_of(self.rows, start, end - start))
        )

    def whole(self) -> np.ndarray:
        """Return the matrix, float32 [out, in]."""
        return rows_of(np.float32(self.scale) * np.kron(_float(self.left), _float(self.right)), self.rows)


Delta = LowRank | Hadamard | Kronecker


@dataclass(frozen=True)
class Change:
    """What a LoRA does to a layer: weight + delta, and with a gain, gain * (weight + delta).

    Attributes:
        delta: What is added.
        gain: float32 [out, 1] or [1, in] (DoRA, Liu et al., 2024); None for none.
    """

    delta: Delta
    gain: np.ndarray | None = None


def _float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)
