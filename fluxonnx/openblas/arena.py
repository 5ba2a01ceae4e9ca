"""Memory of results, used again as soon as no array lies in it any more."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# The operating system hands out large memory page by page and zeroed, which takes longer than to fill it.
SMALLEST = 1 << 16
# Idle memory that is kept.
MOST_IDLE = 256 << 20


class Arena:
    """Buffers of results. One is idle when the arena alone refers to it, which CPython's reference counts tell."""

    def __init__(self) -> None:
        """Start without buffers."""
        self._buffers: list[np.ndarray] = []
        # How many references `_counts` and `lies_alone` find where there are no others, by trying: interpreters differ.
        probe = np.empty(2, np.uint8)
        self._buffers.append(probe)
        view = probe[:2]
        del probe
        self._alone = self._references(view.base)
        del view
        self._idle = self._counts()[0]
        self._buffers.clear()

    def _counts(self) -> list[int]:
        """Return the number of references to each buffer."""
        return [sys.getrefcount(buffer) for buffer in self._buffers]

    def _references(self, base: Any) -> int | None:
        """Return the number of references to an object, None if it is no buffer of this arena."""
        for buffer in self._buffers:
            if buffer is base:
                return sys.getrefcount(buffer)
        return None

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Return an uninitialised array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < SMALLEST:
            return np.empty(shape, dtype)
        idle = [i for i, count in enumerate(self._counts()) if count <= self._idle]
        fitting = [i for i in idle if size <= self._buffers[i].nbytes <= 2 * size]
        if fitting:
            chosen = self._buffers[min(fitting, key=lambda i: self._buffers[i].nbytes)]
        else:
            self._drop(idle, sum(self._buffers[i].nbytes for i in idle) - MOST_IDLE)
            chosen = np.empty(size, np.uint8)
            self._buffers.append(chosen)
        return chosen[:size].view(dtype).reshape(shape)

    def _drop(self, idle: Sequence[int], size: int) -> None:
        """Free idle buffers of together at least `size` bytes, the oldest first."""
        dropped = set()
        for i in idle:
            if size <= 0:
                break
            size -= self._buffers[i].nbytes
            dropped.add(i)
        self._buffers = [buffer for i, buffer in enumerate(self._buffers) if i not in dropped]

    def lies_alone(self, array: np.ndarray) -> bool:
        """Whether an array fills a buffer in which no other array lies."""
        base = array.base
        if base is None or not array.flags.c_contiguous or 2 * array.nbytes < base.nbytes:
            return False
        del base
        return self._references(array.base) == self._alone

    def clear(self) -> None:
        """Forget all buffers; those in use are freed with the arrays in them."""
        self._buffers.clear()
