"""Prompt files: which characters end a line, what is JSON, and what can't be read."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest

from fluxonnx.errors import UsageError
from fluxonnx.runtime.prompt_file import read_prompt_file


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


# Tables


def rows(tmp_path, text: str) -> list[dict]:
    (tmp_path / "prompts.CSV").write_bytes(text.encode())
    return read_prompt_file(tmp_path / "prompts.CSV")


def test_a_table(tmp_path):
    found = rows(
        tmp_path,
        "\ufeffprompt,seed,strength,input,reference,mask,expand,keep_unmasked,negative_prompt,output,\r\n"
        '"a red circle, large",7,0.5,a.png,"b, c.png;d.png",m.png,,no,blue,x.png,note\r\n'
        ",,,,,,,,,\r\n"
        'two\u2028lines,,,a.png,,,"16,0,0,0",,\r\n',
    )
    assert found == [
        {
            "prompt": "a red circle, large",
            "seed": 7,
            "strength": 0.5,
            "input": ["a.png"],
            "reference": ["b, c.png", "d.png"],
            "mask": "m.png",
            "keep_unmasked": False,
            "negative_prompt": "blue",
            "output": "x.png",
        },
        {"prompt": "two\u2028lines", "input": ["a.png"], "expand": [16, 0, 0, 0]},
    ]


def test_braces_in_a_table_are_text(tmp_path):
    assert rows(tmp_path, 'prompt\n{red|blue}\n"{""prompt"": 1}"\n') == [
        {"prompt": "{red|blue}"},
        {"prompt": '{"prompt": 1}'},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("prompt\n", "holds no prompt"),
        ("a cat\na dog\n", 'line 1 has an unknown column "a cat": known are prompt'),
        ("seed\n5\n", 'line 1 has no column "prompt"'),
        ("prompt,prompt\na,b\n", "line 1 names a column twice"),
        ("prompt,seed\na,x\n", "line 2: \"seed\" is 'x', expected an integer"),
        ("prompt,strength\n\na,much\n", "line 3: \"strength\" is 'much', expected a number"),
        ("prompt,keep_unmasked\na,2\n", "line 2: \"keep_unmasked\" is '2', expected true or false"),
        ("prompt,seed\n,5\n", 'line 2 has no "prompt"'),
        ("prompt,seed\na, b, 5\n", "line 2 has 3 cells, and the first row 2: quote"),
        ('prompt\n"a\n', "is not valid CSV"),
    ],
)
def test_wrong_tables(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        rows(tmp_path, text)


# Parquet


def columns(tmp_path, **found) -> list[dict]:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(found), tmp_path / "prompts.parquet")
    return read_prompt_file(tmp_path / "prompts.parquet")


def test_a_parquet_table(tmp_path):
    nan = float("nan")
    found = columns(
        tmp_path,
        prompt=["one", None, "two"],
        seed=[2**62, None, 1],
        width=[64.0, nan, nan],
        strength=[None, None, 0.5],
        input=[["a.png"], None, ["b.png", "c.png"]],
        mask=["m.png", None, None],
        keep_unmasked=[None, None, False],
    )
    assert found == [
        {"prompt": "one", "seed": 2**62, "width": 64, "input": ["a.png"], "mask": "m.png"},
        {"prompt": "two", "seed": 1, "strength": 0.5, "input": ["b.png", "c.png"], "keep_unmasked": False},
    ]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"prompt": []}, "holds no prompt"),
        ({"seed": [1]}, 'prompts.parquet has no column "prompt"$'),
        ({"prompt": ["a"], "colour": ["red"]}, 'has an unknown column "colour": known are prompt'),
        ({"prompt": ["a", "b"], "width": [64, 64.5]}, 'row 2: "width" is 64.5, expected an int'),
        ({"prompt": [b"a"]}, "row 1: \"prompt\" is b'a', expected a string"),
        ({"prompt": ["a", " "]}, 'row 2 has no "prompt"'),
    ],
)
def test_wrong_parquet_tables(tmp_path, found, message):
    with pytest.raises(UsageError, match=message):
        columns(tmp_path, **found)


def test_no_parquet(tmp_path, monkeypatch):
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"PAR1")
    if importlib.util.find_spec("pyarrow"):
        with pytest.raises(UsageError, match="is not a whole Parquet file: "):
            read_prompt_file(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'needs a package: pip install "fluxonnx\[parquet\]"'):
        read_prompt_file(path)
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        read_prompt_file(path)


# Standard input


class Stream:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stream(b'a cat\n{"prompt": "b", "input": "a.png"}\n'))
    assert read_prompt_file(Path("-")) == [{"prompt": "a cat"}, {"prompt": "b", "input": ["a.png"]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "^standard input holds no prompt"),
        (b"\xff", "^standard input can't be read: it is not UTF-8 text"),
        (b"{}", 'standard input, line 1 has no "prompt"'),
        (None, "^standard input can't be read: it is closed"),
    ],
)
def test_wrong_standard_input(monkeypatch, content, message):
    monkeypatch.setattr(sys, "stdin", None if content is None else Stream(content))
    with pytest.raises(UsageError, match=message):
        read_prompt_file(Path("-"))
