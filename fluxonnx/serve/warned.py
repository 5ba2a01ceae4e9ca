"""Where the warnings of the library go: to the job that is drawn, or nowhere, by the thread in which they arise.

`warnings.catch_warnings` changes the whole process, and two threads that use it at once leave it changed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def silently() -> Iterator[None]:
    """Drop the warnings of this thread: what is only checked is warned of when it is drawn."""
    before = getattr(_thread, "silent", False)
    _thread.silent = True
    try:
        yield
    finally:
        _thread.silent = before


def route_warnings(
    is_worker: Callable[[], bool], to_job: Callable[[str], None], otherwise: Callable[[str], None]
) -> None:
    """Send warnings that arise while a job is drawn to that job, and others elsewhere.

    Args:
        is_worker: Whether the calling thread draws.
        to_job: Told of warnings of that thread.
        otherwise: Told of those of others.
    """
    warnings.simplefilter("always", UserWarning)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if is_worker():
            to_job(str(message))
        elif not getattr(_thread, "silent", False):
            otherwise(str(message))

    warnings.showwarning = show
