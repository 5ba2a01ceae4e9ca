"""Threads that share the work of one operator, and the memory in which they do it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from fluxonnx.openblas.arena import Arena

Item = TypeVar("Item")

# Elements of a piece of element-wise work: enough that Python's part is small, few enough that the piece stays in a
# core's cache while several functions pass over it.
PIECE = 1 << 16
# From here on an operation is divided among threads.
DIVIDED = 1 << 17


class Workers:
    """A number of threads, one of which is the caller's, their scratch memory, and the arena of results.

    numpy and BLAS hold no lock while they compute, so these threads really work side by side.
    """

    def __init__(self, threads: int) -> None:
        """Start `threads` - 1 threads."""
        self.threads = threads
        self.arena = Arena()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="openblas") if threads > 1 else None

    def each(self, function: Callable[[Item], Any], items: Iterable[Item]) -> None:
        """Call a function with each item, on all threads; an error of one call ends all others, and is raised."""
        queue = deque(items)

        def work() -> None:
            with np.errstate(all="ignore"):
                try:
                    while queue:
                        try:
                            item = queue.popleft()
                        except IndexError:  # another thread took the last one
                            return
                        function(item)
                except BaseException:
                    queue.clear()
                    raise

        helpers = min(self.threads, len(queue)) - 1
        futures = [self._pool.submit(work) for _ in range(helpers)] if self._pool else []
        try:
            work()
        finally:  # none may still write when the caller goes on, after Ctrl-C neither
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def scratch(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """Return memory of this thread, uninitialised; the next call with this name returns it again."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        held = getattr(self._local, name, None)
        if held is None or held.nbytes < size:
            held = np.empty(size, np.uint8)
            setattr(self._local, name, held)
        return held[:size].view(dtype).reshape(shape)

    def pieces(self, shape: Sequence[int], keep: int = 0, piece: int = PIECE) -> list[tuple[slice, ...]]:
        """Return indices that cut an array of `shape` into pieces, along its longest axis.

        Args:
            shape: The shape.
            keep: Axes at the end that are not cut.
            piece: About how many elements a piece should have.
        """
        axes = range(len(shape) - keep)
        size = int(np.prod(shape))
        if size < DIVIDED or not axes:
            return [(slice(None),) * len(shape)]
        axis = max(axes, key=lambda axis: shape[axis])
        step = max(1, shape[axis] * piece // size)
        whole = [slice(None)] * len(shape)
        return [
            (*whole[:axis], slice(start, min(start + step, shape[axis])), *whole[axis + 1 :])
            for start in range(0, shape[axis], step)
        ]

    def close(self) -> None:
        """End the threads and free the memory."""
        if self._pool is not None:
            self._pool.shutdown()
        self._local = threading.local()
        self.arena.clear()


def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Return the part of an operand that broadcasts to `index` of the result."""
    own = index[len(index) - array.ndim :] if array.ndim else ()
    return array[tuple(slice(None) if size == 1 else cut for size, cut in zip(array.shape, own, strict=True))]
