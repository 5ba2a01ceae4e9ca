"""Pictures on a terminal, and states of a picture that is being made, each in the place of the one before."""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.terminal import iterm2
from fluxonnx.terminal.detection import AUTO, Terminal, detect

if TYPE_CHECKING:  # a prompt is there before they are
    from PIL import Image

    from fluxonnx.runtime.denoise import Step

# The lines that a picture leaves to what is around it: what was typed, the seed, the file, the next prompt.
LINES_AROUND = 4
# `draw_preview` makes previews at most half as large as the picture.
PREVIEW_FACTOR = 2
# Kitty's protocol has letters for so many rows and columns.
MOST_CELLS = 255


class Show:
    """Shows pictures on a terminal.

    Attributes:
        clear: Called before each drawing: it wipes a progress bar, which is where the picture comes.
    """

    def __init__(
        self,
        terminal: Terminal,
        stream: TextIO,
        window: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
        method: str = "fast",
    ) -> None:
        """Show nothing yet.

        Args:
            terminal: What it understands; its protocol is not None.
            stream: The terminal.
            window: Returns its columns and lines.
            method: How previews are drawn, see `Step.preview`.
        """
        self.clear: Callable[[], None] = lambda: None
        self._terminal, self._stream, self._window, self._method = terminal, stream, window, method
        # The preview on the screen: the window's size when it was drawn, its rows and columns, what takes it away.
        self._last: tuple[tuple[int, int], tuple[int, int], str] | None = None

    def step(self, step: Step) -> None:
        """Show what a step expects the picture to be."""
        preview = step.preview(self._method)
        self._put(preview, tuple(side * PREVIEW_FACTOR for side in preview.size))  # type: ignore[arg-type]

    def finish(self, image: Image.Image) -> None:
        """Show a picture, in the place of the previews of its steps."""
        self._put(image, image.size)
        self._last = None

    def forget(self) -> None:
        """Leave what was shown where it is: the next picture is shown below."""
        self._last = None

    def _put(self, image: Image.Image, size: tuple[int, int]) -> None:
        window, protocol = self._window(), self._terminal.protocol or "blocks"
        columns, rows = fit(size, protocol, self._terminal.cell, window)
        before = self._above(window, (columns, rows))
        drawing, removal = drawn(image.convert("RGB"), protocol, columns, rows, self._terminal.cell)
        self.clear()
        try:
            self._stream.write(before + drawing)
            self._stream.flush()
        except (OSError, ValueError) as error:
            raise FluxonnxError(f"the picture can't be shown: the terminal is gone ({error})") from None
        self._last = (window, (columns, rows), removal)

    def _above(self, window: tuple[int, int], cells: tuple[int, int]) -> str:
        """Return what goes back to the start of the last preview; nothing if the window has changed since."""
        if self._last is None or self._last[0] != window:
            return ""
        _, last, removal = self._last
        wipe = "" if last == cells else "\x1b[J"
        return f"{removal}\r\x1b[{last[1]}A{wipe}"


def open_show(wanted: str = AUTO, method: str | None = None, terminal: Terminal | None = None) -> Show:
    """Find out what the terminal understands, and return what shows pictures on it.

    Args:
        wanted: "auto" or a protocol, see `detect`.
        method: How previews are drawn, see `Step.preview`.
        terminal: What is known of the terminal, if it was asked already.

    Raises:
        UsageError: Standard output is no terminal, or the terminal can't show pictures.
        FluxonnxError: The package that draws them is missing.
    """
    terminal = terminal or detect(wanted)
    if terminal.protocol is None:
        raise UsageError(f"--show: this terminal (TERM={os.environ.get('TERM', '')}) shows no pictures: leave it out")
    require()
    return Show(terminal, sys.stdout, method=method or "fast")


