"""The prompt and `generate --show` on a pseudo-terminal, as a person meets them."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pexpect")
pytest.importorskip("pyte")
pytest.importorskip("prompt_toolkit")
pytest.importorskip("textual_image")

from tests.support import Case
from tests.terminal import decoding
from tests.terminal.screen import Terminal, environment, fluxonnx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX"),
]

CASE = Case("odd-heads")
CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"
# What terminals answer to the questions of `detection`.
PLAIN, SIXEL = b"\x1b[?62;22c", b"\x1b[6;20;10t\x1b[?62;4;22c"


@pytest.fixture(scope="module")
def model(checkpoints) -> Path:
    return checkpoints.exported(CASE)


def asks(number: int):
    """Whether the last line of the screen is the prompt for a picture."""
    return lambda terminal: re.fullmatch(rf"\${number}\s*", terminal.text.splitlines()[-1] if terminal.text else "")


def test_a_session(model, tmp_path):
    """Everything that keys do, in one session, as starting it takes the most time."""
    terminal = Terminal(fluxonnx("repl", "-d", model), tmp_path, answers=PLAIN)
    assert "type what to draw" in terminal.wait(asks(1))

    terminal.type("!size 64x64")
    terminal.wait("size: 64x64")
    terminal.type("a red cat")
    text = terminal.wait(asks(2))
    assert re.search(r"Seed: \d+", text)
    assert "$1: out-0001.png 64x64" in text
    assert "▀▀▀" in text

    # Tab completes commands, values and files.
    terminal.child.send("!samp" + TAB)
    terminal.wait("!sampler")
    terminal.child.send(" heu" + TAB)
    terminal.wait("!sampler heun")
    terminal.type("")
    terminal.wait("sampler: heun")
    terminal.child.send("!input out-" + TAB)
    terminal.wait("!input out-0001.png")
    terminal.type("")
    terminal.wait("input: out-0001.png")
    terminal.type("!input none")
    terminal.wait(lambda t: t.text.endswith("input: default\n$2"))

    # The line before is a key away.
    terminal.child.send(UP)
    terminal.wait(lambda t: t.text.splitlines()[-1].startswith("$2 !input none"))

    # Ctrl-C clears the line.
    terminal.child.send(CTRL_C)
    terminal.wait(asks(2))

    # Ctrl-C stops a picture of a thousand steps, and the model is still there.
    terminal.type("!steps 1000")
    terminal.wait("steps: 1000")
    terminal.type("an endless cat")
    terminal.wait("/1000 [")
    terminal.child.send(CTRL_C)
    terminal.wait("Stopped.")
    terminal.type("!steps 1")
    terminal.type("$1 a quick cat")
    terminal.wait(asks(3))

    # A line that is wrong, a command that is unknown, and the end.
    terminal.type("!steps none at all")
    terminal.wait("fluxonnx: steps is 'none', expected an integer")
    terminal.child.send(CTRL_D)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-0001.png", "out-0002.png"]

    # The lines are kept, for their user alone, and the next session knows them.
    history = tmp_path / ".local/state/fluxonnx/history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    other = Terminal(fluxonnx("repl", "-d", model, "--show", "off"), tmp_path)
    other.wait(asks(1))
    other.child.send(UP)
    other.wait("$1 !steps none at all")
    other.child.send(CTRL_C)
    other.wait(asks(1))
    other.type("exit")
    assert other.end() == 0


def test_the_command_alone_is_the_prompt_and_a_signal_ends_it(model, tmp_path):
    terminal = Terminal(fluxonnx(), tmp_path, answers=b"a cat" + PLAIN, FLUXONNX_MODEL=str(model))
    terminal.wait("$1 a cat")  # typed while the terminal was asked what it is
    terminal.process.terminate()
    assert terminal.end() == 143
    assert "ended by SIGTERM" in terminal.text


@pytest.mark.parametrize(
    "words",
    [
        ["repl", "-d", "no/such/folder"],
        ["repl", "--show", "ascii"],
        ["repl", "-o", "a.txt/b.gif"],
        ["repl", "--threads", "x"],
    ],
)
def test_bad_input_ends_with_a_line(tmp_path, words):
    (tmp_path / "a.txt").touch()
    terminal = Terminal(fluxonnx(*words), tmp_path, answers=PLAIN)
    assert terminal.end() in (1, 2)
    assert "Traceback" not in terminal.text
    assert re.search(r"^fluxonnx( repl)?: ", terminal.text, re.MULTILINE)


@pytest.mark.parametrize("words", [["repl"], ["generate", "-p", "x", "--show"]])
def test_without_a_terminal(tmp_path, words):
    done = subprocess.run(
        fluxonnx(*words), cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"fluxonnx: .*terminal.*\n", done.stderr)


def test_generate_shows_the_steps_and_the_picture(model, tmp_path):
    """By each protocol, in one process; who asks for a picture gets its colours, also with NO_COLOR."""
    flags = ["-d", str(model), "-p", "a cat", "-W", "64", "-H", "96", "-s", "2"]
    program = (
        "from fluxonnx.cli import main\n"
        "for how in ('auto', 'kitty', 'iterm2', 'blocks'):\n"
        f"    assert main(['generate', *{flags}, '-o', f'{{how}}.png', '--show', how]) == 0"
    )
    terminal = Terminal([sys.executable, "-c", program], tmp_path, answers=SIXEL, NO_COLOR="1")
    assert terminal.end() == 0, terminal.text
    sent, start = terminal.sent.decode(), 0
    for name, decode in (("auto", "sixel"), ("kitty", "kitty"), ("iterm2", "iterm2")):
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        end = sent.index(f"{name}.png 64x96", start)
        pictures = getattr(decoding, decode)(sent[start:end])
        assert len(pictures) == 3, name  # two steps and the picture
        last = np.asarray(pictures[-1], np.int16)
        expected = np.asarray(picture.resize(pictures[-1].size), np.int16)
        assert np.abs(last - expected).mean() < (20 if decode == "sixel" else 1e-9)
        start = end
    picture = Image.open(tmp_path / "blocks.png").convert("RGB")
    screen = terminal.screen
    rows = [i for i, line in enumerate(screen.display) if line.startswith("▀")]
    columns = len(screen.display[rows[0]].rstrip())
    small = np.asarray(picture.resize((columns, 2 * len(rows))))
    for i, row in enumerate(rows):
        cells = [screen.buffer[row][column] for column in range(columns)]
        assert [cell.fg for cell in cells] == [bytes(pixel).hex() for pixel in small[2 * i]]
        assert [cell.bg for cell in cells] == [bytes(pixel).hex() for pixel in small[2 * i + 1]]
    assert screen.display[rows[-1] + 1].startswith("blocks.png 64x96")


def test_a_terminal_that_does_not_answer_is_not_waited_for(tmp_path):
    code = "from fluxonnx.terminal.detection import detect; print(detect())"
    terminal = Terminal([sys.executable, "-c", code], tmp_path)
    assert terminal.end() == 0
    assert "protocol='blocks'" in terminal.text


def test_a_process_in_the_background_is_not_stopped(tmp_path):
    program = """
