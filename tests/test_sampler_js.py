"""The sampler in JavaScript draws fluxonnx's picture."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from fluxonnx.export import export
from fluxonnx.runtime.noise import randn
from tests.conformance.runtimes import has
from tests.support import IMAGE_TOLERANCE

ROOT = Path(__file__).parent.parent
PACKAGES = ("onnxruntime-node", "@huggingface/tokenizers")
PROMPT = "a red circle on a blue background, été, 日本"


@pytest.mark.slow
@pytest.mark.skipif(not all(has(f"npm:{name}") for name in PACKAGES), reason="packages of npm not installed")
def test_the_same_noise_makes_the_same_picture(tmp_path):
    export(ROOT / "models/tiny-klein", tmp_path / "graphs", flavour="portable")
    noise = randn(42, (1, 32, 4, 6))
    noise.tofile(tmp_path / "noise.f32")
    output = tmp_path / "picture.ppm"
    arguments = [tmp_path / "graphs", PROMPT, output, tmp_path / "noise.f32", "64", "96"]
    done = subprocess.run(["node", ROOT / "examples/sampler.cjs", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header = b"P6 96 64 255\n"
    assert output.read_bytes().startswith(header)
    found = np.frombuffer(output.read_bytes()[len(header) :], np.uint8).reshape(64, 96, 3)
    with fluxonnx.load(tmp_path / "graphs", provider="cpu") as flux:
        expected = np.asarray(flux.generate(PROMPT, 96, 64, 4, 42))
    assert np.abs(found.astype(int) - expected).max() <= IMAGE_TOLERANCE
