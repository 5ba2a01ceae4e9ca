"""benchmarks/memory.py: where control groups are, and limits that hold."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.memory import data_limit, groups_here, main

needs_rlimit = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only")


@pytest.mark.parametrize(
    ("listing", "version", "expected"),
    [
        ("9:memory:/a/b\n1:cpu:/\n", 1, ["memory/a/b", "memory"]),
        ("4:cpu,memory:/\n", 1, ["memory"]),
        ("0::/user.slice\n", 2, ["user.slice", "."]),
        ("0::/\n", 2, ["."]),
        ("0::/user.slice\n", 1, []),  # a second tree, without memory
        ("1:cpu:/\n", 1, []),
        ("", 1, []),
    ],
)
def test_groups_of_both_versions(tmp_path, listing, version, expected):
    if version == 2:
        (tmp_path / "cgroup.controllers").touch()
    assert groups_here(listing, tmp_path) == [tmp_path / name for name in expected]


@needs_rlimit
@pytest.mark.parametrize(("megabytes", "fits"), [(10, True), (400, False)])
def test_a_program_gets_no_more_memory(megabytes, fits):
    with data_limit(200_000_000) as words:
        program = [*words, sys.executable, "-c", f"bytearray({megabytes} * 10**6)"]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ("MemoryError" not in done.stderr) == fits
    assert (done.returncode == 0) == fits


@pytest.mark.parametrize("limit", ["-1", "nan", "x"])
def test_wrong_limits(limit, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--limit", limit, "-d", "model"])
    assert error.value.code == 2
    assert "--limit" in capsys.readouterr().err


def test_no_model_is_one_line(tmp_path, capsys):
    assert main(["--limit", "0", "-d", str(tmp_path / "none"), "--rivals"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
