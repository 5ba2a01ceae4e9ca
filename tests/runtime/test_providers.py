"""Execution providers: their names, and that those which are missing or do not start are refused.

Other providers than the CPU are tested where the installed onnxruntime has them.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime import providers
from tests.support import Case

CASE = Case("odd-heads")
PICTURE = ["-p", "x", "-W", "64", "-H", "64", "-s", "1", "-S", "1"]
OTHERS = [name for name in providers.available() if name != providers.CPU]


def test_names_are_onnxruntimes_without_the_suffix(monkeypatch):
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


@pytest.fixture
def broken_cuda(monkeypatch):
    """An onnxruntime that lists CUDA's provider, but runs sessions on the CPU, as without a driver."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    if "cuda" in OTHERS:
        pytest.skip("CUDA may work here")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_fallback_to_the_cpu_is_refused(copy_of, broken_cuda):
    with (
        fluxonnx.load(copy_of(CASE), provider="cuda", precision="bf16") as flux,
        pytest.raises(FluxonnxError, match="can't start its cuda provider, most often for lack of a driver"),
    ):
        flux.generate("x", 64, 64, 1, 1)


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_provider_that_does_not_start_does_not_work(broken_cuda):
    assert providers.works("cpu")
    assert not providers.works("cuda")


@pytest.mark.skipif(not OTHERS, reason="onnxruntime has only the CPU provider")
@pytest.mark.parametrize("provider", OTHERS)
def test_pictures_differ_from_the_cpus_only_by_rounding(copy_of, provider):
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
