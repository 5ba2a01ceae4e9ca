"""Prompts become the same tokens as in the reference; what does not fit is reported."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.runtime.text import Tokenizer
from tools.make_checkpoint import write_tokenizer

PROMPTS = [
    "",
    "a cat",
    "  spaces   and\ttabs\nand lines ",
    "naïve café “quotes” 🐈‍⬛ 猫",
    "cafe\u0301 in two forms",
    "<|im_end|> and <think> inside",
    "word " * 600,
    "数" * 700,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


def test_padding_and_mask(folder):
    tokens = Tokenizer(folder).encode("a cat", 64)
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (1, 64)
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int64
    length = tokens.attention_mask.sum()
    assert tokens.attention_mask[0, :length].all()
    assert len(set(tokens.input_ids[0, length:].tolist())) == 1
    assert tokens.cut == ""


def test_cut_is_the_end_of_the_prompt(folder):
    prompt = "a cat " * 20 + "END"
    tokens = Tokenizer(folder).encode(prompt, 24)
    assert tokens.attention_mask.all()
    assert tokens.cut
    assert prompt.endswith(tokens.cut)
    kept = prompt[: -len(tokens.cut)]
    assert Tokenizer(folder).encode(kept, 512).input_ids[0, :24].tolist() == tokens.input_ids[0].tolist()


def test_cut_counts_characters_as_typed(folder):
    """Normalising joins letters and accents; the message shows what was typed."""
    tokens = Tokenizer(folder).encode("e\u0301" * 10 + "END of it all", 24)
    assert tokens.cut == "ND of it all"


def test_nul_in_a_prompt(folder):
    with pytest.raises(UsageError, match="NUL"):
        Tokenizer(folder).encode("a\0b")


def test_cutting_the_template_alone_cuts_no_prompt(folder):
    assert Tokenizer(folder).encode("a", 8).cut == ""


@pytest.mark.parametrize("length", [0, 7, 12, 520])
def test_impossible_lengths(folder, length):
    with pytest.raises(UsageError, match="multiple of 8 from 8 to 512"):
        Tokenizer(folder).encode("x", length)


def test_half_a_surrogate_pair(folder):
    with pytest.raises(UsageError, match="not valid text"):
        Tokenizer(folder).encode("\ud83d")


def test_pad_token_of_the_config(folder, tmp_path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": {"content": "<|im_end|>"}}))
    ordinary, changed = (Tokenizer(path).encode("x", 64).input_ids[0, -1] for path in (folder, tmp_path))
    assert ordinary != changed


def test_foreign_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"no token <\|im_start\|>"):
        Tokenizer(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("length", [8, 24, 512])
def test_equals_transformers(folder, length):
    """Ids and mask as _get_qwen3_prompt_embeds feeds them to the encoder."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    for prompt in PROMPTS:
        text = reference.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        expected = reference(text, return_tensors="np", padding="max_length", truncation=True, max_length=length)
        found = tokenizer.encode(prompt, length)
        assert np.array_equal(found.input_ids, expected["input_ids"]), prompt
        assert np.array_equal(found.attention_mask, expected["attention_mask"]), prompt


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b"\xff\xfe",
        b"1" * 5000,
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1",
    ],
)
def test_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a tokenizer|web page|git-LFS pointer") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_for_a_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("token", [5, ["a"], {"content": 5}, "\0", "\ud800", {"content": {}}, True])
def test_damaged_pad_token(tmp_path, token):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
    if token == {"content": {}}:
        token = None  # like none at all
    with pytest.raises(CheckpointError, match=r"pad_token is .*expected a string"):
        Tokenizer(tmp_path)
