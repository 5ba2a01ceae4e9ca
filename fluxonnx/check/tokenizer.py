"""Whether the tokenizer gives the ids that the text encoder was trained with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from fluxonnx.check.findings import FAILED, OK, SKIPPED, Finding
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.reading import shown
from fluxonnx.contract import DEFAULT_PAD_TOKEN
from fluxonnx.runtime.text import Tokenizer

SUBJECT = "tokenizer"
# The rows of the embedding table of Qwen3's text encoders, of which the tokenizer uses fewer.
QWEN3_VOCAB = 151936


def known() -> dict[str, Any]:
    """Return the ids of Qwen3's special tokens, and of some prompts in the chat template."""
    return json.loads(files("fluxonnx.check").joinpath("data/tokens.json").read_text("utf-8"))


def check(checkpoint: Checkpoint, vocab: int | None, golden: dict[str, Any] | None = None) -> Iterator[Finding]:
    """Compare the ids of prompts with Qwen3's, or say that the vocabulary is another one.

    Args:
        checkpoint: The model directory.
        vocab: The rows of the text encoder's embedding table; None if they are not known.
        golden: What to compare with; by default `known`.
    """
    path = checkpoint.root / "tokenizer/tokenizer.json"
    tokenizer = Tokenizer(path.parent)
    golden = golden or known()
    prompts = golden["prompts"]
    found = [[int(i) for i in tokenizer.encode(item["prompt"]).input_ids[0]] for item in prompts]
    pad = golden["special"][DEFAULT_PAD_TOKEN]
    wrong = [
        (item["prompt"], ids)
        for item, ids in zip(prompts, found, strict=True)
        if ids != item["ids"] + [pad] * (len(ids) - len(item["ids"]))
    ]
    largest = max(max(ids) for ids in found)
    cure = "download the folder tokenizer again"
    if vocab is not None and largest >= vocab:
        yield Finding(
            FAILED,
            SUBJECT,
            f"{path} gives the id {largest}, but the text encoder has only {vocab} tokens: it belongs to another "
            f"model, {cure}",
        )
    elif not wrong:
        yield Finding(OK, SUBJECT, f"Qwen3's: its special tokens and {len(prompts)} prompts have the known ids")
    elif vocab == QWEN3_VOCAB:
        prompt, ids = wrong[0]
        expected = next(item["ids"] for item in prompts if item["prompt"] == prompt)
        i = next((i for i, (a, b) in enumerate(zip(ids, [*expected, pad], strict=False)) if a != b), 0)
        yield Finding(
            FAILED,
            SUBJECT,
            f"{path} is not Qwen3's: of {len(wrong)} of {len(prompts)} prompts the ids are others (token {i} of "
            f"{shown(prompt)} is {ids[i]}, expected {[*expected, pad][i]}): {cure}",
        )
    else:
        yield Finding(
            SKIPPED,
            SUBJECT,
            "a vocabulary of its own, as small models have: its ids fit the text encoder, and no ids are known to "
            "compare with",
        )
