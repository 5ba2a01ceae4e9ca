"""Limits of containers and batch systems, from made-up file systems, and the threads that follow from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxonnx.machine import (
    available_memory,
    cpu_flags,
    memory_limit,
    processor_time_limit,
    thread_limit,
    total_memory,
    usable_cores,
)
from tests.support import Case

GB = 1 << 30
MEMINFO = f"MemTotal:       {64 * GB // 1024} kB\nMemAvailable:   {32 * GB // 1024} kB\n"
NO_LIMIT = 9223372036854771712
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)
V1_GROUPS = "5:memory:/jobs/7\n4:cpu,cpuacct:/jobs/7\n"


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text), "utf-8")
    return root


def v2(root: Path, files: dict[str, object], group: str = "/a/b", mounts: str = V2_MOUNT) -> Path:
    inside = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return tree(root, {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mounts, **inside})


def v1(root: Path, files: dict[str, object], groups: str = V1_GROUPS, mounts: str = V1_MOUNTS) -> Path:
    inside = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return tree(root, {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **inside})


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2\nvmx flags\t: vnmi\n\nprocessor\t: 1\nflags\t\t: fpu\n", {"fpu", "avx2"}),
        (
            "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimddp i8mm\nCPU part\t: 0xd40\n",
            {"fp", "asimddp", "i8mm"},
        ),
        ("processor\t: 0\nflags\t\t:\nbugs\t\t: spectre_v1\n", set()),
        ("", set()),
    ],
)
def test_flags_of_the_processor(tmp_path, cpuinfo, expected):
    assert cpu_flags(tree(tmp_path, {"proc/cpuinfo": cpuinfo})) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32 * GB),
        ({"a/b/memory.max": "max", "a/memory.max": "max"}, 32 * GB),
        ({"a/b/memory.max": 100 * GB}, 32 * GB),
        ({"a/b/memory.max": 8 * GB}, 8 * GB),
        ({"a/b/memory.max": 8 * GB, "a/memory.max": 2 * GB}, 2 * GB),
        ({"a/b/memory.max": 8 * GB, "memory.max": GB}, GB),
        ({"a/b/memory.max": 8 * GB, "a/memory.high": 3 * GB, "a/memory.max": 4 * GB}, 3 * GB),
        ({"a/b/memory.max": 8 * GB, "a/b/memory.current": 5 * GB}, 3 * GB),
        (
            {
                "a/b/memory.max": 8 * GB,
                "a/b/memory.current": 5 * GB,
                "a/b/memory.stat": f"anon 5\ninactive_file {2 * GB}\nactive_file {GB}\nfile {9 * GB}\n",
            },
            6 * GB,
        ),
        ({"a/b/memory.max": 8 * GB, "a/b/memory.current": 9 * GB}, 0),
        ({"a/b/memory.max": "nonsense", "a/memory.max": -1}, 32 * GB),
    ],
)
def test_memory_of_version_2(tmp_path, files, expected):
    """The least of what all ancestors leave; pages of files can be taken back."""
    assert available_memory(v2(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32 * GB),
        ({"memory/jobs/7/memory.limit_in_bytes": NO_LIMIT}, 32 * GB),
        ({"memory/jobs/7/memory.limit_in_bytes": 4 * GB}, 4 * GB),
        ({"memory/jobs/7/memory.limit_in_bytes": 4 * GB, "memory/jobs/memory.limit_in_bytes": GB}, GB),
        ({"memory/jobs/7/memory.limit_in_bytes": 4 * GB, "memory/jobs/7/memory.usage_in_bytes": 3 * GB}, GB),
        (
            {
                "memory/jobs/7/memory.limit_in_bytes": NO_LIMIT,
                "memory/jobs/7/memory.usage_in_bytes": 3 * GB,
                "memory/jobs/7/memory.stat": f"hierarchical_memory_limit {5 * GB}\ntotal_active_file {GB}\n",
            },
            3 * GB,
        ),
    ],
)
def test_memory_of_version_1(tmp_path, files, expected):
    assert available_memory(v1(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("shown", "group"), [("/", "/"), ("/docker/abc", "/docker/abc"), ("/docker/abc", "/elsewhere"), ("/", "/gone/away")]
)
def test_container_sees_a_part_of_the_tree(tmp_path, shown, group):
    """Its own group is what is mounted, whether or not it has a namespace of its own."""
    mount = f"30 23 0:26 {shown} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    root = v2(tmp_path, {"memory.max": 2 * GB, "cpu.max": "100000 100000"}, group, mount)
    assert available_memory(root) == 2 * GB
    assert usable_cores(root, lambda: range(8), 8) == 1


def test_both_versions_side_by_side(tmp_path):
    """As systemd's hybrid layout has it."""
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = {"memory/jobs/7/memory.limit_in_bytes": 4 * GB, "unified/cpu.max": "max 100000"}
    root = v1(tmp_path, files, f"{V1_GROUPS}0::/\n", V1_MOUNTS + unified)
    assert available_memory(root) == 4 * GB
    assert usable_cores(root, lambda: range(8), 8) == 8


