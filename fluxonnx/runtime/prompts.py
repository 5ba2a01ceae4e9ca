"""Prompt embeddings, remembered so that a known prompt does not load the text encoder's 8 GB."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fluxonnx.errors import UsageError
from fluxonnx.files import atomic_write, describe_os_error
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.text import Tokenizer, Tokens

# 16 MB each for FLUX.2-klein-4B
REMEMBERED = 16


class Prompts:
    """Encodes prompts; remembers the latest ones in memory and, with a cache, all of them on disk."""

    def __init__(self, tokenizer: Tokenizer, models: Models, cache: PromptCache | None) -> None:
        """Nothing is loaded yet."""
        self._tokenizer, self._models, self._cache = tokenizer, models, cache
        self._known: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def encode(self, prompts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Return f32 [1, max_length, 3 * hidden] for each prompt; the encoder is loaded at most once.

        Raises:
            UsageError: A prompt is not valid text, or `max_length` is out of range.
        """
        found = []
        for prompt in prompts:
            found.append(self._one(prompt, max_length))
        self._models.release("text_encoder")
        return found

    def _one(self, prompt: str, max_length: int) -> np.ndarray:
        key = (prompt, max_length)
        if key not in self._known:
            tokens = self._tokenizer.encode(prompt, max_length)
            if tokens.cut:
                warnings.warn(
                    f"the prompt is longer than {max_length} tokens; this was cut: {tokens.cut!r}", stacklevel=7
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
        """Free the memory of remembered prompts."""
        self._known.clear()


class PromptCache:
    """Prompt embeddings in a folder; each file is named by a hash of the encoder's build and the tokens.

    Any number of processes may share a folder: a file appears only when it is complete, and a name has one content.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        """Use `folder` for the embeddings of the build that `encoder` identifies.

        Raises:
            UsageError: The folder does not exist and can't be made.
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
        """Return the embeddings of `tokens`; None if there are none, or if the file is damaged."""
        try:
            embeds = np.load(self._path(tokens), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        good = embeds.dtype == np.float32 and embeds.ndim == 3 and embeds.shape[:2] == tokens.input_ids.shape
        return embeds if good else None

    def save(self, tokens: Tokens, embeds: np.ndarray) -> None:
        """Save embeddings; if that fails, warn, because the picture can still be made."""
        path = self._path(tokens)
        try:
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, embeds)
        except OSError as error:
            warnings.warn(f"the prompt was not cached: {describe_os_error(error, path)}", stacklevel=9)