def require() -> None:
    """Check that the package is there that draws pictures.

    Raises:
        FluxonnxError: It is missing.
    """
    from importlib.util import find_spec

    if find_spec("textual_image") is None or find_spec("rich") is None:
        raise FluxonnxError('pictures on the terminal need textual-image: pip install "fluxonnx[terminal]"')


def fit(size: tuple[int, int], protocol: str, cell: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Return how many columns and rows a picture takes.

    It is shown in its size, but no larger than the window. Blocks are two pixels to a character, so they fill the
    window as far as the picture has that many.

    Args:
        size: Width and height of the picture in pixels.
        protocol: How it is shown.
        cell: Width and height of a character in pixels.
        window: Columns and lines of the window.
    """
    most_columns = max(1, min(window[0] - 1, MOST_CELLS))
    most_rows = max(1, min(window[1] - LINES_AROUND, MOST_CELLS))
    width, height = size[0] / cell[0], size[1] / cell[1]  # in characters
    scale = min(most_columns / width, most_rows / height)
    scale = min(scale, *((cell[0], cell[1] / 2) if protocol == "blocks" else (1,)))
    columns, rows = math.floor(width * scale + 1e-6), math.floor(height * scale + 1e-6)
    return min(max(columns, 1), most_columns), min(max(rows, 1), most_rows)


def drawn(image: Image.Image, protocol: str, columns: int, rows: int, cell: tuple[int, int]) -> tuple[str, str]:
    """Return what shows a picture, and what takes it out of the terminal's memory.

    The cursor has to be at the start of a line; afterwards it is at the start of the line below the picture.

    Args:
        image: RGB.
        protocol: One of `PROTOCOLS`.
        columns: The width in characters.
        rows: The height in characters.
        cell: Width and height of a character in pixels.
    """
    if protocol == "iterm2":
        # The lines are there before the picture is: at the end of the screen, they make it scroll.
        return "\n" * rows + f"\x1b7\x1b[{rows}A" + iterm2.sequence(image, columns, rows) + "\x1b8", ""
    screen = io.StringIO()
    with _library(screen, cell):
        from rich.console import Console
        from textual_image import renderable

        kinds: dict[str, Any] = {
            "kitty": renderable.TGPImage,
            "sixel": renderable.SixelImage,
            "blocks": renderable.HalfcellImage,
        }
        picture = kinds[protocol](image, columns, rows)
        Console(
            file=screen,
            force_terminal=True,
            # Kitty's protocol hides numbers in colours. Who asks for a picture wants its colours, also with NO_COLOR.
            color_system="auto" if protocol == "blocks" else "truecolor",
            no_color=False,
            width=columns + 1,
            height=rows + 1,
            legacy_windows=False,
        ).print(picture, end="")
    removal = ""
    if protocol == "kitty":
        # Not the library's `cleanup`, whose message names no picture by Kitty's documentation, but all of them.
        removal = f"\x1b_Ga=d,d=I,i={picture.terminal_image_id},q=2\x1b\\"
    return screen.getvalue(), removal


@contextmanager
def _library(screen: TextIO, cell: tuple[int, int]) -> Iterator[None]:
    """Have textual-image write into `screen`, which is no terminal to it, and know the size of a character.

    Otherwise it asks the terminal when it is imported. It waits a tenth of a second for each answer, which takes away
    keys that are typed meanwhile, and leaves answers that come later, over a network, as input of the next prompt.
    """
    before, environment = sys.__stdout__, dict(os.environ)
    setattr(sys, "__stdout__", screen)  # noqa: B010 - to mypy it is final
    os.environ.update(TEXTUAL_CELL_WIDTH=str(cell[0]), TEXTUAL_CELL_HEIGHT=str(cell[1]))
    try:
        yield
    finally:
        setattr(sys, "__stdout__", before)  # noqa: B010
        for name in ("TEXTUAL_CELL_WIDTH", "TEXTUAL_CELL_HEIGHT"):
            with suppress(KeyError):
                del os.environ[name]
            if name in environment:
                os.environ[name] = environment[name]
