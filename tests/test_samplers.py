"""The samplers in examples, which do not know fluxonnx, draw its picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from fluxonnx.export import export
from fluxonnx.runtime.noise import randn
from tests.conformance.installed import has
from tests.support import IMAGE_TOLERANCE

ROOT = Path(__file__).parent.parent
PACKAGES = ("onnxruntime-node", "@huggingface/tokenizers")
PROMPT = "a red circle on a blue background, été, 日本"
COMMANDS = [
    pytest.param((sys.executable, "examples/sampler.py"), id="python"),
    pytest.param(
        ("node", "examples/sampler.cjs"),
        id="javascript",
        marks=pytest.mark.skipif(not all(has(f"npm:{name}") for name in PACKAGES), reason="packages of npm missing"),
    ),
]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samplers") / "graphs"
    export(ROOT / "models/tiny-klein", folder, flavour="portable")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_noise_makes_the_same_picture(tmp_path, graphs, command):
    noise = randn(42, (1, 32, 4, 6))
    noise.tofile(tmp_path / "noise.f32")
    output = tmp_path / "picture.ppm"
    arguments = [graphs, PROMPT, output, tmp_path / "noise.f32", "64", "96"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header = b"P6 96 64 255\n"
    assert output.read_bytes().startswith(header)
    found = np.frombuffer(output.read_bytes()[len(header) :], np.uint8).reshape(64, 96, 3)
    with fluxonnx.load(graphs, provider="cpu") as flux:
        expected = np.asarray(flux.generate(PROMPT, 96, 64, 4, 42))
    assert np.abs(found.astype(int) - expected).max() <= IMAGE_TOLERANCE


def test_the_page_shows_the_sampler():
    """docs/graphs.md has the file as it is run above; it imports nothing of ours."""
    code = (ROOT / "examples/sampler.py").read_text("utf-8")
    assert f"```python\n{code}```\n" in (ROOT / "docs/graphs.md").read_text("utf-8")
    assert "import fluxonnx" not in code
    assert "from fluxonnx" not in code


def test_the_page_knows_the_special_tokens():
    ids = json.loads((ROOT / "fluxonnx/check/data/tokens.json").read_text("utf-8"))["special"]
    page = (ROOT / "docs/graphs.md").read_text("utf-8")
    template = re.findall(r"15\d{4}", page)
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>")
    assert template == [str(ids[name]) for name in names]
