"""Any value of any flag: a command succeeds, or it fails with one line and an exit code; never with a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxonnx.cli import build_parser, main
from tests.support import Case
from tools import cli_docs

pytestmark = pytest.mark.slow

COMMANDS = cli_docs.commands(build_parser())
NASTY = {
    "empty": "",
    "blank": " ",
    "NUL": "a\0b",
    "a byte that is not UTF-8": "\udcff",
    "half a surrogate pair": "\ud800.png",
    "negative": "-1",
    "zero": "0",
    "infinite": "1e400",
    "not a number": "nan",
    "31 bits": str(2**31),
    "64 bits": str(2**64),
    "very negative": "-" + "9" * 30,
    "5,000 digits": "1" * 5000,
    "superscript digit": "²",
    "superscript size": "²x²",
    "Arabic digit": "٣",
    "deep brackets": "[" * 100_000,
    "deep groups": "(" * 20_000,
    "deep braces": "{" * 20_000,
    "broken pattern": "*(",
    "long name": "a" * 300 + ".png",
    "long path": "a/" * 3000 + "a.png",
    "control characters": "\x1b[31m\na\r\x9b.png",
    "formats": "%s%n{0}{name}{",
    "double dash": "--",
    "below a file": "/dev/null/a.png",
    "no such folder": "/proc/none/a.png",
}


def valued_flags(command: str) -> list[str]:
    """The long forms of the flags that take a value, and of arguments without a flag."""
    actions = [action for action in COMMANDS[command]._actions if action.nargs != 0]
    return [(action.option_strings or [""])[-1] for action in actions if not isinstance(action, argparse._HelpAction)]


CASES = [(command, flag) for command in COMMANDS for flag in valued_flags(command)]


@pytest.fixture
def base(checkpoints, tmp_path, monkeypatch) -> Callable[[str, str], list[str]]:
    """base(command, flag): the flags with which a command that does little would succeed, without `flag`."""
    monkeypatch.chdir(tmp_path)
    model = str(checkpoints.exported(Case("odd-heads")))
    Path("empty").mkdir()
    Path("prompts.txt").write_text("x")

    def base(command: str, flag: str) -> list[str]:
        # Almost any value of these is a good one. They are checked before the size, so that nothing is drawn.
        size = "70" if flag in ("--prompt", "--negative-prompt", "--cache-dir") else "64"
        known = {
            "generate": {"--dir": model, "--prompt": "x", "--width": size, "--height": "64", "--steps": "1"},
            # Pictures are made only where that depends on the flag.
            "batch": {
                "": "prompts.txt",
                "--output": "pictures",
                "--dir": model,
                **({"--width": "64", "--steps": "1"} if flag == "--output" else {"--precision": "none"}),
            },
            "export": {"--dir": model, "--output": "copy", "--component": "conditioning"},
            # What these would measure takes long, so that they get no model.
            "bench": {"--dir": "empty", "--precision": "none"},
            "check": {"--dir": "empty"},
            "compare": {"--dir": "empty", "--precision": "none"},
            "download": {"": "nobody"},
            "info": {},
            "inspect": {"": f"{model}/conditioning.onnx"},
            "serve": {"--dir": "empty", "--port": "0", "--data": "data"},
            "repl": {},
            "completion": {},
        }[command]
        if flag in ("--prompt-file", "--from"):
            known.pop("--prompt")
        return [word for name, value in known.items() if name != flag for word in (name, value) if word]

    return base


@pytest.mark.parametrize(("command", "flag"), CASES)
def test_no_value_of_a_flag_is_a_traceback(base, capsys, command, flag):
    for what, value in NASTY.items():
        words = [command, *base(command, flag), *([f"{flag}={value}"] if flag else ["--", value])]
        try:
            code = main(words)
        except SystemExit as error:  # of the parser
            code = int(str(error.code))
        printed = capsys.readouterr().err
        assert code in (0, 1, 2), what
        assert "Traceback" not in printed, what
        assert "internal error" not in printed, (what, printed)
        assert len(printed.strip().splitlines()[-1]) < 3000 if printed.strip() else code == 0, what
        assert not set(printed) & {"\x1b", "\x9b", "\r", "\0"}, what
        assert not list(Path().rglob(".fluxonnx-*")), what


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *((command, "-d") for command in ("generate", "export", "bench", "compare")),
        *(("export", flag) for flag in ("-o", "--transformer")),
        *(("generate", flag) for flag in ("--cache-dir", "--prompt-file", "--from")),
        *[("bench", "--json"), ("compare", "-o")],
    ],
)
def test_an_empty_name_is_not_this_folder(tmp_path, monkeypatch, capsys, command, flag):
    """The value of a variable that is not set: a copy of a model would be strewn over the folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([command, "-d", "model", flag, ""])
    assert caught.value.code == 2
    assert "the name is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
