"""What is imported when, and what is said of packages that are missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("pexpect")
pytest.importorskip("pyte")

from tests.terminal.screen import Terminal, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX"),
]

TERMINAL_PACKAGES = {"prompt_toolkit", "rich", "textual_image", "shtab"}


def test_nothing_of_the_terminal_is_imported_by_other_commands(tmp_path):
    code = (
        "import sys; from fluxonnx.cli import main; "
        "assert main(['generate', '-q', '-p', 'x', '-s', '1', '-W', '64', '-H', '64']) == 0; "
        f"assert not {TERMINAL_PACKAGES} & set(sys.modules); "
        "assert not [name for name in sys.modules if name.startswith('fluxonnx.terminal')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment(tmp_path))


def test_nothing_heavy_is_imported_before_the_prompt(tmp_path):
    """The prompt is there before numpy is; the rest is imported while a person types."""
    pytest.importorskip("prompt_toolkit")
    code = (
        "import sys; import fluxonnx.cli.repl, fluxonnx.terminal.prompt, fluxonnx.terminal.pictures, "
        "fluxonnx.terminal.studio; "
        "assert not {'numpy', 'PIL', 'onnx', 'onnxruntime', 'tokenizers', 'rich', 'shtab'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment(tmp_path))


@pytest.mark.parametrize(
    ("package", "words", "code", "pattern"),
    [
        ("prompt_toolkit", [], 2, "the prompt needs prompt_toolkit: pip install"),
        ("prompt_toolkit", ["repl"], 2, "the prompt needs prompt_toolkit: pip install"),
        ("shtab", ["completion", "bash"], 1, "completion needs shtab: pip install"),
        ("textual_image", ["generate", "-p", "x", "--show", "blocks"], 1, "need textual-image: pip install"),
    ],
)
def test_missing_packages(tmp_path, package, words, code, pattern):
    """One line with the command that helps, before anything is drawn."""
    program = f"import sys; sys.modules[{package!r}] = None; from fluxonnx.cli import main; sys.exit(main({words}))"
    terminal = Terminal([sys.executable, "-c", program], tmp_path, columns=200)
    assert terminal.end() == code
    assert terminal.text.startswith("fluxonnx: ")
    assert pattern in terminal.text
    assert 'fluxonnx[terminal]"' in terminal.text
    assert len(terminal.text.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))
