"""Remembered tokens: those of the tokenizer itself, never those of another one, never damaged ones."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fluxonnx.cli import main
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.runtime import known_tokens, text
from fluxonnx.runtime.known_tokens import KnownTokens, open_tokenizer
from fluxonnx.runtime.text import Tokenizer, Tokens
from tests.support import Case
from tools.make_checkpoint import write_tokenizer

PROMPTS = ["", "a cat", "naïve café “quotes” 🐈‍⬛ 猫", "<|im_end|> inside", "word " * 600]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer"
    path.mkdir()
    write_tokenizer(path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    return path


@pytest.fixture
def parsed(monkeypatch) -> list[int]:
    """A number for each time that a tokenizer is parsed."""
    times: list[int] = []

    class Counted:
        @staticmethod
        def from_buffer(content: bytes) -> object:
            times.append(len(content))
            return parse(content)

    parse = text.HubTokenizer.from_buffer
    monkeypatch.setattr(text, "HubTokenizer", Counted)
    return times


def same(one: Tokens, other: Tokens) -> bool:
    arrays = [(one.input_ids, other.input_ids), (one.attention_mask, other.attention_mask)]
    return one.cut == other.cut and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


@pytest.mark.parametrize("length", [8, 24, 512])
def test_known_tokens_are_those_of_the_tokenizer(folder, cache, parsed, length):
    tokenizer = Tokenizer(folder)
    expected = [tokenizer.encode(prompt, length) for prompt in PROMPTS]
    for times in (1, 0):
        parsed.clear()
        known = KnownTokens(folder, cache)
        assert all(same(known.encode(p, length), tokens) for p, tokens in zip(PROMPTS, expected, strict=True))
        assert len(parsed) == times


@pytest.mark.parametrize("prompt", ["a\0b", "\ud83d"])
def test_what_is_no_text(folder, cache, prompt):
    with pytest.raises(UsageError, match="not valid text"):
        KnownTokens(folder, cache).encode(prompt)
    with pytest.raises(UsageError, match="multiple of 8"):
        KnownTokens(folder, cache).encode("x", 12)


def change_pad_token(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|im_end|>"}))


def change_vocabulary(folder: Path) -> None:
    """Two letters change places."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change", [change_pad_token, change_vocabulary])
def test_changed_tokenizer(folder, cache, change):
    first = KnownTokens(folder, cache)
    before = first.encode("x", 64)
    change(folder)
    after = KnownTokens(folder, cache).encode("x", 64)
    assert same(after, Tokenizer(folder).encode("x", 64))
    assert not same(before, after)
    assert same(first.encode("x", 64), before)


@pytest.mark.parametrize("change", [change_pad_token, change_vocabulary])
def test_tokenizer_that_was_replaced_after_it_was_opened(folder, cache, change):
    """Its tokens would get the name of those of the one before."""
    known = KnownTokens(folder, cache)
    change(folder)
    known.encode("x", 64)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes(len(content)),
        # whole, but of another length
        lambda content: content[8:-32] + hashlib.sha256(content[8:-32]).digest(),
    ],
)
def test_damaged_entry_is_made_again(folder, cache, damage, parsed):
    tokens = KnownTokens(folder, cache).encode("a cat", 64)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    parsed.clear()
    assert same(KnownTokens(folder, cache).encode("a cat", 64), tokens)
    assert len(parsed) == 1
    assert file.read_bytes() == whole


@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", os.mkdir)])
def test_no_file_in_the_place_of_an_entry(folder, cache, make):
    """The entry can't be written then, either: a prompt without one is tokenised every time."""
    tokens = KnownTokens(folder, cache).encode("a cat", 64)
    (file,) = cache.iterdir()
    file.unlink()
    make(file)
    assert same(KnownTokens(folder, cache).encode("a cat", 64), tokens)


def test_cache_that_is_gone(folder, cache):
    known = KnownTokens(folder, cache)
    cache.rmdir()
    assert same(known.encode("a cat", 64), Tokenizer(folder).encode("a cat", 64))


@pytest.mark.parametrize("cached", [True, False])
def test_missing_tokenizer(folder, cache, cached):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        open_tokenizer(folder, cache if cached else None)


@pytest.mark.parametrize("cached", [True, False])
def test_damaged_tokenizer(folder, cache, cached):
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        open_tokenizer(folder, cache if cached else None).encode("a cat")


def test_a_tokenizer_is_shared_while_somebody_holds_it(folder):
    first = open_tokenizer(folder, None)
    assert open_tokenizer(folder, None) is first
    change_vocabulary(folder)
    assert open_tokenizer(folder, None) is not first
    del first
    gc.collect()
    assert not [key for key in known_tokens._in_use if key[0] == folder.absolute()]


def test_generate_parses_a_tokenizer_once_and_a_known_prompts_not_at_all(checkpoints, tmp_path, parsed, capsys):
    root = checkpoints.exported(Case("odd-heads"))
    command = ["generate", "-d", str(root), "-p", "a cat", "-W", "64", "-H", "64", "-s", "1", "-S", "1"]
    pictures = []
    for options, times in (
        ([], 1),
        (["--cache-dir", str(tmp_path / "cache")], 1),
        (["--cache-dir", str(tmp_path / "cache")], 0),
    ):
        parsed.clear()
        assert main([*command, *options, "-o", str(tmp_path / "picture.png")]) == 0, capsys.readouterr().err
        assert len(parsed) == times
        pictures.append((tmp_path / "picture.png").read_bytes())
    assert len(set(pictures)) == 1
