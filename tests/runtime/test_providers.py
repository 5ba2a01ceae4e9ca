"""Execution providers: named, refused where they are not there or do not start, written into pictures.

Those other than the CPU's are tested where the installed onnxruntime has them.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime import providers, session
from fluxonnx.runtime.images import save_image
from fluxonnx.runtime.metadata import read_parameters
from tests.conftest import Case

CASE = Case("odd-heads")
PICTURE = ["-p", "x", "-W", "64", "-H", "64", "-s", "1", "-S", "1"]
OTHERS = [name for name in providers.available() if name != providers.CPU]


def test_names_are_onnxruntimes_without_the_ending(monkeypatch):
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    assert providers.available() == ["tensorrt", "cuda", "cpu"]
    name, settings = providers.session_providers("cuda", None)[0]
    assert name == "CUDAExecutionProvider"
    assert settings == providers.KNOWN["cuda"].settings


@pytest.mark.parametrize(
    ("provider", "cure"), [("rocm", "choose one of these"), ("cuda", "install onnxruntime-gpu in its place")]
)
def test_unknown_provider_is_refused(copy_of, monkeypatch, capsys, provider, cure):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    root = copy_of(CASE)
    with pytest.raises(UsageError, match=f"{provider}.*which has cpu.*{cure}"):
        fluxonnx.load(root, provider=provider)
    assert main(["generate", "-d", str(root), "--provider", provider, *PICTURE]) == 2
    assert main(["bench", "-d", str(root), "--provider", provider]) == 2
    assert cure in capsys.readouterr().err


def test_fallback_to_the_cpu_is_refused(copy_of, monkeypatch):
    monkeypatch.setattr(providers, "available", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(session, "session_providers", lambda provider, threads: ["CPUExecutionProvider"])
    with (
        fluxonnx.load(copy_of(CASE), provider="cuda", precision="bf16") as flux,
        pytest.raises(FluxonnxError, match="can't start its cuda provider"),
    ):
        flux.generate("x", 64, 64, 1, 1)


def test_provider_that_does_not_start_does_not_work(monkeypatch):
    assert providers.works("cpu")
    monkeypatch.setattr(providers, "session_providers", lambda provider, threads: ["CPUExecutionProvider"])
    assert not providers.works("cuda")


def test_picture_says_its_provider(copy_of, tmp_path, monkeypatch, capsys):
    root, made, again = copy_of(CASE), tmp_path / "a.png", tmp_path / "b.png"
    assert main(["generate", "-d", str(root), *PICTURE, "-o", str(made)]) == 0
    assert read_parameters(made)["provider"] == "cpu"
    known = {**read_parameters(made), "provider": "cuda"}
    monkeypatch.setattr("fluxonnx.jobs.read_parameters", lambda path: known)
    assert main(["generate", "-d", str(root), "--from", str(made), "-o", str(again)]) == 0
    assert "was made on cuda, which is not here" in capsys.readouterr().err
    assert read_parameters(again)["provider"] == "cpu"


@pytest.mark.parametrize("older", [True, False])
def test_picture_is_made_again_with_its_flavour(copy_of, tmp_path, monkeypatch, older):
    """Also one from before pictures said their provider."""
    root, made, again = copy_of(CASE), tmp_path / "a.png", tmp_path / "b.png"
    with fluxonnx.load(root, flavour="portable") as flux:
        image = flux.generate("x", 64, 64, 1, 1)
        save_image(image, made, image.info)
    known = read_parameters(made)
    if older:
        del known["provider"]
    monkeypatch.setattr("fluxonnx.jobs.read_parameters", lambda path: known)
    assert main(["generate", "-d", str(root), "--from", str(made), "-o", str(again)]) == 0
    assert read_parameters(again)["flavour"] == "portable"


@pytest.mark.skipif(not OTHERS, reason="onnxruntime has no provider but the CPU's")
@pytest.mark.parametrize("provider", OTHERS)
def test_pictures_are_the_cpus_but_for_rounding(copy_of, provider):
    root = copy_of(CASE)
    if not providers.works(provider):
        pytest.skip(f"{provider} can't be started here")
    pictures = []
    for name in (providers.CPU, provider):
        with fluxonnx.load(root, provider=name) as flux:
            pictures.append(np.asarray(flux.generate("a cat", 64, 64, 2, seed=1), np.float32))
            pictures.append(np.asarray(flux.edit("a cat", [Image.new("RGB", (64, 64), "red")], seed=1), np.float32))
    assert np.abs(pictures[0] - pictures[2]).mean() < 1
    assert np.abs(pictures[1] - pictures[3]).mean() < 1
