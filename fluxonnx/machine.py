"""What this machine has: memory, and processor instructions for dot products of 8-bit integers."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path


@lru_cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def has_exact_int8_dot() -> bool:
    """Whether the dot product of uint8 and int8 values is both fast and exact.

    x86 processors without VNNI add pairs of products in 16 bits, which saturate. Where the system does not tell, the
    answer for x86 is no: the consequences are slower, but never wrong.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return True
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def available_memory() -> int:
    """Return how many bytes can be allocated without swapping; 4 GB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 32