def test_mount_point_with_a_space(tmp_path):
    mount = "30 23 0:26 / /sys/fs/c\\040group rw - cgroup2 cgroup2 rw\n"
    root = v2(tmp_path, {}, "/", mount)
    assert available_memory(tree(root, {"sys/fs/c group/memory.max": GB})) == GB


def test_system_that_tells_nothing(tmp_path):
    assert available_memory(tmp_path) == 1 << 32
    assert usable_cores(tmp_path, lambda: range(6), 6) == 6
    assert thread_limit(tmp_path, lambda: range(6), 6) is None


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "::::\n\n0", "\0"])
def test_files_of_another_form(tmp_path, text):
    names = ("proc/meminfo", "proc/cpuinfo", "proc/self/cgroup", "proc/self/mountinfo")
    root = tree(tmp_path, dict.fromkeys(names, text))
    assert available_memory(root) == 1 << 32
    assert thread_limit(root, lambda: {1}, 4) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"a/b/cpu.max": "max 100000"}, 8),
        ({"a/b/cpu.max": "400000 100000"}, 4),
        ({"a/b/cpu.max": "150000 100000"}, 2),
        ({"a/b/cpu.max": "20000 100000"}, 1),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        ({"a/b/cpu.max": "1600000 100000"}, 8),
        ({"a/b/cpu.max": "5 0"}, 8),
    ],
)
def test_time_of_version_2(tmp_path, files, expected):
    assert usable_cores(v2(tmp_path, files), lambda: range(8), 8) == expected


@pytest.mark.parametrize(("quota", "expected"), [(-1, 8), (300000, 3), (0, 8)])
def test_time_of_version_1(tmp_path, quota, expected):
    folder = "cpu,cpuacct/jobs/7"
    root = v1(tmp_path, {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": 100000})
    assert usable_cores(root, lambda: range(8), 8) == expected


def test_threads_are_cores_of_the_mask(tmp_path):
    """Nothing changes where the whole machine may be used; processors of one core count once elsewhere."""
    blocks = [f"processor\t: {i}\nphysical id\t: {i // 4 % 2}\ncore id\t\t: {i % 4}\n" for i in range(16)]
    root = tree(tmp_path, {"proc/cpuinfo": "\n".join(blocks)})
    assert thread_limit(root, lambda: range(16), 16) is None
    assert thread_limit(root, lambda: {0, 8}, 16) == 1
    assert thread_limit(root, lambda: {0, 4}, 16) == 2
    assert thread_limit(root, lambda: range(12), 16) == 8
    assert usable_cores(root, lambda: range(12), 16) == 12


THREADS = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fluxonnx
most = 0
def watch(event):
    global most
    most = max(most, len(os.listdir("/proc/self/task")))
def load(threads):
    global most
    with fluxonnx.load(sys.argv[1], watch=watch, threads=threads) as flux:
        flux.generate("a", 64, 64, steps=1, seed=1)
    found, most = most, 0
    return found
print(load(1), load(None), load(3))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_one_core_runs_one_thread(checkpoints):
    """As many threads in the process as with threads=1; whoever asks for more gets them."""
    root = checkpoints.exported(Case("odd-heads"))
    command = [sys.executable, "-c", THREADS, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    one, limited, three = map(int, done.stdout.split())
    assert one == limited < three
    assert done.stderr == ""


def test_limits_as_they_are_told(tmp_path):
    root = v2(tmp_path / "2", {"a/memory.max": 8 * GB, "a/b/memory.high": 3 * GB, "a/cpu.max": "150000 100000"})
    assert (total_memory(root), memory_limit(root), processor_time_limit(root)) == (64 * GB, 3 * GB, 1.5)
    root = v1(tmp_path / "1", {"memory/jobs/7/memory.limit_in_bytes": 2 * GB, "memory/memory.limit_in_bytes": NO_LIMIT})
    assert memory_limit(root) == 2 * GB
    root = v1(tmp_path / "none", {"memory/memory.limit_in_bytes": NO_LIMIT})
    assert (memory_limit(root), processor_time_limit(root)) == (None, None)
    assert total_memory(tmp_path / "nowhere") is None
