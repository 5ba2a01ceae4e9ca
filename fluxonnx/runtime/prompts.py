"""Prompt embeddings, and remembering them: the text encoder is 8 GB that a known prompt need not load."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fluxonnx.errors import UsageError
from fluxonnx.files import explain, replacing
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.text import Tokenizer, Tokens

# 16 MB each for FLUX.2-klein-4B
REMEMBERED = 16


class Prompts:
    """Encodes prompts; remembers the latest in memory and, given a folder, all of them on disk."""

    def __init__(self, tokenizer: Tokenizer, models: Models, cache: PromptCache | None) -> None:
        """Nothing is loaded yet."""
        self._tokenizer, self._models, self._cache = tokenizer, models, cache
        self._known: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def encode(self, prompts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Return f32 [1, max_length, 3 * hidden] for each prompt; the encoder is loaded once, if at all.

        Raises:
            UsageError: A prompt is not valid text, or `max_length` is out of range.
        """
        found = [self._one(prompt, max_length) for prompt in prompts]
        self._models.release_text_encoder()
        return found

    def _one(self, prompt: str, max_length: int) -> np.ndarray:
        key = (prompt, max_length)
        if key not in self._known:
            tokens = self._tokenizer.encode(prompt, max_length)
            if tokens.cut:
                warnings.warn(
                    f"the prompt is longer than {max_length} tokens; this was cut: {tokens.cut!r}", stacklevel=5
                )
            self._known[key] = self._load_or_encode(tokens)
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def _load_or_encode(self, tokens: Tokens) -> np.ndarray:
        embeds = self._cache.load(tokens) if self._cache else None
        if embeds is None:
            embeds = self._models.prompt_embeds(tokens.input_ids, tokens.attention_mask)
            if self._cache:
                self._cache.save(tokens, embeds)
        return embeds

    def forget(self) -> None:
        """Give the memory of remembered prompts back."""
        self._known.clear()


class PromptCache:
    """Prompt embeddings in a folder, each named by what it depends on: the encoder's build and the tokens.

    Any number of processes may use a folder: files appear whole, and two that write the same name write the same.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        """Use `folder`, which is made if missing, for the embeddings of the build that `encoder` identifies.

        Raises:
            UsageError: It can't be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache directory {folder} can't be used: {error.strerror}: choose another") from None
        self._folder, self._encoder = folder, encoder

    def _path(self, tokens: Tokens) -> Path:
        digest = hashlib.sha256(self._encoder.encode())
        for array in (tokens.input_ids, tokens.attention_mask):
            digest.update(array.tobytes())
        return self._folder / f"{digest.hexdigest()}.npy"

    def load(self, tokens: Tokens) -> np.ndarray | None:
        """Return what was saved for `tokens`; None if nothing was, or if the file is damaged."""
        try:
            embeds = np.load(self._path(tokens), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        good = embeds.dtype == np.float32 and embeds.ndim == 3 and embeds.shape[:2] == tokens.input_ids.shape
        return embeds if good else None

    def save(self, tokens: Tokens, embeds: np.ndarray) -> None:
        """Save embeddings; a full disk costs a warning, not the picture."""
        path = self._path(tokens)
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, embeds)
        except OSError as error:
            warnings.warn(f"the prompt was not cached: {explain(error, path)}", stacklevel=6)
