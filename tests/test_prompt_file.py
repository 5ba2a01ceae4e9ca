"""Prompt files: which characters end a line, what is JSON, and what can't be read."""

from __future__ import annotations

import os

import pytest

from fluxonnx.cli.prompt_file import read_prompt_file
from fluxonnx.errors import UsageError


def read(tmp_path, content: bytes) -> list[str]:
    (tmp_path / "prompts.txt").write_bytes(content)
    return [line["prompt"] for line in read_prompt_file(tmp_path / "prompts.txt")]


def test_line_ends(tmp_path):
    assert read(tmp_path, b"a\nb\r\nc\rd\n\r\n  \n e") == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("letter", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
def test_other_characters_end_no_line(tmp_path, letter):
    prompt = f"a cat{letter}and a dog"
    assert read(tmp_path, prompt.encode()) == [prompt]


@pytest.mark.parametrize("prompt", ["{red|blue} circle", "{", "{a}", "{'prompt': 'x'}", "{ red }", "{1}", "[]"])
def test_braces_are_text(tmp_path, prompt):
    assert read(tmp_path, prompt.encode()) == [prompt]


@pytest.mark.parametrize("line", ['{"prompt": "x"}', '{ "prompt": "x"}', '{\t"prompt": "x"} '])
def test_objects(tmp_path, line):
    assert read(tmp_path, line.encode()) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{}", 'has no "prompt"'),
        (b'{"prompt": "x"', "line 1 is not valid JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", "integer of 5000 digits"),
        (b'{"prompt": 5}', "expected a string"),
        (b'{"prompt": "x", "nonsense": 5}', "unknown key"),
        (b"\xff", "not UTF-8 text"),
        (b"", "holds no prompt"),
    ],
)
def test_wrong_lines(tmp_path, line, message):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, line)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_folders(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        read_prompt_file(tmp_path / "pipe")
    with pytest.raises(UsageError, match="directory"):
        read_prompt_file(tmp_path)
    with pytest.raises(UsageError, match="no file can have such a name"):
        read_prompt_file(tmp_path / "\0")
