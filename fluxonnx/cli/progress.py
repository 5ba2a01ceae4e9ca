"""What a command tells while it runs: lines, and progress bars on a terminal, both on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fluxonnx.cli.messages import tell

if TYPE_CHECKING:
    import numpy as np

    from fluxonnx.runtime.events import Event


def speaker(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line, or nothing if `quiet`."""
    return (lambda text: None) if quiet else tell


def phase_line(name: str, seconds: float) -> str:
    """Return the line about a phase that --verbose prints."""
    return f"{name:<18}{seconds:8.2f} s"


class Progress:
    """Bars for the phases of a command, one at a time; silent where standard error is no terminal.

    tqdm is imported when there is something to draw.
    """

    def __init__(self, quiet: bool = False) -> None:
        """Draw nothing if `quiet` or if standard error is not a terminal."""
        self._shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None
        self._key: object = None

    def _draw(self, what: str, done: int, total: int, **format: Any) -> None:
        if not self._shown:
            return
        try:
            self._update(what, done, total, **format)
        except (OSError, ValueError):  # the terminal is gone: that ends the bar, not the run
            self._shown, self._bar = False, None

    def _update(self, what: str, done: int, total: int, **format: Any) -> None:
        if self._bar is None or self._key != (what, total):
            from tqdm import tqdm

            self.close()
            self._key = (what, total)
            self._bar = tqdm(total=total, initial=done, desc=what, leave=False, file=sys.stderr, **format)
        self._bar.update(done - self._bar.n)

    def phase(self, name: str) -> None:
        """Show what is under way, without a measure."""
        if name:
            self._draw(name, 0, 0, bar_format="{desc} ...")

    def event(self, event: Event) -> None:
        """Show the phase that begins; has the signature of `Flux.watch`."""
        from fluxonnx.runtime.events import PhaseBegan

        if isinstance(event, PhaseBegan):
            self.phase(event.name)

    def step(self, step: int, steps: int, sigma: float, latents: np.ndarray) -> None:
        """Show a denoising step; has the signature of the callback of `Flux.pictures`."""
        self._draw("denoise", step, steps, unit="step")

    def bytes(self, what: str, done: int, total: int) -> None:
        """Show what is being written and how much of it; has the signature of the exporter's `progress`."""
        if total:
            self._draw(what, done, total, unit="B", unit_scale=True)
        else:
            self.phase(f"export {what}")

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
