"""A prompt as input of the text encoder: chat template, tokens, padding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Encoding
from tokenizers import Tokenizer as HubTokenizer

from fluxonnx.checkpoint.config import read_json
from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.reading import exists, foreign, is_text, read_bounded, shown
from fluxonnx.contract import CHAT_TEMPLATE, DEFAULT_PAD_TOKEN, MAX_SEQUENCE_LENGTH
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.runtime.fields import FIELD

TEMPLATE_HEAD, TEMPLATE_TAIL = CHAT_TEMPLATE.split("{prompt}")


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt.

    Attributes:
        input_ids: int64 [1, length], padded on the right.
        attention_mask: int64 [1, length], 1 for tokens, 0 for padding.
        cut: The end of the prompt that did not fit; empty if all of it did.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    cut: str


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, folder: Path) -> None:
        """Load tokenizer.json.

        Raises:
            CheckpointError: It is missing, corrupt, or lacks a token of the chat template.
        """
        path = _existing(folder)
        try:
            content = read_bounded(path)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
        self._path = path
        try:
            self._tokenizer = HubTokenizer.from_buffer(content)
        except BaseException as error:
            reason = foreign(content) or f"is not a tokenizer ({_reason(error)}): download it again"
            raise CheckpointError(f"{path} {reason}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        pad_token = _pad_token(folder)
        for token in ("<|im_start|>", "<|im_end|>", pad_token):
            if self._tokenizer.token_to_id(token) is None:
                raise CheckpointError(f"{path} has no token {token[:100]}: it is not the tokenizer of this model")
        self._pad_id = self._tokenizer.token_to_id(pad_token)

    def encode(self, prompt: str, max_length: int = MAX_SEQUENCE_LENGTH) -> Tokens:
        """Tokenise a prompt in the chat template, padded or cut to `max_length`.

        A prompt that is too long loses the template's tail first, then its own. Special tokens that are written in the
        prompt become these tokens, as in transformers.

        Source: _get_qwen3_prompt_embeds, diffusers pipeline_flux2_klein.py.

        Args:
            prompt: Any text; it may be empty, as negative prompts often are.
            max_length: The length of the result in tokens.

        Raises:
            UsageError: `max_length` is not a multiple of 8 from 8 to 512, or the prompt is not valid text.
        """
        check_prompt(prompt, max_length)
        text = TEMPLATE_HEAD + prompt + TEMPLATE_TAIL
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            raise CheckpointError(f"{self._path} can't encode text ({_reason(error)}): download it again") from None
        ids = encoding.ids[:max_length]
        input_ids = np.full((1, max_length), self._pad_id, np.int64)
        input_ids[0, : len(ids)] = ids
        attention_mask = np.zeros((1, max_length), np.int64)
        attention_mask[0, : len(ids)] = 1
        return Tokens(input_ids, attention_mask, _cut(prompt, encoding, max_length))


def check_prompt(prompt: str, max_length: int) -> None:
    """Refuse what no tokenizer can encode.

    Raises:
        UsageError: `max_length` is not a multiple of 8 from 8 to 512, or the prompt is not valid text.
    """
    FIELD["max_sequence_length"].check(max_length)
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            "the prompt is not valid text: it holds half of a surrogate pair; check the encoding it was read with"
        ) from None
    if "\0" in prompt:
        raise UsageError("the prompt is not valid text: it holds a NUL character; check the encoding it was read with")


def identity(folder: Path) -> str:
    """Return all that the tokens of a prompt depend on.

    Raises:
        CheckpointError: A file of the tokenizer is missing or can't be read.
    """
    content = content_digest(_existing(folder))
    return json.dumps([content, _pad_token(folder), CHAT_TEMPLATE, tokenizers.__version__])


def _existing(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    try:
        path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except OSError:  # reading it will say why
        pass
    return path


def _reason(error: BaseException) -> str:
    """Return what the tokenizers library says, which raises bare Exceptions, and panics that are not even those.

    Raises:
        BaseException: The error is neither; Ctrl-C, for example.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split())[:200]


def _cut(prompt: str, encoding: Encoding, max_length: int) -> str:
    """Return the end of `prompt` that the tokens from `max_length` on encode, without the template."""
    if len(encoding.ids) <= max_length:
        return ""
    # Offsets count characters of the text as given, before normalisation. A character may be several tokens. If some of
    # them are cut, it counts as cut.
    start = encoding.offsets[max_length][0] - len(TEMPLATE_HEAD)
    return prompt[max(start, 0) :]


def _pad_token(folder: Path) -> str:
    config = folder / "tokenizer_config.json"
    token = read_json(config).get("pad_token") if exists(config) else None
    if isinstance(token, dict):  # an AddedToken, as older versions of transformers save it
        token = token.get("content")
    if token is not None and not (isinstance(token, str) and is_text(token)):
        raise CheckpointError(f"{config}: pad_token is {shown(token)}, expected a string: download it again")
    return token or DEFAULT_PAD_TOKEN
