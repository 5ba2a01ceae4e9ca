"""Seeds: drawn at random, and checked when a program passes one."""

from __future__ import annotations

import secrets
from typing import Any

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELD
from fluxonnx.runtime.inputs import plain
from fluxonnx.runtime.noise import check_seed


def random_seed() -> int:
    """Draw a seed that a person can type again."""
    return secrets.randbelow(2**32)


def checked_seed(seed: Any) -> int:
    """Return a seed as an integer of Python; raises UsageError if it can't be one."""
    seed = plain(FIELD["seed"], seed)
    if error := FIELD["seed"].type_error(seed):
        raise UsageError(error)
    if seed.bit_length() > 64:
        FIELD["seed"].check(seed)  # whose message can name integers of any length
    check_seed(seed)
    return seed
