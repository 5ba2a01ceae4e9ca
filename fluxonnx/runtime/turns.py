"""Threads that share a model take turns."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")


def in_turns(lock: AbstractContextManager[Any], items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Hold a lock while the next item is made, but not while the caller uses it.

    A lock that was held in between would stay locked for as long as somebody keeps an unfinished loop, and only the
    thread that began it could end it.
    """
    try:
        while True:
            with lock:
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        with lock:
            items.close()
