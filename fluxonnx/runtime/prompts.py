"""Prompt embeddings, remembered so that a known prompt does not load the text encoder's 8 GB."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fluxonnx.checkpoint.manifest import Build, Manifest
from fluxonnx.checkpoint.safetensors import fingerprint
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.files import describe_os_error
from fluxonnx.runtime.known_tokens import KnownTokens
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.notices import warn
from fluxonnx.runtime.sealed import read_sealed, write_sealed
from fluxonnx.runtime.text import Tokenizer, Tokens

# 16 MB each for FLUX.2-klein-4B
REMEMBERED = 16
# Characters that a warning quotes at most.
QUOTED = 200


class Prompts:
    """Encodes prompts; remembers the latest ones in memory and, with a cache, all of them on disk."""

    def __init__(self, tokenizer: Tokenizer | KnownTokens, models: Models, cache: PromptCache | None) -> None:
        """Nothing is loaded yet."""
        self._tokenizer, self._models, self._cache = tokenizer, models, cache
        self._known: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        # adapted(component) -> what its graph is changed by; "" for nothing
        self.adapted: Callable[[str], str] = lambda component: ""

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
                cut = tokens.cut if len(tokens.cut) <= QUOTED else f"{tokens.cut[:QUOTED]}..."
                warn(f"the prompt is longer than {max_length} tokens; this was cut: {cut!r}")
            self._known[key] = self._load_or_encode(tokens)
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def _load_or_encode(self, tokens: Tokens) -> np.ndarray:
        # the names of a cache's files do not tell a changed encoder from the model's own
        cache = None if self.adapted("text_encoder") else self._cache
        embeds = cache.load(tokens) if cache else None
        if embeds is None:
            embeds = self._models.prompt_embeds(tokens.input_ids, tokens.attention_mask)
            if cache:
                cache.save(tokens, embeds)
        return embeds

    def forget(self) -> None:
        """Free the memory of remembered prompts."""
        self._known.clear()


class PromptCache:
    """Prompt embeddings in a folder; each file is named by a hash of the encoder and the tokens.

    Any number of processes may share a folder: a file appears only when it is complete, and a name has one content. A
    file is a .npy with a SHA-256 of itself at its end. Whatever else is found in its place is made again.
    """

    def __init__(self, folder: Path, identify: Callable[[], str], width: int) -> None:
        """Use `folder` for the embeddings of an encoder.

        Args:
            folder: Made if it does not exist.
            identify: Returns what tells the encoder from any other that would give other embeddings.
            width: The length of an embedding.

        Raises:
            UsageError: The folder does not exist and can't be made.
            CheckpointError: A file of the encoder can't be read.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache directory {folder} can't be used: {error.strerror}: choose another") from None
        except ValueError as error:  # a NUL in the name
            raise UsageError(f"cache directory {str(folder)!r} can't be used: {error}: choose another") from None
        self._folder, self._identify, self._width = folder, identify, width
        self._encoder = identify()

    def _path(self, tokens: Tokens) -> Path:
        digest = hashlib.sha256(self._encoder.encode("utf-8", "surrogateescape"))
        for array in (tokens.input_ids, tokens.attention_mask):
            digest.update(array.tobytes())
        return self._folder / f"{digest.hexdigest()}.npy"

    def load(self, tokens: Tokens) -> np.ndarray | None:
        """Return the embeddings of `tokens`; None if there are none, or if the file is not what `save` wrote."""
        path, shape = self._path(tokens), (*tokens.input_ids.shape, self._width)
        header = _npy_header(shape)
        body = read_sealed(path, len(header) + math.prod(shape) * 4)
        if body is None or not body.startswith(header):
            return None
        embeds = np.frombuffer(body, "<f4", offset=len(header)).reshape(shape)
        return embeds if np.isfinite(embeds).all() else None

    def save(self, tokens: Tokens, embeds: np.ndarray) -> None:
        """Save embeddings; if that fails, warn, because the picture can still be made.

        Embeddings that are not finite are not worth keeping. Those of an encoder whose files were replaced since it was
        opened would get the wrong name.
        """
        shape = (*tokens.input_ids.shape, self._width)
        if embeds.shape != shape or not np.isfinite(embeds).all() or not self._is_unchanged():
            return
        path, body = self._path(tokens), _npy_header(shape) + embeds.astype("<f4").tobytes()
        try:
            write_sealed(path, body)
        except OSError as error:
            warn(f"the prompt was not cached: {describe_os_error(error, path, 'choose another --cache-dir')}")

    def _is_unchanged(self) -> bool:
        try:
            return self._identify() == self._encoder
        except CheckpointError:
            return False


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return what `numpy.save` writes before the float32 values of an array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def encoder_identity(root: Path, manifest: Manifest, build: Build, engine: str, provider: str) -> str:
    """Return everything that prompt embeddings depend on, except the tokens.

    The files that the encoder reads are named by their content: the graph wholly, weights by their fingerprint and the
    time of their last change, because a fingerprint reads only samples of a file of 8 GB.

    Raises:
        CheckpointError: A weight file can't be read.
    """
    encoder = build.components["text_encoder"]
    names = [*encoder.weights, *([] if encoder.self_contained else sorted(encoder.sources))]
    try:
        graph = hashlib.sha256((root / encoder.graph).read_bytes()).hexdigest()
        weights = [(name, fingerprint(root / name), (root / name).stat().st_mtime_ns) for name in names]
    except OSError as error:
        raise CheckpointError(f"{root / encoder.graph} can't be read: {error.strerror}: export again") from None
    made = [encoder.graph, encoder.exporter_version, encoder.exporter_digest, encoder.graph_format]
    made += [build.precision, build.flavour, build.opset, build.settings, encoder.sources]
    made += [manifest.text_encoder_out_layers, graph, weights, provider, engine]
    return json.dumps(made, sort_keys=True)
