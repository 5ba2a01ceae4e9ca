"""Processes of one thread each that train together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed
import torch.multiprocessing
from common import CONFIG
from torch import nn


def together(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in as many processes as the config says, and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join, (Path(folder) / "meet", work, arguments), CONFIG["processes"])


def _join(rank: int, meet: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=CONFIG["processes"])
    work(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@overload
def mean(what: float) -> float: ...
@overload
def mean(what: Sequence[nn.Parameter]) -> None: ...
def mean(what: float | Sequence[nn.Parameter]) -> float | None:
    """Average a number over all processes, or the gradients of some parameters, in place."""
    count = torch.distributed.get_world_size()
    if isinstance(what, (int, float)):
        value = torch.tensor(float(what), dtype=torch.float64)
        torch.distributed.all_reduce(value)
        return float(value) / count
    gradients = [p.grad for p in what if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= count
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return None
