"""Completion in the real shells."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("shtab")
pytest.importorskip("pexpect")
pytest.importorskip("pyte")

from fluxonnx.cli import build_parser
from fluxonnx.errors import UsageError
from fluxonnx.export.precisions import PRECISIONS
from fluxonnx.terminal.completion import PRECISIONS as OFFERED
from fluxonnx.terminal.completion import SHELLS, script
from tests.terminal.screen import Terminal

pytestmark = pytest.mark.slow

# What is typed, and what is offered for the last word.
OFFERS = [
    ("gen", "generate"),
    ("generate --preci", "--precision"),
    ("generate --precision i", "int4 int8"),
    ("generate --provider ope", "openblas openvino"),
    ("generate --sampler ", "dpmpp-2m euler heun"),
    ("generate --show k", "kitty"),
    ("generate -i ", "loras/ mymodel/ picture.png"),
    ("generate -d ", "acme/klein loras/ mymodel/"),
    ("generate -d ac", "acme/klein"),
    ("generate --lora ", "loras/ loras/cat.safetensors mymodel/"),
    ("export -d my", "mymodel/"),
    ("export --flavour p", "portable"),
    ("repl --pro", "--provider --provider-option"),
    ("completion ", "bash fish zsh"),
]


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a picture, a model and a LoRA, and a cache of the hub with another model."""
    for name in ("here/mymodel/model_index.json", "here/loras/cat.safetensors", "here/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    model = tmp_path / "hub/models--acme--klein/snapshots/0123abc/model_index.json"
    model.parent.mkdir(parents=True)
    model.touch()
    (tmp_path / "hub/models--acme--lora/snapshots/0123abc").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for shell in SHELLS:
        (tmp_path / shell).write_text(script(build_parser(), shell))
    return tmp_path / "here"


def run(place: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout


def bash(place: Path, lines: list[str]) -> list[set[str]]:
    """What bash's completion function answers; a folder ends in / as bash writes it."""
    code = [
        f"source {place.parent}/bash",
        'complete -p fluxonnx | grep -q "complete .* fluxonnx" || echo NOT REGISTERED',
        'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_fluxonnx 2>/dev/null',
        'for found in "${COMPREPLY[@]}"; do [ -d "$found" ] && found+=/; printf "%s\\t" "$found"; done; echo; }',
        *(f"try fluxonnx {line if not line.endswith(' ') else line + chr(39) * 2}" for line in lines),
    ]
    return [set(line.split("\t")[:-1]) for line in run(place, "bash", "-c", "\n".join(code)).splitlines()]


def fish(place: Path, lines: list[str]) -> list[set[str]]:
    """What `complete -C` of fish says: a name and its description in each line."""
    code = f"source {place.parent}/fish\n" + "\n".join(f"complete -C 'fluxonnx {line}'; echo =" for line in lines)
    blocks = run(place, "fish", "--no-config", "-c", code).split("=\n")[:-1]
    return [{line.split("\t")[0] for line in block.splitlines()} for block in blocks]


@pytest.mark.parametrize("answers", [pytest.param(bash, marks=needs("bash")), pytest.param(fish, marks=needs("fish"))])
def test_what_is_offered(place, answers: Callable):
    found = answers(place, [line for line, _ in OFFERS])
    for (line, expected), offered in zip(OFFERS, found, strict=True):
        assert offered == set(expected.split()), line


@needs("zsh")
def test_zsh_at_its_prompt(place):
    terminal = Terminal(["zsh", "-f", "-i"], place, columns=80, HF_HUB_CACHE=str(place.parent / "hub"), PS1="%% ")
    terminal.wait("%")
    terminal.type("autoload -Uz compinit; compinit -u -D; setopt nolistbeep")
    terminal.type(f'eval "$(cat {place.parent}/zsh)"; clear; echo ready')
    terminal.wait(lambda t: t.text.startswith("ready"))
    for line, expected in OFFERS:
        terminal.child.send("\x15\x0cfluxonnx " + line + "\t\t")
        words = expected.split()
        if len(words) == 1:
            whole = f"fluxonnx {line.rpartition(' ')[0]} ".replace("  ", " ") + words[0]
            terminal.wait(lambda t, whole=whole: t.text.startswith(f"% {whole}"))
        else:
            terminal.wait(lambda t, words=words: all(re.search(rf"(^|\s){re.escape(w)}", t.text) for w in words))
    assert "_arguments:" not in terminal.text
    terminal.child.send("\x15")
    terminal.type("exit")
    terminal.end()


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_every_flag(shell):
    text = script(build_parser(), shell)
    for flag in ("--mask-crop", "--keep-unmasked", "--no-keep-unmasked", "--text-encoder-precision", "--shard-size"):
        assert flag in text or f"-l {flag[2:]}" in text or flag[2:] in text


def test_precisions_are_those_of_the_exporter():
    assert sorted(OFFERED) == sorted(PRECISIONS)


def test_an_unknown_shell():
    with pytest.raises(UsageError, match="no completion for 'tcsh': choose one of bash, zsh, fish"):
        script(build_parser(), "tcsh")
