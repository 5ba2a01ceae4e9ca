"""`fluxonnx compare`: figures against plain formulas, layers against the architecture, the page, and errors."""

from __future__ import annotations

import math
import re
import shutil

import numpy as np
import onnx
import pytest
from PIL import Image

from fluxonnx.cli import main
from fluxonnx.measure import quality
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("one-double-three-single")


@pytest.fixture(scope="module")
def model(checkpoints, tmp_path_factory):
    return shutil.copytree(checkpoints.get(CASE), tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def report(model):
    plan = quality.Plan(model, ("int8", "int4", "bf16"), ("a cat", "a dog"), width=64, height=80, steps=2)
    return quality.run(plan, lambda _: None)


def test_distance():
    a, b = np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float32)
    found = quality.distance(b, a)
    assert found.relative == pytest.approx(0.1)
    assert found.snr == pytest.approx(20)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert quality.distance(a, a) == quality.Distance(0.0, 1.0)
    assert quality.distance(a, a).snr == math.inf


def test_psnr():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert quality.psnr(Image.new("RGB", (8, 8), (110, 100, 100)), grey) == pytest.approx(
        10 * math.log10(255**2 / (100 / 3))
    )
    assert quality.psnr(grey, grey) == math.inf


def test_every_layer_is_compared(report, model):
    """Double blocks have two outputs, single blocks one, the last of them without text; tokens are in brackets."""
    found = [layer.name for layer in report.results[0].layers]
    text = [f"model/layers.{i} [512]" for i in range(3)]
    double = ["transformer_blocks.0 [20]", "transformer_blocks.0 [512]"]
    single = [f"single_transformer_blocks.{i} [{tokens}]" for i, tokens in enumerate((532, 532, 20))]
    assert found == [*text, *double, *single]
    graph = onnx.load(model / "transformer.onnx", load_external_data=False)
    assert len(quality.layer_outputs(graph)) == 5


def test_int8_is_better_than_int4(report):
    int8, int4 = report.results
    assert [int8.precision, int4.precision] == ["int8", "int4"]
    for graph in ("text_encoder", "transformer"):
        assert 0 < int8.graphs[graph].relative < int4.graphs[graph].relative < 0.2
    for graph in ("vae_encoder", "vae_decoder"):
        assert int8.graphs[graph].relative == 0
    assert all(a > b > 20 for a, b in zip(int8.psnr, int4.psnr, strict=True))
    assert 0 < int4.megabytes < int8.megabytes


def test_last_layer_has_the_error_of_the_graph(report):
    """The text encoder returns the outputs of its layers side by side."""
    for result in report.results:
        layers = [layer.relative for layer in result.layers if layer.graph == "text_encoder"]
        assert min(layers) <= result.graphs["text_encoder"].relative <= max(layers)
        for before, after in zip([0.0, *layers], layers, strict=False):
            assert after <= before + 1.0001 * next(x.added for x in result.layers if x.relative == after)


def test_streams_of_equal_length_are_told_apart():
    """The second block adds no error to either stream."""
    one = np.ones((1, 64, 4), np.float32)
    errors = {"/transformer_blocks.0/Add_2": 0.3, "/transformer_blocks.0/Add_3": 0.1}
    errors |= {"/transformer_blocks.1/Add_2": 0.3, "/transformer_blocks.1/Add_3": 0.1}
    found = {name: np.float32(1 + error) * one for name, error in errors.items()}
    layers = quality.layer_errors("transformer", found, dict.fromkeys(errors, one))
    assert [layer.added for layer in layers] == pytest.approx([0.3, 0.1, 0, 0], abs=1e-6)


def test_nothing_is_left_behind(report, model):
    assert not [path for path in model.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_command(model, tmp_path, capsys):
    output = tmp_path / "report.html"
    arguments = ["compare", "-d", str(model), "--precision", "int8", "-o", str(output)]
    assert main([*arguments, "-W", "64", "-H", "64", "-s", "1", "-p", "a <b>"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| transformer +\| int8 +\| +0\.\d{3}% ", printed)
    page = output.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<svg") == 2
    assert "a &lt;b&gt;" in page


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--precision", "bf16"], "nothing to compare with bf16"),
        (["--precision", "int3"], "precision 'int3' is unknown"),
        (["-W", "65"], "width 65 can't be drawn"),
        (["-p", " "], "the prompt is empty"),
        (["-o", "missing/report.html"], "does not exist: create it, or choose another with -o"),
    ],
)
def test_usage_errors(model, fails, tmp_path, monkeypatch, arguments, pattern):
    monkeypatch.chdir(tmp_path)
    fails(2, pattern, "compare", "-d", model, *arguments)
    assert not list(tmp_path.iterdir())
