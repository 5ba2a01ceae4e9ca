"""Tokens of prompts, remembered so that a known prompt does not parse the tokenizer's 11 MB, which takes a second."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from fluxonnx.contract import MAX_SEQUENCE_LENGTH
from fluxonnx.errors import CheckpointError
from fluxonnx.runtime.sealed import read_sealed, write_sealed
from fluxonnx.runtime.text import Tokenizer, Tokens, check_prompt, identity

# A command that checks its prompts before it opens the model needs a tokenizer twice.
_in_use: WeakValueDictionary[tuple[Path, str], Tokenizer] = WeakValueDictionary()


class KnownTokens:
    """The tokenizer of a model directory, parsed when a prompt comes that is not in a cache.

    Each file of the cache is named by a hash of the tokenizer and the prompt. It holds int64 numbers: how many tokens
    are no padding, how many characters were cut, and the tokens.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        """Use the files in `cache`, an existing folder, for the tokenizer in `folder`.

        Raises:
            CheckpointError: A file of the tokenizer is missing or can't be read.
        """
        self._folder, self._cache, self._identity = folder, cache, identity(folder)
        self._tokenizer: Tokenizer | None = None

    def encode(self, prompt: str, max_length: int = MAX_SEQUENCE_LENGTH) -> Tokens:
        """Tokenise a prompt as `Tokenizer.encode` does.

        Raises:
            UsageError: As `Tokenizer.encode`.
            CheckpointError: The tokenizer is needed, and is corrupt.
        """
        check_prompt(prompt, max_length)
        name = hashlib.sha256(json.dumps([self._identity, prompt, max_length]).encode())
        path = self._cache / f"{name.hexdigest()}.tokens"
        body = read_sealed(path, (max_length + 2) * 8)
        if body is not None:
            count, cut, *_ = numbers = np.frombuffer(body, "<i8")
            mask = (np.arange(max_length) < count).astype(np.int64)
            return Tokens(numbers[2:][None].astype(np.int64), mask[None], prompt[len(prompt) - cut :])
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder)
        tokens = self._tokenizer.encode(prompt, max_length)
        self._save(path, tokens)
        return tokens

    def _save(self, path: Path, tokens: Tokens) -> None:
        """Save tokens, unless the tokenizer was replaced; if that fails, saving the embeddings will fail and warn."""
        with suppress(OSError, CheckpointError):
            if identity(self._folder) == self._identity:
                counts = [tokens.attention_mask.sum(), len(tokens.cut)]
                write_sealed(path, np.append(counts, tokens.input_ids).astype("<i8").tobytes())


def open_tokenizer(folder: Path, cache: Path | None) -> Tokenizer | KnownTokens:
    """Return the tokenizer of a model directory; one that somebody else holds is shared.

    Args:
        folder: The folder of tokenizer.json.
        cache: An existing folder of known prompts.

    Raises:
        CheckpointError: tokenizer.json is missing, or without a cache: corrupt or of another model.
    """
    if cache is not None:
        return KnownTokens(folder, cache)
    key = folder.absolute(), identity(folder)
    found = _in_use.get(key)
    if found is None:
        found = _in_use[key] = Tokenizer(folder)
    return found
