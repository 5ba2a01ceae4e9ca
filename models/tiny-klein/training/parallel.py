"""Processes of one thread each that train together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import overload

import torch
import torch.distributed
from torch import nn


def join(rank: int, count: int, port: int = 29531) -> None:
    """Be one of several processes."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)


def leave() -> None:
    """Wait for the others, then be one no more."""
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
