"""`--precision auto`: the choice follows from sizes, memory and processor, and is said."""

from __future__ import annotations

from pathlib import Path

import pytest

import fluxonnx
from fluxonnx import api, auto
from fluxonnx.checkpoint import Checkpoint, Tensor
from fluxonnx.cli import main
from fluxonnx.manifest import read_manifest
from tests.conftest import Case

CASE = Case("odd-heads")
FOUR_BILLION = 7_750_000_000


@pytest.fixture
def large(checkpoints, monkeypatch) -> Checkpoint:
    """A checkpoint that says it has as many weights as the 4B model."""
    tensor = Tensor("w", "BF16", (FOUR_BILLION // 2,), Path("w"), 0, FOUR_BILLION)
    monkeypatch.setattr(auto, "transformer_tensors", lambda checkpoint: {"w": tensor})
    return Checkpoint(checkpoints.get(CASE))


@pytest.mark.parametrize(
    ("gigabytes", "exact", "expected", "reason"),
    [
        (20, True, "int8", "20.0 GB of memory are free, and this CPU has 8-bit products"),
        (20, False, "int8", "lacks VNNI"),
        (5.0, True, "int4", "5.0 GB of memory are free, int8 would need 5.8 GB"),
    ],
)
def test_large_model(large, monkeypatch, gigabytes, exact, expected, reason):
    monkeypatch.setattr(auto, "adds_int8_products_exactly", lambda: exact)
    choice = auto.choose(large, memory=int(gigabytes * 1e9))
    assert (choice.precision, choice.provider) == (expected, "cpu")
    assert reason in choice.reason


def test_gpu_is_taken_where_it_works(large, monkeypatch):
    monkeypatch.setattr(auto, "available", lambda: ["tensorrt", "cuda", "coreml", "cpu"])
    for works, provider, precision in ((True, "cuda", "fp16"), (False, "cpu", "int8")):
        monkeypatch.setattr(auto, "works", lambda name, works=works: works)
        choice = auto.choose(large, memory=1 << 40)
        assert (choice.provider, choice.precision) == (provider, precision)
    assert auto.choose(large, "coreml").precision == "fp16"


def test_small_model_stays_as_it_is(checkpoints):
    assert auto.choose(Checkpoint(checkpoints.get(CASE)), memory=0).precision == "bf16"


def test_commands_say_what_was_chosen(copy_of, tmp_path, capsys, monkeypatch):
    root = copy_of(CASE)
    monkeypatch.setattr(auto, "SMALL", 0)
    monkeypatch.setattr(auto, "WORKING_MEMORY", 0)
    output = tmp_path / "x.png"
    arguments = ["-p", "x", "-o", str(output), "-W", "64", "-H", "64", "-s", "1"]
    assert main(["generate", "-d", str(root), "--precision", "auto", *arguments]) == 0
    assert "Precision int8, provider cpu: " in capsys.readouterr().err
    assert set(read_manifest(root).builds) == {"int8"}
    assert main(["export", "-d", str(root), "--precision", "auto"]) == 0
    assert "Precision int8, provider cpu: " in capsys.readouterr().err


def test_only_build_of_a_directory_is_taken(copy_of):
    root = copy_of(CASE)
    fluxonnx.load(root, precision="int8").close()
    for file in root.glob("*/*.safetensors"):
        if "int8" not in file.name:
            file.unlink()
    with api.load(root, precision="auto") as flux:
        assert flux.generate("x", 64, 64, steps=1, seed=1).info["precision"] == "int8"