import os
from fluxonnx.terminal.detection import detect
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    print(detect().protocol, flush=True)
    os._exit(0)
_, status = os.waitpid(child, os.WUNTRACED)
raise SystemExit(os.WIFSTOPPED(status))
"""
    terminal = Terminal([sys.executable, "-c", program], tmp_path, answers=SIXEL)
    assert terminal.end() == 0
    assert "blocks" in terminal.text


def test_keys_that_are_typed_meanwhile_are_kept(tmp_path):
    code = "from fluxonnx.terminal.detection import detect; print(detect())"
    terminal = Terminal([sys.executable, "-c", code], tmp_path, answers=b"a cat" + SIXEL)
    assert terminal.end() == 0
    assert "protocol='sixel', cell=(10, 20), typed='a cat'" in terminal.text.replace("\n", "")


@pytest.mark.parametrize("term", ["dumb", ""])
def test_poor_terminals(model, tmp_path, term):
    words = ["generate", "-d", model, "-p", "a cat", "-W", 64, "-H", 64, "-s", 1, "-o", "a.png", "--show"]
    terminal = Terminal(fluxonnx(*words), tmp_path, TERM=term)
    assert terminal.end() == 2
    assert "shows no pictures" in terminal.text
    assert not (tmp_path / "a.png").exists()


def test_a_session_in_a_dumb_terminal_of_twenty_columns(model, tmp_path):
    terminal = Terminal(fluxonnx("repl", "-d", model), tmp_path, lines=10, columns=20, TERM="dumb", NO_COLOR="1")
    terminal.wait(asks(1))
    terminal.type("!size 64x64")
    terminal.wait("size: 64x64")
    terminal.type("a cat")
    terminal.wait(asks(2))
    assert "▀" not in terminal.text
    terminal.type("exit")
    assert terminal.end() == 0
    assert (tmp_path / ".local/state/fluxonnx/history").is_file()
