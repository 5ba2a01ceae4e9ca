"""What this process may use of the machine: memory, cores, and instructions for dot products of 8-bit integers.

A container or a batch system gives a process less than the machine has, by limits of control groups (cgroups, versions
1 and 2) and by an affinity mask. Functions that read the system's files take the root of the file system, for tests.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, and the man pages cgroups(7) and
proc_pid_mountinfo(5).
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path("/")

# Threads per operator, at most: far more than there are make a run fail late, in words of onnxruntime.
MOST_THREADS = 1024


@lru_cache
def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Return the processor's features as Linux names them; empty where the system does not tell."""
    # x86 calls them flags, arm64 Features
    found = re.search(r"^(?:flags|Features)[ \t]*:(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def has_exact_int8_dot() -> bool:
    """Whether the dot product of uint8 and int8 values is both fast and exact.

    x86 processors without VNNI add pairs of products in 16 bits, which saturate. Where the system does not tell, the
    answer for x86 is no: the consequences are slower, but never wrong.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return True
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def available_memory(root: Path = ROOT) -> int:
    """Return how many bytes can be allocated without swapping or exceeding a limit; 4 GB where nothing tells."""
    lines = _read(root / "proc/meminfo").splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if re.match(r"MemAvailable: +\d+ kB", line)]
    return max(0, min([*(free or [1 << 32]), *_left_by_cgroups(root)]))


def total_memory(root: Path = ROOT) -> int | None:
    """Return the bytes of memory that the machine has; None where the system does not tell."""
    found = re.search(r"^MemTotal: +(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the least limit, in bytes, of the control groups that this process is in; None if there is none."""
    names = {2: ("memory.max", "memory.high"), 1: ("memory.limit_in_bytes",)}
    found = [
        _number(folder / name)
        for version in names
        for folder in _groups(root, "memory", version)
        for name in names[version]
    ]
    # version 1 writes "no limit" as a number of pages near 2**63
    return min((limit for limit in found if limit is not None and limit < 1 << 60), default=None)


def processor_time_limit(root: Path = ROOT) -> float | None:
    """Return the least limit on processor time of these groups, in processors; None if there is none."""
    return min(_shares_of_time(root), default=None)


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Yield what each group that this process is in leaves of its limit.

    Memory that holds files counts as used, but the kernel takes it back before it refuses any.
    """
    for folder in _groups(root, "memory", 2):
        limits = [number for name in ("memory.max", "memory.high") if (number := _number(folder / name)) is not None]
        used = _number(folder / "memory.current") or 0
        if limits:
            yield min(limits) - max(0, used - _files_in_memory(folder, ""))
    for folder in _groups(root, "memory", 1):
        # The limit of all ancestors, some of which may be out of sight in a container.
        limits = [*_statistics(folder, "hierarchical_memory_limit")]
        if (own := _number(folder / "memory.limit_in_bytes")) is not None:
            limits.append(own)
        used = _number(folder / "memory.usage_in_bytes") or 0
        if limits:
            yield min(limits) - max(0, used - _files_in_memory(folder, "total_"))


def _files_in_memory(folder: Path, prefix: str) -> int:
    return sum(sum(_statistics(folder, f"{prefix}{kind}_file")) for kind in ("active", "inactive"))


def _statistics(folder: Path, name: str) -> list[int]:
    """Return the values of an entry of memory.stat: one or none."""
    pairs = (line.split() for line in _read(folder / "memory.stat").splitlines())
    return [int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == name and pair[1].isdecimal()]


def _allowed_processors() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def usable_cores(
    root: Path = ROOT, allowed: Callable[[], Collection[int]] = _allowed_processors, machine: int | None = None
) -> int:
    """Return how many processors this process may use: those of its affinity mask, as far as its time suffices.

    Args:
        root: The root of the file system.
        allowed: Returns the affinity mask.
        machine: The processors of the machine; by default what the system says.
    """
    count = min(len(allowed()), machine or os.cpu_count() or 1)
    return max(1, min([count, *(math.ceil(share) for share in _shares_of_time(root))]))


def thread_limit(
    root: Path = ROOT, allowed: Callable[[], Collection[int]] = _allowed_processors, machine: int | None = None
) -> int | None:
    """Return how many threads should compute where this process may not use the whole machine; None where it may.

    onnxruntime would start a thread for each core of the machine, and pin them to cores that this process may not use.
    Two processors of one core share its arithmetic units, so they count once.
    """
    machine = machine or os.cpu_count() or 1
    usable = usable_cores(root, allowed, machine)
    if usable >= machine:
        return None
    cores = _cores_of(root, allowed())
    return min(usable, cores) if cores else usable


def _cores_of(root: Path, processors: Collection[int]) -> int:
    """Return the number of physical cores that some processors belong to; 0 where the system does not tell."""
    cores = set()
    for block in _read(root / "proc/cpuinfo").split("\n\n"):
        found = dict(re.findall(r"^(processor|physical id|core id)\s*: *(\d+)$", block, re.MULTILINE))
        if "processor" in found and "core id" in found and int(found["processor"]) in processors:
            cores.add((found.get("physical id"), found["core id"]))
    return len(cores)


def _shares_of_time(root: Path) -> Iterator[float]:
    """Yield the processor time that each group may take, in processors."""
    for folder in _groups(root, "cpu", 2):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu", 1):
        limit, length = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if limit and length:
            yield limit / length


def _groups(root: Path, controller: str, version: int) -> Iterator[Path]:
    """Yield the folder of this process's control group and of each of its ancestors that can be seen."""
    places = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        if (version == 2 and number == "0" and not names) or (version == 1 and controller in names.split(",")):
            places[version] = group
    if version not in places:
        return
    for mount, shown in _mounts(root, controller, version):
        # Inside a container, the mount may show only a part of the tree, or the path may be that of the host.
        inside = places[version]
        if shown != "/":
            inside = inside.removeprefix(shown) if f"{inside}/".startswith(f"{shown}/") else "/"
        folder = mount.joinpath(*[part for part in inside.split("/") if part not in ("", "..")])
        while folder != mount:
            yield folder
            folder = folder.parent
        yield mount


def _mounts(root: Path, controller: str, version: int) -> Iterator[tuple[Path, str]]:
    """Yield where the groups of a controller are mounted, and which part of the tree is shown there."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == ("cgroup2" if version == 2 else "cgroup") and (version == 2 or controller in kind[2].split(",")):
            yield root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _number(path: Path) -> int | None:
    """Return the number in a file; None for a missing file, or for a word such as "max" or a negative "no limit"."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    """Return the text of a file of the system; empty where there is none."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
