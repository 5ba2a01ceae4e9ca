"""Data-parallel training in processes of one thread each."""

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


def run_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in the configured number of processes, and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join, (Path(folder) / "meet", work, arguments), CONFIG["processes"])


def _join(rank: int, rendezvous: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=CONFIG["processes"])
    work(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@overload
def all_reduce_mean(values: float) -> float: ...
@overload
def all_reduce_mean(values: Sequence[nn.Parameter]) -> None: ...
def all_reduce_mean(values: float | Sequence[nn.Parameter]) -> float | None:
    """Average over all processes: a number, which is returned, or the gradients of parameters, in place."""
    count = torch.distributed.get_world_size()
    if isinstance(values, (int, float)):
        value = torch.tensor(float(values), dtype=torch.float64)
        torch.distributed.all_reduce(value)
        return float(value) / count
    gradients = [p.grad for p in values if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= count
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return None
