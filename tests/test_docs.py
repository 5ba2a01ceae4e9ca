"""The documentation agrees with the command line: its reference page, and every command that it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxonnx.cli import build_parser
from fluxonnx.runtime.fields import FIELDS
from tools import cli_docs

ROOT = Path(__file__).parent.parent
COMMANDS = cli_docs.commands(build_parser())
MENTION = re.compile(rf"\bfluxonnx (?:{'|'.join(COMMANDS)})\b")
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md")))
    if MENTION.search(path.read_text("utf-8"))
]
SHELL = ("bash", "sh", "console")
END_OF_COMMAND = {"&&", "||", "|", ";", ">", "2>", "&"}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a Markdown page: (language, code) of fenced blocks, ("", text) of the text between them."""
    for i, part in enumerate(re.split(r"^```", text, flags=re.MULTILINE)):
        language, _, code = part.partition("\n")
        yield (language or "none", code) if i % 2 else ("", part)


def shell_commands(code: str) -> Iterator[list[str]]:
    """The arguments of each fluxonnx command in a shell script."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word == "fluxonnx" and MENTION.fullmatch(" ".join(words[i : i + 2])):
                yield words[i + 1 : next((j for j, end in enumerate(words) if j > i and end in END_OF_COMMAND), None)]


def parses(words: list[str]) -> bool:
    """Whether the real parser takes a command; it exits for --help, too, but with 0."""
    try:
        build_parser().parse_args(words)
    except SystemExit as error:
        return error.code == 0
    return True


def flags_of(words: list[str]) -> set[str]:
    """The flags among words such as "[-d" or "--size"."""
    return {word.strip("[]") for word in words if re.match(r"\[?--?[A-Za-z]", word)}


def check_flags(words: list[str]) -> None:
    known = {flag for action in COMMANDS[words[0]]._actions for flag in action.option_strings}
    assert flags_of(words) <= known, f"fluxonnx {' '.join(words)}"


def check_page(text: str) -> int:
    """Check every command of a page; returns how many there are."""
    checked = 0
    for language, code in blocks(text):
        if language in SHELL:
            for words in shell_commands(code):
                assert parses(words), f"fluxonnx {shlex.join(words)}"
                checked += 1
        elif language:  # a synopsis
            for line in code.splitlines():
                if MENTION.search(line):
                    assert line.startswith("usage: fluxonnx "), line
                    check_flags(line.split()[2:])
                    checked += 1
        else:  # part of a sentence, where it may be less than a complete command
            for span in re.findall(r"`([^`]+)`", code):
                if MENTION.match(span):
                    check_flags(shlex.split(span)[1:])
                    checked += 1
    return checked


def test_reference_is_up_to_date():
    assert cli_docs.PAGE.read_text("utf-8") == cli_docs.page(), "run python tools/cli_docs.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_of_the_documentation_parse(path):
    text = path.read_text("utf-8")
    assert check_page(text) == len(MENTION.findall(text)), "a command is neither in a shell block nor in backticks"


def test_the_guide_names_every_key_of_prompt_files_and_pictures():
    text = (ROOT / "docs/pictures.md").read_text("utf-8")
    keys = [field.name for field in FIELDS if {"prompt file", "picture"} & set(field.places)]
    assert [key for key in keys if f"`{key}`" not in text] == []


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nfluxonnx generate --no-such-flag\n```",
        "```bash\npip install . && fluxonnx generate -W wide\n```",
        "```text\nusage: fluxonnx bench [--no-such-flag]\n```",
        "```text\nfluxonnx info a.png\n```",
        "`fluxonnx compare --no-such-flag` does nothing",
    ],
)
def test_a_wrong_command_is_found(text, capsys):
    with pytest.raises(AssertionError):
        check_page(text)


def test_every_kind_of_mention_is_counted():
    text = "`fluxonnx info a.png` and\n```bash\nX=1 fluxonnx info \\\n  a.png | cat  # fluxonnx\n```\nfluxonnx info"
    assert check_page(text) == 2
    assert len(MENTION.findall(text)) == 3
