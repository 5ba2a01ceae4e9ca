"""Pictures on a terminal: what is sent is the picture, in the right place, by each protocol."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

pyte = pytest.importorskip("pyte")
pytest.importorskip("textual_image")

from fluxonnx.errors import UsageError  # noqa: E402
from fluxonnx.terminal.detection import PROTOCOLS, Terminal, detect, known_by_name, understood  # noqa: E402
from fluxonnx.terminal.pictures import LINES_AROUND, Show, drawn, fit  # noqa: E402
from tests.terminal import decoding  # noqa: E402

CELL = (10, 20)
WINDOW = (60, 24)


@pytest.fixture(autouse=True)
def _truecolor(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


def gradient(width: int, height: int, blue: int = 0) -> Image.Image:
    """A picture whose pixels are all different, and change slowly."""
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, blue)], -1)
    return Image.fromarray(values.astype(np.uint8))


def on_screen(screen) -> np.ndarray:
    """The colours of the half blocks on a screen, two pixels a character: uint8 [2 * rows, columns, 3]."""
    rows = [i for i, line in enumerate(screen.display) if line.startswith("▀")]
    columns = len(screen.display[rows[0]].rstrip())
    found = np.zeros((2 * len(rows), columns, 3), np.uint8)
    for i, row in enumerate(rows):
        for column in range(columns):
            cell = screen.buffer[row][column]
            found[2 * i, column], found[2 * i + 1, column] = (list(bytes.fromhex(c)) for c in (cell.fg, cell.bg))
    return found


@dataclass
class Fake:
    """A step of a picture, of which only the preview is asked."""

    image: Image.Image

    def preview(self, method: str) -> Image.Image:
        return self.image


@dataclass
class Drawing:
    """What `Show` sends, and the screen that it makes; the stream's lines end as on a terminal."""

    protocol: str
    window: tuple[int, int] = WINDOW

    def __post_init__(self) -> None:
        self.screen = pyte.Screen(*self.window)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream = io.StringIO()
        self.show = Show(Terminal(self.protocol, CELL), self.stream, lambda: self.window)
        self._seen = 0

    @property
    def sent(self) -> str:
        return self.stream.getvalue()

    def update(self) -> None:
        # pyte does not know the strings of Kitty's protocol and of Sixel, and would print them.
        pyte.Stream(self.screen).feed(re.sub(r"\x1b[_P][^\x1b]*\x1b\\", "", self.sent[self._seen :]))
        self._seen = len(self.sent)


def test_half_blocks_have_the_colours_of_the_picture():
    drawing, image = Drawing("blocks"), gradient(200, 100)
    drawing.show.finish(image)
    drawing.update()
    columns, rows = fit(image.size, "blocks", CELL, WINDOW)
    np.testing.assert_array_equal(on_screen(drawing.screen), np.asarray(image.resize((columns, 2 * rows))))


@pytest.mark.parametrize("protocol", ["kitty", "iterm2"])
def test_protocols_that_send_the_file(protocol):
    drawing, image = Drawing(protocol), gradient(160, 120)
    drawing.show.finish(image)
    (found,) = getattr(decoding, protocol)(drawing.sent)
    expected = image if protocol == "iterm2" else image.resize((160, 120))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_sixel():
    drawing, image = Drawing("sixel"), gradient(160, 120)
    drawing.show.finish(image)
    (found,) = decoding.sixel(drawing.sent)
    assert found.size == image.size
    difference = np.asarray(found, np.int16) - np.asarray(image, np.int16)
    assert np.abs(difference).mean() < 12  # of 256 colours, in hundredths


def test_kitty_places_the_picture_in_the_text():
    drawing = Drawing("kitty")
    drawing.show.finish(gradient(160, 120))
    assert re.search(r"\x1b_Ga=p,i=\d+,c=16,r=6,U=1,q=2\x1b\\", drawing.sent)
    assert drawing.sent.count("\U0010eeee") == 16 * 6


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_step_takes_the_place_of_the_one_before(protocol):
    """What is written after the steps is below one picture, wherever on the screen that began."""
    for lines_before in (0, 20):
        drawing = Drawing(protocol)
        drawing.stream.write("line\n" * lines_before)
        final = gradient(160, 120, 200)
        for blue in (50, 100):
            drawing.show.step(Fake(gradient(80, 60, blue)))
        drawing.show.finish(final)
        drawing.stream.write("after")
        drawing.update()
        rows = fit(final.size, protocol, CELL, WINDOW)[1]
        last = min(lines_before + rows, WINDOW[1] - 1)
        assert drawing.screen.display[last].startswith("after")
        if protocol == "blocks":
            assert len(on_screen(drawing.screen)) == 2 * rows
            assert set(on_screen(drawing.screen)[..., 2].ravel()) == {200}


