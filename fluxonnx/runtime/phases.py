"""The phase of a run that is under way, and the time of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """A stopwatch with named laps; time in an inner phase does not count for the outer one.

    Attributes:
        seconds: Of each phase, in the order in which they began.
        current: The innermost phase under way, or "".
    """

    def __init__(self, on_change: Callable[[str], None] | None = None) -> None:
        """Start without a phase; `on_change` is called with the name of each that begins or goes on."""
        self._on_change = on_change
        self.seconds: dict[str, float] = {}
        self.current = ""
        self._since = time.perf_counter()

    def _switch(self, name: str) -> str:
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] += now - self._since
        previous, self.current, self._since = self.current, name, now
        self.seconds.setdefault(name, 0.0)
        if self._on_change:
            self._on_change(name)
        return previous

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)
            self.seconds.pop("", None)
