"""Mixed precision: bfloat16 where it is faster on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_attention = F.scaled_dot_product_attention


@contextmanager
def bfloat16(enabled: bool) -> Iterator[None]:
    """Multiply matrices in bfloat16, except in attention.

    On CPUs the backward pass of attention takes a third of the time in float32.
    """
    if not enabled:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), patch.object(F, "scaled_dot_product_attention", _in_float32):
        yield


def _in_float32(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return _attention(query.float(), key.float(), value.float(), *arguments, **options).to(query.dtype)
