"""What this machine can do: memory, reading ahead, and instructions for products of 8-bit integers."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

# Linux reads no more at a time than a disk's read_ahead_kb, which is 128 unless someone changed it.
READ_AHEAD = 128 << 10


@lru_cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def adds_int8_products_exactly() -> bool:
    """Whether uint8 times int8 is both fast and exact.

    x86 processors without VNNI add pairs of products in 16 bits, which saturate.
    Where the system does not tell, the answer is no for x86: what follows from it is slower, but never wrong.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return True
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def available_memory() -> int:
    """Return how many bytes can be had without swapping; 4 GB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 32


def read_ahead(files: Sequence[Path]) -> None:
    """Have the system read files into memory in the background, one after the other; what is there costs nothing.

    Mapped weights are read page by page as they are used, which leaves a disk idle while something is computed, and
    the processor idle while it reads. Nothing is done where memory is short, or where the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        return

    def read() -> None:
        with suppress(OSError):  # a file that can't be read is reported by who needs it
            if sum(file.stat().st_size for file in files) > available_memory():
                return
            for file in files:
                with file.open("rb") as opened:
                    for start in range(0, file.stat().st_size, READ_AHEAD):
                        os.posix_fadvise(opened.fileno(), start, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=read, daemon=True).start()
