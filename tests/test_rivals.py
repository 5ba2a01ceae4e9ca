"""`benchmarks/rivals.py` with stand-ins for the binaries; tests/parity runs the real libraries."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from benchmarks import rivals
from tests.support import Case

CASE = Case("odd-heads")

# What the binaries print around their timings; they fail without the right flags.
FLUX2C = """#!/bin/sh
case "$*" in *"-W 96 -H 64 -s 3"*) ;; *) exit 5 ;; esac
echo "  Step 1/3 ddsF" >&2
echo "  Step 1: 9000.0 ms" >&2
echo "  Step 2: 250.0 ms" >&2
echo "  Step 3: 750.0 ms" >&2
"""
SDCPP = """#!/bin/sh
case "$*" in *"--steps 3 "*"-t 1"*) ;; *) exit 5 ;; esac
printf '\r  |====>     | 1/3 - 9.50s/it\r  |=======>  | 2/3 - 2.00s/it\r  |==========| 3/3 - 0.50it/s\n'
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")]


@pytest.fixture
def model(checkpoints) -> str:
    return str(checkpoints.exported(CASE))


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_binaries(model, tmp_path, capsys):
    flux2c, sdcpp = program(tmp_path / "flux", FLUX2C), program(tmp_path / "sd", SDCPP)
    json_path = tmp_path / "rivals.json"
    weights = str(Path(model) / "model_index.json")  # the stand-in does not read it
    arguments = ["-d", model, "--size", "96x64", "-s", "3", "--threads", "1", "--json", str(json_path)]
    arguments += ["--rivals", "flux2c", "sdcpp", "--flux2c", flux2c, "--sdcpp", sdcpp]
    arguments += ["--sdcpp-model", weights, "--sdcpp-llm", weights, "--sdcpp-vae", weights]
    assert rivals.main([*arguments, "--precision", "bf16", "fp32", "--repeat", "2"]) == 0
    programs = json.loads(json_path.read_text())["programs"]
    assert list(programs) == ["fluxonnx bf16", "fluxonnx fp32", "flux2.c", "stable-diffusion.cpp"]
    assert all(len(found["runs"]) == 2 and found["error"] is None for found in programs.values())
    assert [run["step"] for run in programs["flux2.c"]["runs"]] == [0.5, 0.5]
    assert [run["step"] for run in programs["stable-diffusion.cpp"]["runs"]] == [2.0, 2.0]
    captured = capsys.readouterr()
    # rounds: A B C D A B C D
    order = [line.partition(", run")[0] for line in captured.err.splitlines() if ", run" in line]
    assert order == [*programs, *programs]
    measured, ratios = captured.out.split("times fluxonnx bf16")
    assert all(f"| {name} " in table for name in programs for table in (measured, ratios))


def test_missing_programs_are_skipped_and_failures_are_reported(model, tmp_path, capsys):
    broken = program(tmp_path / "flux", "#!/bin/sh\necho 'cannot read the model' >&2\nexit 1\n")
    arguments = ["-d", model, "--size", "64", "-s", "2", "--repeat", "2", "--flux2c", broken]
    assert rivals.main([*arguments, "--rivals", "flux2c", "sdcpp", "--sdcpp", str(tmp_path / "sd")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("flux2.c failed: cannot read the model") == 1
    assert f"skipped sdcpp: {tmp_path / 'sd'} is not a program" in captured.err
    assert "fluxonnx bf16" in captured.out
    assert "flux2.c" not in captured.out


def test_missing_packages_are_skipped(model, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rivals.main(["-d", model, "--size", "64", "-s", "1", "--repeat", "1"]) == 0
    err = capsys.readouterr().err
    for line in ("diffusers-bf16: pip install torch", "openvino: pip install openvino", "flux2c: give its binary"):
        assert f"skipped {line}" in err


@pytest.mark.parametrize(
    ("arguments", "code", "pattern"),
    [
        (["--size", "100"], 2, "100x100 can't be drawn"),
        (["--threads", "0"], 2, "threads is 0"),
        (["--precision", "fp7"], 2, "precision 'fp7' is unknown"),
        (["-d", "no/such/model"], 1, "does not exist"),
    ],
)
def test_bad_input(model, capsys, arguments, code, pattern):
    assert rivals.main(["-d", model, *arguments]) == code
    assert pattern in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_cold(model, tmp_path, monkeypatch, capsys):
    """All files that any of the programs reads leave the page cache before each run."""
    dropped: list[int] = []

    def note(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "posix_fadvise", note)
    flux2c = program(tmp_path / "flux", FLUX2C)
    arguments = ["-d", model, "--size", "96x64", "-s", "3", "--repeat", "1", "--cold"]
    arguments += ["--rivals", "flux2c", "sdcpp", "--flux2c", flux2c, "--sdcpp", flux2c]
    assert rivals.main([*arguments, "--sdcpp-model", str(tmp_path / "missing")]) == 0  # skipped, as without --cold
    weights = sorted(path.stat().st_ino for path in Path(model).rglob("*.safetensors"))
    assert len(weights) >= 3
    assert sorted(dropped) == sorted(2 * weights)
    assert "3 steps, cold" in capsys.readouterr().out