def test_kitty_forgets_the_previews():
    drawing = Drawing("kitty")
    drawing.show.step(Fake(gradient(80, 60)))
    drawing.show.finish(gradient(160, 120))
    sent = re.findall(r"a=p,i=(\d+)", drawing.sent)
    assert re.findall(r"a=d,d=I,i=(\d+)", drawing.sent) == sent[:1]


def test_a_window_of_another_size_gets_a_picture_below():
    drawing = Drawing("blocks")
    drawing.show.step(Fake(gradient(40, 20)))
    drawing.window = (50, 30)
    drawing.show.finish(gradient(80, 40))
    assert "A" not in re.findall(r"\x1b\[\d*([A-Z])", drawing.sent)


def test_the_next_picture_is_below_the_last():
    drawing = Drawing("blocks")
    for blue in (50, 100):
        drawing.show.step(Fake(gradient(20, 4, blue)))
        drawing.show.finish(gradient(40, 8, blue))
    drawing.update()
    assert {50, 100} == set(on_screen(drawing.screen)[..., 2].ravel())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(64, 4096), (4096, 64), (64, 64), (1, 1), (2048, 2048)])
@pytest.mark.parametrize("window", [(80, 24), (20, 5), (300, 100), (1, 1), (1000, 2000)])
def test_pictures_fit(protocol, size, window):
    columns, rows = fit(size, protocol, CELL, window)
    assert 1 <= columns <= max(1, window[0] - 1)
    assert 1 <= rows <= max(1, window[1] - LINES_AROUND)
    assert max(columns, rows) <= 255


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_terminal_is_not_asked_by_the_library(protocol, capfd):
    before = dict(os.environ)
    drawn(gradient(40, 40), protocol, 4, 2, CELL)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("answer", "protocol", "cell", "typed"),
    [
        ("\x1b[?62;4;22c", "sixel", (10, 20), ""),
        ("\x1b[?62;22c", "blocks", (10, 20), ""),
        ("\x1b[?1;2c", "blocks", (10, 20), ""),
        ("\x1b_Gi=31;OK\x1b\\\x1b[?62;c", "kitty", (10, 20), ""),
        ("\x1b_Gi=31;EINVAL:no\x1b\\\x1b[?62;c", "blocks", (10, 20), ""),
        ("\x1bP>|kitty(0.35.2)\x1b\\\x1b_Gi=31;OK\x1b\\\x1b[6;18;9t\x1b[?62;c", "kitty", (9, 18), ""),
        ("\x1bP>|iTerm2 3.5.0\x1b\\\x1b[6;34;16t\x1b[?62;4c", "iterm2", (16, 34), ""),
        ("\x1bP>|WezTerm 20240203\x1b\\\x1b_Gi=31;OK\x1b\\\x1b[?65;4;6c", "iterm2", (10, 20), ""),
        ("\x1bP>|Konsole 24.02\x1b\\\x1b_Gi=31;OK\x1b\\\x1b[?62;1;4c", "sixel", (10, 20), ""),
        ("\x1bP>|tmux 3.4\x1b\\\x1b[?1;2;4c", "sixel", (10, 20), ""),
        ("\x1b[6;0;0t\x1b[?1;2c", "blocks", (10, 20), ""),
        ("", "blocks", (10, 20), ""),
        ("a c\x1b[?62;22cat\x1b[A", "blocks", (10, 20), "a cat"),
        ("\x1b_Gi=31;O", "blocks", (10, 20), ""),
        ("\x1b[?6", "blocks", (10, 20), ""),
        ("é\r\x03", "blocks", (10, 20), "é"),
    ],
)
def test_answers_of_terminals(answer, protocol, cell, typed):
    assert understood(answer) == Terminal(protocol, cell, typed)


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "blocks"),
        ({"TERM": "linux"}, "blocks"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, None),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "screen", "TERM_PROGRAM": "WezTerm"}, None),
        ({}, None),
    ],
)
def test_names_in_the_environment(environ, protocol):
    assert known_by_name(environ) == protocol


@pytest.mark.parametrize(
    ("wanted", "pattern"), [("auto", "standard output is not one"), ("ascii", "unknown: choose one of auto, kitty")]
)
def test_bad_input(wanted, pattern):
    with pytest.raises(UsageError, match=pattern):
        detect(wanted)
